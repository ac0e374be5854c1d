"""Every block, whatever its branches, keeps the promises of the block contract.

Adding a family to BLOCKS is all it takes to have it tested here.
"""

import copy
import io
import math
import pickle
from itertools import product

import pytest
import torch
from torch import nn

from replib import kernels
from replib.blocks import BLOCKS, support
from replib.blocks.block import FEATURES
from replib.branches import NORM_AT_RESTORE, Convolution, Norm

torch.set_num_threads(1)
EXACT = 1e-12  # of the largest number: float64, sums of some thousand terms
GEOMETRIES = {  # together they have every feature and every mix that once was a bug somewhere
    "plain": {},
    "wider": {"out_channels": 12},
    "narrower": {"in_channels": 12},
    "strided": {"stride": 2},
    "grouped": {"groups": 2, "out_channels": 12},
    "depthwise": {"groups": 6},
    "depthwise, wider": {"groups": 6, "out_channels": 12},
    "dilated": {"dilation": 2},
    "kernel 1": {"kernel_size": 1},
    "kernel 5": {"kernel_size": 5},
    "kernel 4": {"kernel_size": 4, "padding": 1},
    "valid": {"kernel_size": 5, "padding": 0},
    "half valid": {"kernel_size": 5, "padding": 1, "stride": 2},
    "wide padding": {"padding": 3},
    "rectangular": {"kernel_size": (3, 5), "stride": (2, 1), "padding": (0, 3), "dilation": (1, 2)},
    "reflect": {"padding_mode": "reflect", "stride": 2, "kernel_size": (3, 5)},
    "circular": {"padding_mode": "circular", "groups": 2},
    "1-D": {"dims": 1, "stride": 2, "dilation": 2, "groups": 3},
    "1-D, kernel 1": {"dims": 1, "kernel_size": 1, "groups": 2, "stride": 2},
    "3-D": {"dims": 3, "groups": 2},
    "3-D, kernel 1": {"dims": 3, "kernel_size": 1, "groups": 6},
    "3-D, mixed": {"dims": 3, "kernel_size": (1, 3, 5), "stride": (1, 2, 1), "padding": (1, 0, 2)},
}
DEFAULTS = {"in_channels": 6, "out_channels": 6, "kernel_size": 3}


def tried(family, case):
    """The block, or the error that refuses it."""
    try:
        return BLOCKS[family](**DEFAULTS | GEOMETRIES[case])
    except ValueError as error:
        return error


TRIED = {(family, case): tried(family, case) for family in BLOCKS for case in GEOMETRIES}


FAST = (  # the other geometries are in the slow tier
    "plain", "strided", "grouped", "depthwise, wider", "valid", "rectangular", "circular", "1-D",
    "3-D, mixed",
)  # fmt: skip


def cells(wanted):
    """The cells of the support matrix with a wanted outcome."""
    return [
        pytest.param(*cell, id="-".join(cell), marks=() if cell[1] in FAST else pytest.mark.slow)
        for cell, made in TRIED.items()
        if wanted(made)
    ]


CASES = cells(lambda made: not isinstance(made, ValueError))
REFUSED = cells(lambda made: isinstance(made, ValueError))
INVERTIBLE = cells(lambda made: getattr(made, "invertible", False))
CAN_INVERT = sorted({param.values[0] for param in INVERTIBLE})


def scrambled(module, seed=0):
    """Norms and scales at random: a fresh norm is the identity and hides a wrong fusion."""
    generator = torch.Generator().manual_seed(seed)
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            for tensor, low, high in (
                (layer.weight, 0.2, 1.5),
                (layer.bias, -0.3, 0.3),
                (layer.running_mean, -0.3, 0.3),
                (layer.running_var, 0.5, 2.0),
            ):
                with torch.no_grad():
                    tensor.uniform_(low, high, generator=generator)
            with torch.no_grad():  # a negative slope is legal
                layer.weight[0].neg_()
        elif isinstance(layer, Convolution):
            with torch.no_grad():  # zero offsets hide as much
                layer.weight.add_(torch.randn(layer.weight.shape, generator=generator) * 0.1)
    return module


