"""The derivations hold for all values; with a fault planted they do not; blocks against loops."""

import math

import numpy as np
import pytest
import reference
import sympy
import torch
import torch.nn.functional as F
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from test_blocks import scrambled

from replib import branches, kernels
from replib.analysis import derivations, multipliers, symbolic
from replib.analysis.symbolic import Symbolic, with_symbols
from replib.blocks import BLOCKS, RepBlock
from replib.blocks.linear import UnitFilters
from replib.branches import (
    NORM_AT_RESTORE,
    AveragePool,
    Chain,
    Convolution,
    Filter,
    Norm,
    Scalar,
    Scale,
)
from replib.kernels import Kernel

torch.set_num_threads(1)
EXACT = {"rtol": 0, "atol": 1e-12}
SMALL = {  # where one channel, 1-D and 3 taps are not possible
    "acb": {"dims": 2},
    "orepa_1x1": {"kernel_size": 1},
    "replk": {"kernel_size": 7},
}
CAN_INVERT = [f for f in BLOCKS if derivations.symbolic_block(f, **SMALL.get(f, {})).invertible]


# -- derivations ----------------------------------------------------------------------------------
@pytest.mark.parametrize("name", derivations.TRANSFORMS)
def test_the_six_transforms(name):
    assert derivations.TRANSFORMS[name]().holds


@pytest.mark.parametrize("family", BLOCKS)
def test_every_block_is_one_convolution(family):
    assert derivations.merged(family, **SMALL.get(family, {})).holds


@pytest.mark.parametrize("family", CAN_INVERT)
def test_every_restoration_reaches_its_kernel(family):
    for way in (("official", "unit"), *(("preserving", norm) for norm in NORM_AT_RESTORE)):
        assert derivations.restored(family, *way, **SMALL.get(family, {})).holds, way


@pytest.mark.parametrize("family", ["csla", "orepa"])
def test_one_factor_for_all_channels(family):
    """A symbol that every channel shares, merged and restored."""
    options = {"out_channels": 2, "scaling": "scalar"}
    block = derivations.symbolic_block(family, **options)
    scalars = [part for part in block.modules() if isinstance(part, Scalar)]
    assert scalars and all(len(s.weight.values[0].free_symbols) == 1 for s in scalars)
    assert derivations.merged(family, **options).holds
    assert derivations.restored(family, "preserving", "unit", **options).holds


@pytest.mark.parametrize("norm", NORM_AT_RESTORE)
def test_the_closed_formula_of_train_mode(norm):
    assert derivations.in_train_mode(norm, pixels=2).holds


def test_the_multipliers_of_single_kernels():
    assert multipliers.one_step("sgd", "square").holds
    assert multipliers.one_step("adamw", "absolute").holds


def test_a_signed_multiplier_is_right_for_positive_scales_only():
    derived = multipliers.one_step("adamw", "signed")
    assert not derived.holds
    scales = {s for e in derived.pairs["multiplier"][1].values.flat for s in e.free_symbols}
    assert len(scales) == 4
    positive = {s: sympy.Symbol(s.name, positive=True) for s in scales}
    for difference in derived.differences().values():
        assert not difference.with_values(positive).any()


def test_single_kernels_stay_with_their_blocks_over_many_steps():
    assert max(multipliers.distances("sgd", "square", steps=20, seed=0)) < 1e-13
    # Adam's eps is added to |s| g and to g: not quite the same number.
    assert max(multipliers.distances("adamw", "absolute", steps=20, seed=0)) < 1e-6
    for optimizer, power in (("sgd", "none"), ("sgd", "absolute"), ("adamw", "signed")):
        assert multipliers.distances(optimizer, power, steps=20, seed=0)[-1] > 1e-2


