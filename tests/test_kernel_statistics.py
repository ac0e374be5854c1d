"""Statistics of kernels: hand-worked cases and plain loops."""

import math

import pytest
import torch
from torch import nn

from replib.analysis.kernel_statistics import (
    conversion,
    norm_slopes,
    position_magnitudes,
    positions,
    spread,
    zeroed,
)
from replib.blocks import BLOCKS

torch.set_num_threads(1)


def drawn(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_slopes_are_those_of_the_last_norm_of_a_branch():
    block = BLOCKS["dbb"](2, 3, 3)
    norms = {
        name: [m for m in branch.modules() if isinstance(m, nn.BatchNorm2d)]
        for name, branch in block.branches.items()
    }
    assert [len(found) for found in norms.values()] == [1, 1, 2, 2]
    for i, found in enumerate(norms.values()):
        for j, norm in enumerate(found):
            norm.weight.data = torch.arange(len(norm.weight)) - 10.0 * i - 100.0 * j
    slopes = norm_slopes(nn.Sequential(block, BLOCKS["orepa"](3, 3, 3)))
    assert list(slopes) == ["0"], "scales are no norms"
    for i, (name, found) in enumerate(norms.items()):
        last = len(found) - 1
        expected = [abs(c - 10.0 * i - 100.0 * last) for c in range(3)]
        assert slopes["0"][name].tolist() == expected


def test_magnitudes_are_relative_to_the_largest_of_every_layer():
    first, second = nn.Conv2d(2, 3, 3, bias=False), nn.Conv2d(3, 2, 3, bias=False)
    for conv, seed in ((first, 0), (second, 1)):
        conv.weight.data = drawn(*conv.weight.shape, seed=seed) * 10**seed
    network = nn.Sequential(first, nn.Conv2d(3, 3, 1), second, nn.Conv2d(2, 2, 5))
    expected = torch.zeros(3, 3, dtype=torch.float64)
    for conv in (first, second):
        sums = [[0.0] * 3 for _ in range(3)]
        for filters in conv.weight.detach():
            for plane in filters:
                for h in range(3):
                    for w in range(3):
                        sums[h][w] += abs(plane[h, w].item())
        largest = max(map(max, sums))
        expected += torch.tensor(sums, dtype=torch.float64) / largest / 2
    torch.testing.assert_close(position_magnitudes(network), expected, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"size \(=7\)"):
        position_magnitudes(network, 7)


def test_places_of_a_kernel():
    assert positions((3, 3), "corners").int().tolist() == [[1, 0, 1], [0, 0, 0], [1, 0, 1]]
    assert positions((3, 3), "skeleton").int().tolist() == [[0, 1, 0], [1, 1, 1], [0, 1, 0]]
    assert positions((5, 5), "skeleton").sum() == 9 and positions((5, 5), "anywhere").all()


@pytest.mark.parametrize("place", ["corners", "skeleton", "anywhere"])
def test_zeroed_weights_are_so_many_and_there(place):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 6, 5, groups=2))
    network = network.to(memory_format=torch.channels_last)
    before = [p.detach().clone() for p in network.parameters()]
    found = zeroed(network, place, 0.25, seeded())
    for layer in (0, 2):
        weight, old = found[layer].weight, network[layer].weight
        gone = weight == 0
        assert gone.sum() == round(0.25 * weight.numel())
        assert not gone[..., ~positions(weight.shape[2:], place)].any()
        assert torch.equal(weight[~gone], old[~gone])
        assert gone.flatten(1).any(1).all(), "not all of them in a few filters"
    assert torch.equal(found[1].weight, network[1].weight)
    assert all(map(torch.equal, before, network.parameters())), "the network itself stays"
    again, other = zeroed(network, place, 0.25, seeded()), torch.Generator().manual_seed(1)
    assert torch.equal(again[0].weight, found[0].weight)
    assert not torch.equal(zeroed(network, place, 0.25, other)[0].weight, found[0].weight)


def test_what_cannot_be_zeroed():
    network = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv1d(2, 2, 3))
    found = zeroed(network, "corners", 4 / 9, seeded())
    assert found[1].weight.count_nonzero() == 12, "a line has no corners"
    with pytest.raises(ValueError, match=r"share \(=0.5\) of 0 must be between 0 and 0.4444"):
        zeroed(network, "corners", 0.5, seeded())
    with pytest.raises(ValueError, match=r"place \(='edge'\) must be one of corners"):
        zeroed(network, "edge", 0.1, seeded())


def test_steps_of_a_conversion():
    """RepVGG by hand: the norm scales filters; what is added lies in the centre."""
    torch.manual_seed(0)
    block = BLOCKS["repvgg"](4, 4, 3).double().eval()
    for m in block.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.uniform_(m.running_var, 0.5, 1.5)
    found = conversion(block)
    dense, norm = block.main_branch[0].weight.detach(), block.main_branch[1].norm
    assert torch.equal(found["trained"], dense)
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    folded = dense * scale.detach().view(-1, 1, 1, 1)
    torch.testing.assert_close(found["folded"], folded, rtol=0, atol=1e-12)
    torch.testing.assert_close(found["deployed"], block.merged().weight, rtol=0, atol=1e-12)
    before, after = spread(found["folded"]), spread(found["deployed"])
    assert before["surrounding"] == pytest.approx(after["surrounding"], abs=1e-12)
    assert after["centre"] > 1.5 * before["centre"]


def test_a_norm_behind_the_sum_is_folded_too():
    block = BLOCKS["convbn"](2, 2, 3, norms="sum").double().eval()
    nn.init.constant_(block.post_norm.norm.weight, 3.0)
    found = conversion(block)
    torch.testing.assert_close(found["folded"], found["deployed"], rtol=0, atol=1e-12)
    torch.testing.assert_close(
        found["folded"], found["trained"] * 3 / math.sqrt(1 + 1e-5), rtol=0, atol=1e-12
    )
    many = conversion(BLOCKS["orepa_stem"](2, 2, 7).double().eval())
    assert list(many) == ["folded", "deployed"], "its main branch is no single convolution"


def test_the_spread_is_the_deviation_of_the_parts():
    weight = drawn(3, 2, 3, 5)
    flat = {"overall": [], "centre": [], "surrounding": []}
    for plane in weight.flatten(0, 1):
        for h in range(3):
            for w in range(5):
                part = "centre" if (h, w) == (1, 2) else "surrounding"
                flat[part].append(plane[h, w].item())
                flat["overall"].append(plane[h, w].item())
    for name, values in flat.items():
        mean = sum(values) / len(values)
        expected = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
        assert spread(weight)[name] == pytest.approx(expected, abs=1e-12)
