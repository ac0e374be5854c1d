"""The metric that branches put on the merged kernel: by hand, and against real steps of SGD."""

import copy

import pytest
import torch
from torch import nn

from replib.analysis import merged_gradient
from replib.analysis.precision import exact_input, stack
from replib.blocks import BLOCKS
from replib.branches import Convolution, Scale

EXACT = {"rtol": 0, "atol": 1e-12}  # float64, values of order 1


def scrambled(family, channels=4):
    x = exact_input((4, channels, 6, 6), 0)
    return stack(family, 1, 1 if family == "orepa_1x1" else 3, x, 0)[0]


def gradient_like(weight, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(weight.shape, generator=generator, dtype=torch.float64)


def slope(branch):
    norm = branch[-1].norm
    return (norm.weight / (norm.running_var + norm.eps).sqrt()).detach().square().view(-1, 1, 1, 1)


@torch.no_grad()
def test_repvgg_learns_faster_at_its_centre_by_hand():
    block = scrambled("repvgg")
    expected = slope(block.branches["dense"]).expand(4, 4, 3, 3).clone()
    expected[..., 1:2, 1:2] += slope(block.branches["1x1"])
    torch.testing.assert_close(merged_gradient.multiplier(block), expected, **EXACT)
    g = gradient_like(expected)  # sums of convolutions: the metric is a diagonal
    torch.testing.assert_close(merged_gradient.preconditioned(block, g), expected * g, **EXACT)


@torch.no_grad()
def test_acb_learns_faster_along_its_skeleton_by_hand():
    block = scrambled("acb")
    expected = slope(block.branches["square"]).expand(4, 4, 3, 3).clone()
    expected[..., :, 1:2] += slope(block.branches["axis0"])
    expected[..., 1:2, :] += slope(block.branches["axis1"])
    torch.testing.assert_close(merged_gradient.multiplier(block), expected, **EXACT)


@torch.no_grad()
def test_lambda_enters_squared():
    block = scrambled("repvgg")
    whole = merged_gradient.multiplier(block)
    block.set_rate(0.5)
    half = merged_gradient.multiplier(block)
    dense = slope(block.branches["dense"])
    torch.testing.assert_close(half - dense, (whole - dense) / 4, **EXACT)


@torch.no_grad()
def test_constant_scales_are_the_multiplier_of_repoptimizers():
    """s_conv^2 everywhere, s_1x1^2 more in the centre (ICLR 2023, section 3.1); no norm here."""
    block = BLOCKS["csla"](4, 8, trainable_scales=False).double().eval()
    block.post_norm = None
    for piece in block.modules():
        if isinstance(piece, Scale):
            nn.init.uniform_(piece.weight, -1.5, 1.5)
    conv, pointwise = (block.branches[n][1].weight.view(-1, 1, 1, 1) for n in ("conv", "1x1"))
    expected = conv.square().expand(8, 4, 3, 3).clone()
    expected[..., 1:2, 1:2] += pointwise.square()
    torch.testing.assert_close(merged_gradient.multiplier(block), expected, **EXACT)


@pytest.mark.parametrize("which", merged_gradient.PARAMETERS)
@pytest.mark.parametrize("family", BLOCKS)
def test_a_small_step_of_sgd_is_the_preconditioned_one(family, which):
    block = scrambled(family)
    before = block.kernel().weight.detach()
    g = gradient_like(before)
    kernels = {id(m.weight) for m in block.modules() if isinstance(m, Convolution)}
    errors = []
    for rate in (1e-4, 1e-5):
        stepped = copy.deepcopy(block)
        (stepped.kernel().weight * g).sum().backward()  # dL/dK = g
        with torch.no_grad():
            for ours, parameter in zip(block.parameters(), stepped.parameters(), strict=True):
                if parameter.grad is not None and (which == "all" or id(ours) in kernels):
                    parameter.sub_(rate * parameter.grad)
            moved = (stepped.kernel().weight - before) / -rate
        predicted = merged_gradient.preconditioned(block, g, which)
        errors.append(((moved - predicted).norm() / predicted.norm()).item())
    # What is left is of second order, so it falls with the rate, down to rounding.
    assert errors[1] < max(0.15 * errors[0], 1e-9) and errors[0] < 0.05


@pytest.mark.parametrize("family", ["dbb", "orepa"])
def test_the_multiplier_is_the_diagonal(family):
    block = scrambled(family)
    diagonal = merged_gradient.multiplier(block)
    for index in ((0, 0, 1, 1), (3, 2, 0, 2)):
        unit = torch.zeros_like(diagonal)
        unit[index] = 1
        assert merged_gradient.preconditioned(block, unit)[index] == pytest.approx(
            diagonal[index].item(), rel=1e-12
        )
    g = gradient_like(diagonal)  # products of convolutions: not a diagonal any more
    whole = merged_gradient.preconditioned(block, g)
    assert (whole - diagonal * g).norm() > 0.1 * whole.norm()


def test_wrong_requests_are_refused():
    with pytest.raises(ValueError, match=r"which \(='some'\) must be one of convolutions, all"):
        merged_gradient.multiplier(scrambled("repvgg"), "some")


def test_by_tap_keeps_the_space():
    values = torch.arange(2 * 3 * 9.0).view(2, 3, 3, 3)
    taps = merged_gradient.by_tap(values)
    assert taps.shape == (3, 3) and taps[0, 1] == values[:, :, 0, 1].mean()