def test_zeros_between_the_layers_are_wrong_at_the_border_and_by_how_much():
    assert derivations.border_error().holds
    wrong = derivations.sequence("between").differences()
    assert not wrong["weight"].any() and not wrong["bias"].any()
    assert not wrong["output"][..., 1].any()
    assert all(e != 0 for e in wrong["output"][..., [0, 2]].values.flat)


# -- the derivations notice -----------------------------------------------------------------------
AFFINE, COMPOSED, RESIZED = Norm.affine, kernels.composed, kernels.resized
REGROUPED, UNDO, POOL = kernels.regrouped, Norm.undo, AveragePool.kernel


def eps_outside_the_root(self, dtype=torch.float64):
    layer = self.norm
    factor = layer.weight / (layer.running_var.sqrt() + layer.eps)
    return factor, layer.bias - layer.running_mean * factor


def one_bias(self, other):
    a, b = kernels.alike(self, other)
    return Kernel(a.weight + b.weight, a.bias, a.groups, a.dilation)


def zeros_between(self, end):
    return None


def dropped_bias(first, second):
    return COMPOSED(Kernel(first.weight, first.bias * 0, first.groups, first.dilation), second)


def unflipped(first, second):
    turned = Kernel(second.weight.flip((2,)), second.bias, second.groups, second.dilation)
    return COMPOSED(first, turned)


def off_centre(kernel, size, dilation):
    out = RESIZED(kernel, size, dilation)
    moved = out.weight.flip((2, 3)) if kernel.size == (1, 3) else out.weight
    if kernel.size == (1, 3):
        moved = moved.transpose(2, 3)
    return Kernel(moved, out.bias, out.groups, out.dilation)


def other_order(kernel, groups):
    out = REGROUPED(kernel, groups)
    turned = out.weight.flip((1,)) if kernel.groups > groups else out.weight
    return Kernel(turned, out.bias, out.groups, out.dilation)


def only_real_pixels(self, dtype=torch.float64):
    """As if padded zeros did not count."""
    kernel = POOL(self, dtype)
    return Kernel(kernel.weight * 1.5, kernel.bias, kernel.groups, kernel.dilation)


def eps_forgotten(self, kernel, norm, stats, bias_below):
    mean, var = stats(kernel)
    out = UNDO(self, kernel, norm, lambda k: (mean, var - self.norm.eps), bias_below)
    self.norm.running_var.copy_(var)
    return out


def divided_twice(self, kernel, norm, stats, bias_below):
    out = UNDO(self, kernel, norm, stats, bias_below)
    factor, _ = self.affine()
    return kernels.scaled(out, 1 / factor)


def without_rate(self, main, side):
    return main + side


