"""A block that no other file knows, declared in a few lines, inherits everything."""

import copy

import pytest
import test_blocks
import torch
from torch import nn

from replib import convert, fuse, kernels, verify
from replib.blocks import BLOCKS
from replib.blocks.block import Geometry, RepBlock
from replib.branches import Chain, Convolution, Norm, Piece, Sum
from replib.checkpoint import load_model, save_model
from replib.report.diagram import diagram


class Odd(RepBlock):  # a nested chain with an inner norm, a sum in a chain, a shared post-norm
    main_name = "wide"
    post_normed = True

    def declare(self, g: Geometry, inner: int = 12):
        first = Chain(g.conv(1, out_channels=inner, bias=True), g.norm(inner))
        deep = Chain(first, g.conv(in_channels=inner), g.norm())
        pool = Sum({"mean": g.average_pool(), "itself": g.identity(g.out_channels)}, "mean")
        pool = Chain(g.conv(1), pool)
        return {"wide": Chain(g.conv(), g.norm()), "deep": deep, "pool": pool}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(BLOCKS, "odd", Odd)


CASES = ["plain", "wider", "grouped", "strided", "dilated", "wide padding", "1-D", "3-D, mixed"]


@pytest.mark.parametrize("case", CASES)
def test_it_merges_deploys_and_is_restored(case):
    test_blocks.test_the_merged_kernel_computes_the_block("odd", case)
    test_blocks.test_deployment_is_one_plain_convolution("odd", case)
    test_blocks.test_restoring_reaches_any_kernel("odd", case)
    test_blocks.test_matched_statistics_keep_the_training_output_too("odd", case)


def test_it_keeps_every_other_promise():
    test_blocks.test_redrawing_touches_the_side_branches_only_and_repeats("odd")
    test_blocks.test_a_checkpoint_carries_everything_that_matters("odd")
    test_blocks.test_a_dead_slope_is_replaced_before_it_divides("odd")
    test_blocks.test_gradients_flow_through_the_merge("odd")
    test_blocks.test_float32_blocks_fold_in_float64("odd")


@torch.no_grad()
def test_it_is_drawn_saved_and_put_into_a_network(tmp_path):
    block = test_blocks.scrambled(BLOCKS["odd"](4, 6, inner=8).eval())
    picture = diagram(block)
    assert picture.count("<rect") == sum(1 for m in block.modules() if is_leaf(m)) == 10
    assert all(f">{name}<" in picture for name in ("wide", "deep", "pool", "mean", "itself"))

    block.set_rate(0.3)
    save_model(nn.Sequential(block, nn.ReLU()), tmp_path / "odd.safetensors")
    again = load_model(tmp_path / "odd.safetensors")
    x = torch.randn(2, 4, 9, 9)
    assert isinstance(again[0], Odd) and torch.equal(again[0](x), block(x))

    plain = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)).eval()
    converted = convert(plain, "odd")
    test_blocks.close(converted(x), plain(x), 1e-5)
    assert verify(converted, fuse(converted), x).ok


def is_leaf(module):
    return isinstance(module, Piece) and not isinstance(module, Chain | Sum)


@torch.no_grad()
def test_a_block_may_be_a_piece_of_another():
    """As DyRep grows them: the inner block takes its kernel, and is drawn anew as a whole."""
    outer = BLOCKS["dyrep"](6, 12, 3, stride=2, groups=2).double()
    outer.branches["kxk"][0] = BLOCKS["dyrep"](6, 12, 3, groups=2)
    outer.branches["1x1_kxk"][2] = BLOCKS["dyrep"](6, 12, 3, groups=2)
    outer = test_blocks.scrambled(outer.double().eval())
    outer.branches["kxk"][0].set_rate(0.4)
    x = torch.randn(2, 6, 9, 10, dtype=torch.float64)
    test_blocks.close(test_blocks.applied(outer, outer.merged(), x), outer(x))

    target = test_blocks.like(outer.merged())
    for norm in ("unit", "reset"):
        outer.restore(target, "preserving", norm=norm)
        test_blocks.close(outer.merged().weight, target.weight, 1e-11)
        test_blocks.close(outer.merged().bias, target.bias, 1e-11)

    before = copy.deepcopy(outer)
    outer.redraw("repan", torch.Generator().manual_seed(3))
    inside = "branches.1x1_kxk.2.branches.kxk.0.weight"
    assert not torch.equal(outer.state_dict()[inside], before.state_dict()[inside])
    kept = "branches.kxk.0.branches.1x1.0.weight"
    assert torch.equal(outer.state_dict()[kept], before.state_dict()[kept])


def test_trees_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="Convolution gives 4 channels, Norm after it takes 5"):
        Chain(Convolution(3, 4, (3, 3)), Norm(5, 2))
    with pytest.raises(ValueError, match="branch 'b' maps 3 channels to 5, the others 3 to 4"):
        Sum({"a": Convolution(3, 4, (3, 3)), "b": Convolution(3, 5, (1, 1))}, "a")
    with pytest.raises(ValueError, match=r"branch 'b' of extent .* cannot be centred"):
        Sum({"a": Convolution(3, 4, (3, 3)), "b": Convolution(3, 4, (2, 2))}, "a")


def test_a_squeezed_kernel_is_made_in_full_precision_under_autocast():
    """One convolution is rounded, not the chain of kernels that makes its weight."""
    block = test_blocks.scrambled(BLOCKS["orepa"](8, 8, 3).eval())
    x = torch.randn(2, 8, 9, 9)
    kernel = block.branches_kernel(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = block.post_norm(kernels.convolve(x, kernel, (1, 1)))
        y = block(x)
        y.float().sum().backward()
    assert torch.equal(y, expected)
    assert all(p.grad is not None for p in block.parameters())
