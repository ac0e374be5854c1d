"""RepMLP: no convolution, but its convolutions merge into the dense map by the same identities."""

import pytest
import torch
from test_blocks import close, scrambled

from replib.blocks.repmlp import RepMLP

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