FAULTS = {  # what is replaced, by what, and the derivation that must notice
    "eps outside the root": (Norm, "affine", eps_outside_the_root, derivations.TRANSFORMS["I"]),
    "one bias": (Kernel, "__add__", one_bias, derivations.TRANSFORMS["II"]),
    "zeros between": (Chain, "value_at_zero", zeros_between, derivations.TRANSFORMS["III"]),
    "dropped bias": (kernels, "composed", dropped_bias, lambda: derivations.merged("dbb")),
    "unflipped": (kernels, "composed", unflipped, lambda: derivations.merged("expandnet")),
    "other order": (kernels, "regrouped", other_order, derivations.TRANSFORMS["IV"]),
    "only real pixels": (AveragePool, "kernel", only_real_pixels, derivations.TRANSFORMS["V"]),
    "off centre": (kernels, "resized", off_centre, derivations.TRANSFORMS["VI"]),
    "rate": (RepBlock, "weighted", without_rate, lambda: derivations.merged("repvgg")),
    "twice": (Norm, "undo", divided_twice, lambda: derivations.restored("rep")),
    "eps": (Norm, "undo", eps_forgotten, lambda: derivations.in_train_mode("match", 2)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_leaves_a_difference(fault, monkeypatch):
    where, name, replacement, derivation = FAULTS[fault]
    monkeypatch.setattr(where, name, replacement)
    assert not derivation().holds


# -- symbols mean what torch means ----------------------------------------------------------------
def numbers(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).uniform(0.1, 2, shape).round(3))


X, W, B = numbers(2, 4, 5, 6), numbers(2, 2, 3, 2, seed=1), numbers(2, seed=2)
OPERATIONS = {  # of tensors or of symbols; every option that replib uses
    "conv2d": lambda x, w, b: F.conv2d(x, w, b, (2, 1), (1, 0), (1, 3), 2),
    "avg_pool2d": lambda x, w, b: F.avg_pool2d(x, (3, 2), (1, 2), (1, 0)),
    "batch_norm": lambda x, w, b: F.batch_norm(x[:, :2], b, b * b, b, b, eps=0.5),
    "batch_norm in training": lambda x, w, b: F.batch_norm(x[:, :2], b, b, b, b, True, 0.25, 0.5),
    "running mean": lambda x, w, b: (F.batch_norm(x[:, :2], b, w.sum((1, 2, 3)), training=True), b)[
        1
    ],
    "running variance": lambda x, w, b: (F.batch_norm(x[:, :2], b * b, b, training=True), b)[1],
    "pad": lambda x, w, b: F.pad(x, (1, 2, 0, 3)) + F.pad(x, (1, 2, 0, 3), value=0.5),
    "einsum": lambda x, w, b: torch.einsum("nchw,oijk,o->noc", x, w, b),
    "normalize": lambda x, w, b: F.normalize(w) + F.normalize(w, 1, 2).view_as(w),
    "cat": lambda x, w, b: torch.cat([x, x[:, 1:]], 1),
    "addcmul": lambda x, w, b: torch.addcmul(x, x + 1, x - 2),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_on_symbols_is_that_of_torch(name):
    """Fixed numbers that enter as symbols; in-place changes included."""
    ours = OPERATIONS[name](*(Symbolic(value) for value in (X, W, B)))
    theirs = OPERATIONS[name](X.clone(), W.clone(), B.clone())
    torch.testing.assert_close(ours.numbers({}), theirs, **EXACT)


def test_numbers_enter_as_the_fractions_that_they_stand_for():
    assert symbolic.exact(0.1) == sympy.Rational(1, 10)
    assert symbolic.exact(1 / 9) == sympy.Rational(1, 9)
    for value in (math.cos(1), 0.1 + 0.2, 1e-9):
        assert symbolic.exact(value).is_Rational and float(symbolic.exact(value)) == value


def test_an_operation_without_a_meaning_is_refused():
    with pytest.raises(NotImplementedError, match="cumsum has no meaning for symbols"):
        torch.cumsum(Symbolic.named("x", 2), 0)
    with pytest.raises(NotImplementedError, match="'reflect'"):
        F.pad(Symbolic.named("x", 1, 1, 4), (1, 1), "reflect")


@pytest.mark.parametrize("family", BLOCKS)
def test_a_block_of_symbols_is_the_block_of_numbers(family):
    torch.manual_seed(0)
    options = {"in_channels": 2, "out_channels": 2, "kernel_size": 3, "dims": 1}
    options |= SMALL.get(family, {})
    block = scrambled(BLOCKS[family](**options).double().eval())
    block.set_rate(0.3)
    twin, values = with_symbols(block)
    ours, theirs = twin.merged(), block.merged()
    torch.testing.assert_close(ours.weight.numbers(values), theirs.weight, **EXACT)
    torch.testing.assert_close(ours.bias.numbers(values), theirs.bias, **EXACT)


# -- whole blocks against plain loops -------------------------------------------------------------
def loops(piece, x):
    """What a piece computes without padding and stride, in plain loops; x is a numpy array."""
    if isinstance(piece, Chain):
        for part in piece:
            x = loops(part, x)
        return x
    if isinstance(piece, branches.Sum):
        outs = {name: loops(part, seen(x, piece, part)) for name, part in piece.branches.items()}
        main = outs.pop(piece.main)
        out = main + sum(outs.values()) * (piece.rate.item() if isinstance(piece, RepBlock) else 1)
        return out if getattr(piece, "post_norm", None) is None else loops(piece.post_norm, out)
    dims = x.ndim - 2
    if isinstance(piece, Norm):
        layer = piece.norm
        tensors = layer.weight, layer.bias, layer.running_mean, layer.running_var
        return reference.norm(x, *(t.detach().numpy() for t in tensors), layer.eps)
    weight = piece.weight.detach().double().numpy()
    if isinstance(piece, Scale):
        return x * weight.reshape(-1, *(1,) * dims)
    if isinstance(piece, AveragePool):
        return reference.average(x, weight.shape[2:], piece.dilation)
    groups = len(weight) if isinstance(piece, Filter) else piece.groups
    if isinstance(piece, Convolution) and piece.offset:
        weight = weight + reference.identity(piece.in_channels, groups, weight.shape[2:])
    if isinstance(piece, UnitFilters):
        weight = reference.unit_filters(weight)
    bias = getattr(piece, "bias", None)
    bias = np.zeros(len(weight)) if bias is None else bias.detach().numpy()
    return reference.convolve(x, weight, bias, (1,) * dims, (0,) * dims, piece.dilation, groups)


def seen(x, whole, part):
    """The middle of x that a smaller branch sees."""
    margins = [(big - e) // 2 for big, e in zip(whole.extent, part.extent, strict=True)]
    return x[(..., *(slice(m, n - m) for m, n in zip(margins, x.shape[2:], strict=True)))]


@st.composite
def blocks(draw, family):
    """A scrambled block of any geometry that its family can have, and an image."""
    dims = draw(st.integers(1, 3))

    def per_axis(low, high, step=1):
        return tuple(draw(st.integers(low, high)) * step + (step == 2) for _ in range(dims))

    groups = draw(st.integers(1, 2))
    size = per_axis(0, 1 if dims == 3 else 2, step=2) if family != "orepa_1x1" else (1,) * dims
    options = {
        "in_channels": groups * draw(st.integers(1, 2)),
        "out_channels": groups * draw(st.integers(1, 2)),
        "kernel_size": size,
        "stride": per_axis(1, 2),
        "padding": per_axis(0, 2),
        "dilation": per_axis(1, 2),
        "groups": groups,
        "dims": dims,
    }
    torch.manual_seed(0)
    try:
        block = BLOCKS[family](**options)
    except ValueError:  # the support matrix has tests of its own
        reject()
    block.set_rate(draw(st.sampled_from([0.0, 0.3, 1.0])))
    space = [
        max(d * (k - 1) + 1 - 2 * p, 1) + draw(st.integers(0, 2))
        for k, d, p in zip(size, options["dilation"], options["padding"], strict=True)
    ]
    x = torch.randn(1, options["in_channels"], *space, dtype=torch.float64)
    return scrambled(block.double().eval()), x


@pytest.mark.parametrize("family", BLOCKS)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.data())
@torch.no_grad()
def test_any_block_of_any_geometry_is_its_plain_loops(family, data):
    block, x = data.draw(blocks(family))
    g = block.geometry
    zeros = np.pad(x.numpy(), [(0, 0), (0, 0), *((p, p) for p in g.padding)])
    theirs = loops(block, zeros)[(..., *(slice(None, None, s) for s in g.stride))]
    atol = 1e-12 * max(1.0, np.abs(theirs).max())
    theirs = torch.from_numpy(np.ascontiguousarray(theirs))
    torch.testing.assert_close(block(x), theirs, rtol=0, atol=atol)
    merged = kernels.convolve(x, block.merged(), g.padding, g.stride)
    torch.testing.assert_close(merged, theirs, rtol=0, atol=atol)
