"""RepMLP: no convolution, but its convolutions merge into the dense map by the same identities."""

import pytest
import torch
from test_blocks import close, scrambled

from replib.blocks.repmlp import RepMLP
from replib.branches import Norm

torch.set_num_threads(1)


def build(**options):
    torch.manual_seed(0)
    return scrambled(RepMLP(8, 3, 4, **options).double().eval())


@pytest.mark.parametrize("sets, sizes", [(2, (1, 3)), (8, (3, 5)), (1, ()), (4, (1,))])
@torch.no_grad()
def test_the_merged_map_computes_the_affine_part(sets, sizes):
    layer = build(sets=sets, sizes=sizes)
    x = torch.randn(5, sets, 3, 4, dtype=torch.float64)
    merged = layer.merged()
    assert merged.weight.shape == (sets * 12, 12, 1, 1)
    # By hand: output (s, p) is the sum over q of weight[s p, q] times pixel q of set s.
    weight = merged.weight.view(sets, 12, 12)
    expected = torch.einsum("spq,msq->msp", weight, x.flatten(2)) + merged.bias.view(sets, 12)
    close(layer.window_map(x).flatten(2), expected)


@torch.no_grad()
def test_every_window_and_channel_is_mapped_on_its_own():
    """What the released order mixes up with several windows and fewer sets than channels."""
    layer = build(sets=2)
    x = torch.randn(2, 8, 6, 8, dtype=torch.float64)
    gate = layer.expand(layer.reduce(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
    expected = torch.empty_like(x)
    for q in range(4):
        for top in (0, 3):
            for left in (0, 4):
                window = (slice(None), slice(2 * q, 2 * q + 2), slice(top, top + 3))
                window = (*window, slice(left, left + 4))
                expected[window] = layer.window_map(x[window])
    close(layer(x), expected * gate)


@torch.no_grad()
def test_the_released_order_agrees_where_it_is_right():
    """With one window, or as many sets as channels."""
    for sets, space in ((2, (3, 4)), (8, (6, 8))):
        ours, theirs = build(sets=sets), build(sets=sets, official_order=True)
        x = torch.randn(2, 8, *space, dtype=torch.float64)
        close(ours(x), theirs(x))
    mixed = build(sets=2, official_order=True)
    x = torch.randn(2, 8, 6, 8, dtype=torch.float64)
    assert (mixed(x) - build(sets=2)(x)).abs().max() > 0.1


def test_bad_input_is_told_in_one_line():
    with pytest.raises(ValueError, match=r"channels \(=8\) must be divisible by sets \(=3\)"):
        RepMLP(8, 3, 4, sets=3)
    with pytest.raises(ValueError, match=r"the map \(7 x 8\) must be a multiple of h x w"):
        build()(torch.zeros(1, 8, 7, 8, dtype=torch.float64))


@pytest.mark.parametrize(
    "options",
    [
        {"sets": 2},
        {"sets": 2, "gated": False},
        {"sets": 8, "bias": True, "sizes": (3,)},
        {"sets": 1, "gated": False, "bias": True, "norm": False, "sizes": ()},
        {"sets": 1, "gated": False, "bias": True, "norm": False},
    ],
    ids=str,
)
@torch.no_grad()
def test_the_deployed_block_computes_the_same_without_norms_and_convolutions(options):
    layer = build(**options)
    if layer.dense.bias is not None:
        layer.dense.bias.normal_()
    plain, x = layer.deploy(), torch.randn(2, 8, 6, 8, dtype=torch.float64)
    close(plain(x), layer(x))
    assert hasattr(plain, "expand") == options.get("gated", True)
    assert not list(plain.local) and not any(isinstance(m, Norm) for m in plain.modules())


@torch.no_grad()
def test_the_parts_add_up_and_a_convolution_is_local():
    layer = build(sets=2, bias=True)
    parts, merged = layer.parts(), layer.merged()
    assert list(parts) == ["dense", "1x1", "3x3"]
    close(sum(kernel.weight for kernel in parts.values()), merged.weight)
    close(sum(kernel.bias for kernel in parts.values()), merged.bias)
    weight = parts["3x3"].weight.view(2, 3, 4, 3, 4)  # set, output row and column, input's
    kernel = layer.local["3"].kernel().weight
    for row in range(3):
        for column in range(4):
            for i in range(3):
                for j in range(4):
                    near = abs(i - row) <= 1 and abs(j - column) <= 1
                    wanted = kernel[:, 0, i - row + 1, j - column + 1] if near else torch.zeros(2)
                    close(weight[:, row, column, i, j], wanted.double())


@torch.no_grad()
def test_memory_in_channels_last_changes_nothing():
    layer, x = build(sets=2), torch.randn(2, 8, 6, 8, dtype=torch.float64)
    close(layer(x.contiguous(memory_format=torch.channels_last)), layer(x))