def build(family, case, seed=0):
    """A scrambled float64 block in eval mode, and an input."""
    torch.manual_seed(seed)
    arguments = DEFAULTS | GEOMETRIES[case]
    block = BLOCKS[family](**arguments)
    space = (9, 10, 8)[: arguments.get("dims", 2)]  # odd and even: padding shows up
    x = torch.randn(3, arguments["in_channels"], *space, dtype=torch.float64)
    return scrambled(block.double().eval(), seed), x


def close(ours, theirs, bound=EXACT, what=""):
    error = (ours - theirs).abs().max().item()
    assert error <= bound * max(1.0, theirs.abs().max().item()), f"{what} {error:.1e}"


def like(kernel, seed=5):
    """A random kernel of the same form."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (kernel.weight.shape, kernel.bias.shape)
    values = (torch.randn(s, generator=generator, dtype=kernel.bias.dtype) for s in shapes)
    return kernels.Kernel(*values, kernel.groups, kernel.dilation)


def applied(block, kernel, x):
    """The kernel in the geometry of the block."""
    g = block.geometry
    padding = g.padding
    if block.padding_mode != "zeros":
        amounts = [amount for p in reversed(padding) for amount in (p, p)]
        x, padding = nn.functional.pad(x, amounts, block.padding_mode), (0,) * g.dims
    return kernels.convolve(x, kernel, padding, g.stride)


# -- merging --------------------------------------------------------------------------------------
@pytest.mark.parametrize("family, case", CASES)
@torch.no_grad()
def test_the_merged_kernel_computes_the_block(family, case):
    block, x = build(family, case)
    for rate in (0.0, 0.3, 1.0):
        block.set_rate(rate)
        close(applied(block, block.merged(), x), block(x))
    assert block(x).std() > 1e-3  # two zeros would agree as well
    block.set_rate(0.3)
    fixed = block.merged(rate=1.0)
    block.set_rate(1.0)
    assert torch.equal(block.merged().weight, fixed.weight)


@pytest.mark.parametrize("family, case", CASES)
@torch.no_grad()
def test_deployment_is_one_plain_convolution(family, case):
    block, x = build(family, case)
    block.set_rate(0.3)
    conv = block.deploy()
    g = block.geometry
    assert type(conv) in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    assert (conv.padding, conv.stride, conv.dilation) == (g.padding, g.stride, g.dilation)
    close(conv(x), block(x))
    single = block.float()
    assert single.deploy().weight.dtype == single.merged().weight.dtype == torch.float32


@pytest.mark.parametrize("family", BLOCKS)
def test_float32_blocks_fold_in_float64(family):
    block, _ = build(family, plain(family))
    merged, exact = block.float().merged(), copy.deepcopy(block).double().merged()
    assert torch.equal(merged.weight, exact.weight.float())
    assert torch.equal(merged.bias, exact.bias.float())


# -- restoring ------------------------------------------------------------------------------------
@pytest.mark.parametrize("family, case", INVERTIBLE)
@torch.no_grad()
def test_restoring_reaches_any_kernel(family, case):
    block, x = build(family, case)
    target = like(block.merged())
    statistics = measured(block, x)
    ways = [("official", 0.0), ("preserving", 0.0), ("preserving", 0.3)]
    if block.squeezed:  # its branches are one convolution: there is nothing to put on top
        ways.append(("official", 0.3))
    for norm, (fidelity, rate) in product(NORM_AT_RESTORE, ways):
        block.redraw("repan", torch.Generator().manual_seed(1))
        block.set_rate(rate)
        block.restore(target, fidelity, norm=norm, stats=statistics)
        # A slope divides, and multiplies again.
        close(block.merged().weight, target.weight, 1e-11, f"{norm}, {fidelity}, {rate}")
        close(block.merged().bias, target.bias, 1e-11, f"{norm}, {fidelity}, {rate}")


def measured(block, x):
    def statistics(kernel):
        y = applied(block, kernel, x).transpose(0, 1).flatten(1)
        return y.mean(1), y.var(1, unbiased=False)

    return statistics


@pytest.mark.parametrize("family, case", INVERTIBLE)
@torch.no_grad()
def test_matched_statistics_keep_the_training_output_too(family, case):
    block, x = build(family, case)
    target = like(block.merged())
    block.set_rate(0.0)  # the norms of the side branches have statistics of their own
    block.restore(target, "preserving", norm="match", stats=measured(block, x))
    close(block.train()(x), applied(block, target, x), 1e-9)  # divides by a deviation twice


def plain(family):
    """The first case that the family can do."""
    return "kernel 1" if "larger kernel" in BLOCKS[family].cannot else "plain"


@pytest.mark.parametrize("family", CAN_INVERT)
@torch.no_grad()
def test_a_dead_slope_is_replaced_before_it_divides(family):
    block, _ = build(family, plain(family))
    norms = [layer for layer in block.modules() if isinstance(layer, Norm)]
    for layer in norms:
        layer.norm.weight.zero_()
    target = like(block.merged())
    block.set_rate(0.0)
    block.restore(target, norm="keep")
    assert all(value.isfinite().all() for value in block.state_dict().values())
    close(block.merged().weight, target.weight, 1e-11)


@pytest.mark.parametrize("family", sorted(set(BLOCKS) - set(CAN_INVERT)))
def test_what_cannot_be_inverted_says_so(family):
    block, _ = build(family, plain(family))
    before = copy.deepcopy(block.state_dict())
    with pytest.raises(TypeError, match="cannot take a kernel: its main branch"):
        block.restore(block.merged())
    assert all(torch.equal(value, before[key]) for key, value in block.state_dict().items())


@pytest.mark.parametrize("family", CAN_INVERT)
def test_wrong_requests_to_restore_are_refused(family):
    block, _ = build(family, plain(family))
    kernel = block.merged()
    with pytest.raises(ValueError, match=r"fidelity \(='exact'\) must be"):
        block.restore(kernel, "exact")
    with pytest.raises(ValueError, match=r"norm \(='zero'\) must be one of keep, unit"):
        block.restore(kernel, norm="zero")
    with pytest.raises(ValueError, match="needs `stats`"):
        block.restore(kernel, norm="match")


# -- drawing anew ---------------------------------------------------------------------------------
@pytest.mark.parametrize("family", BLOCKS)
@torch.no_grad()
def test_redrawing_touches_the_side_branches_only_and_repeats(family):
    block, _ = build(family, plain(family))
    before = copy.deepcopy(block.state_dict())
    block.redraw("repan", torch.Generator().manual_seed(7))
    first = copy.deepcopy(block.state_dict())
    main = f"branches.{block.main}."
    for key, value in before.items():
        if key.startswith((main, "post_norm", "rate")) or "running" in key:
            assert torch.equal(first[key], value), key
    for branch in block.side_branches.values():
        for piece in branch.modules():
            if isinstance(piece, Convolution) and not piece.starts_as_identity:
                bound = 0.1 / math.sqrt(piece.out_channels)
                assert 0.5 * bound < piece.weight.abs().max() <= bound
            if isinstance(piece, Norm):
                assert (piece.norm.weight == 1).all() and (piece.norm.bias == 0).all()
    block.redraw("repan", torch.Generator().manual_seed(7))
    assert all(torch.equal(value, first[key]) for key, value in block.state_dict().items())
    if block.side_branches:
        block.redraw("repan", torch.Generator().manual_seed(8))
        again = block.state_dict()
        drawn = any(not torch.equal(value, first[key]) for key, value in again.items())
        assert drawn == any(isinstance(p, Convolution) for p in side_pieces(block))
    block.redraw("fan_out", torch.Generator().manual_seed(7))
    for branch in block.side_branches.values():
        norms = [piece for piece in branch.modules() if isinstance(piece, Norm)]
        for piece in norms:
            assert (piece.norm.running_mean == 0).all() and (piece.norm.running_var == 1).all()
        if norms:
            assert (norms[-1].norm.weight == 0.01).all()
    with pytest.raises(ValueError, match=r"rule \(='wild'\) must be one of"):
        block.redraw("wild")


def side_pieces(block):
    return [piece for branch in block.side_branches.values() for piece in branch.modules()]


# -- state ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", BLOCKS)
@torch.no_grad()
def test_a_checkpoint_carries_everything_that_matters(family):
    block, x = build(family, plain(family))
    block.set_rate(0.3)
    file = io.BytesIO()
    torch.save(block.state_dict(), file)
    file.seek(0)
    other, _ = build(family, plain(family), seed=1)
    if block.side_branches:
        assert not torch.equal(other(x), block(x))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), block(x))
    assert other.rate == 0.3
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(twin(x), block(x))
        twin.set_rate(1.0)
        assert block.rate == 0.3


@pytest.mark.parametrize("family", BLOCKS)
def test_gradients_flow_through_the_merge(family):
    """The loss of the merged kernel has the gradients that the block itself has in eval mode."""
    block, x = build(family, plain(family))
    block.set_rate(0.7)
    parameters = {name: p for name, p in block.named_parameters() if p.requires_grad}

    def gradients(y):
        return torch.autograd.grad(y.square().sum(), parameters.values(), allow_unused=True)

    through_kernel = gradients(applied(block, block.merged(), x))
    for name, ours, theirs in zip(parameters, through_kernel, gradients(block(x)), strict=True):
        assert ours is not None, f"{name} does not reach the merged kernel"
        if "branches" in name and not inner(block, name):
            close(ours, theirs, 1e-10)  # squared outputs: sums of large numbers
    trained = block.train()(x)
    assert all(g is not None for g in gradients(trained))


def inner(block, name):
    """Whether a parameter lies before a padded inner norm, whose border has no gradient."""
    _, branch, position, *_ = name.split(".")
    chain = block.branches[branch]
    return position.isdigit() and any(
        isinstance(module, Norm) for piece in chain[:-1] for module in piece.modules()
    )


# -- bad input ------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", BLOCKS)
@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"groups": 4}, r"in_channels \(=6\) and out_channels \(=6\) must be divisible by groups"),
        ({"dims": 4}, r"dims \(=4\) must be 1, 2 or 3"),
        ({"kernel_size": 0}, r"kernel_size \(=0\) must be an integer of at least 1"),
        ({"stride": (1, 2, 3)}, r"stride \(=\(1, 2, 3\)\) must be an integer .* or 2 of them"),
        ({"padding": -1}, r"padding \(=-1\) must be an integer of at least 0"),
        ({"padding_mode": "mirror"}, r"padding_mode \(='mirror'\) must be one of zeros, reflect"),
        ({"colour": 3}, r"has no option 'colour'; its options: "),
    ],
)
def test_bad_input_is_told_in_one_line(family, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        BLOCKS[family](**{"in_channels": 6, "out_channels": 6} | arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family, case", REFUSED)
def test_what_a_family_cannot_do_it_refuses_with_the_reason(family, case):
    message = str(TRIED[family, case])
    refused = [f for f, reason in BLOCKS[family].cannot.items() if f"no {f}" in message]
    assert len(refused) == 1 and BLOCKS[family].cannot[refused[0]] in message
    assert "\n" not in message and "kernel_size=" in message


def test_every_cell_of_the_support_matrix_is_tested():
    """A yes has a geometry with that feature that works; a no has one that is refused."""
    geometries = {case: BLOCKS["convbn"](**DEFAULTS | GEOMETRIES[case]) for case in GEOMETRIES}
    for family, row in support().items():
        assert set(BLOCKS[family].cannot) <= set(FEATURES) == set(row)
        for feature, answer in row.items():
            outcomes = [
                isinstance(TRIED[family, case], ValueError)
                for case, plain in geometries.items()
                if FEATURES[feature](plain.geometry)
            ]
            assert (all if answer != "yes" else any)(
                refused == (answer != "yes") for refused in outcomes
            ), (family, feature)
