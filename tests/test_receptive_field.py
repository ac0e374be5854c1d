"""The effective receptive field against plain loops and against what theory says of it."""

import math
import re

import pytest
import torch
from conftest import at_home
from torch import nn

from replib.analysis.receptive_field import area, receptive_field, report, shares
from replib.blocks.repmlp import RepMLP
from replib.report.receptive_figures import MISSING, Fields
from replib.report.results import Results

torch.set_num_threads(1)


def drawn(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_the_field_of_a_convolution_is_its_kernel():
    """Only outputs that are positive count, and of their gradients the positive parts."""
    conv = nn.Conv2d(2, 3, (3, 5), padding=(1, 2)).double().eval()
    x = drawn(4, 2, 7, 9)
    expected = torch.zeros(7, 9, dtype=torch.float64)
    with torch.no_grad():
        centre = conv(x)[:, :, 3, 4]
        for image in range(4):
            for channel in range(2):
                gradient = torch.zeros(3, 5, dtype=torch.float64)
                for out in range(3):
                    if centre[image, out] > 0:
                        gradient += conv.weight[out, channel]
                expected[2:5, 2:7] += gradient.clamp(min=0)
    found = receptive_field(conv, [x[:3], x[3:]])
    torch.testing.assert_close(found, expected / 4, rtol=0, atol=1e-12)


@pytest.mark.parametrize("depth, size", [(1, 3), (4, 3), (9, 3), (1, 9), (2, 5)])
def test_a_stack_of_equal_kernels_is_as_wide_as_the_root_of_its_depth(depth, size):
    """n layers of k x k ones: a variance of n (k^2 - 1) / 12 on every axis (Luo et al., 2016)."""
    conv = nn.Conv2d(1, 1, size, padding=size // 2, bias=False).double()
    nn.init.constant_(conv.weight, 1 / size**2)
    pixels = 41
    field = receptive_field(
        nn.Sequential(*[conv] * depth).eval(), [torch.ones(1, 1, pixels, pixels).double()]
    )
    place = torch.arange(pixels, dtype=torch.float64) - pixels // 2
    for axis in (0, 1):
        variance = (field.sum(axis) * place**2).sum() / field.sum()
        assert variance.item() == pytest.approx(depth * (size**2 - 1) / 12, abs=1e-9)


class Pools(nn.Module):
    """Two maps, pooled by a function: nothing but hooks says where the map is."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 2, 3, padding=1)
        self.second = nn.Sequential(nn.Conv2d(2, 2, 5, 2, padding=2), nn.ReLU(inplace=True))
        self.head = nn.Conv2d(2, 3, 1)

    def forward(self, x):
        x = self.second(self.first(x))
        return self.head(x.mean((2, 3), keepdim=True)).flatten(1)


def test_the_last_map_is_read_or_the_layer_that_is_named():
    model, x = Pools().double().eval(), drawn(5, 1, 18, 18)
    default = receptive_field(model, [x])
    assert torch.equal(default, receptive_field(model, [x], layer="second"))
    first = receptive_field(model, [x], layer="first")
    assert first.nonzero().min(0).values.tolist() == [8, 8]
    assert first.nonzero().max(0).values.tolist() == [10, 10]
    assert (default > 0).sum() > 9
    assert all(p.grad is None for p in model.parameters()) and not x.requires_grad
    assert not any(m._forward_hooks for m in model.modules())


def test_a_dense_map_sees_everything():
    torch.manual_seed(0)
    model = RepMLP(4, 5, 5, sets=2).double().eval()
    assert (receptive_field(model, [drawn(40, 4, 5, 5)]) > 0).all()


@pytest.mark.parametrize("side", [8, 9])
def test_shares_and_areas_are_those_of_central_squares(side):
    field = drawn(side, side).abs()
    parts, middle = shares(field).tolist(), side // 2
    for i, part in enumerate(parts):
        square = field[max(middle - i, 0) : middle + i + 1, max(middle - i, 0) : middle + i + 1]
        assert part == pytest.approx((square.sum() / field.sum()).item(), abs=1e-12)
    assert parts[-1] == pytest.approx(1) and len(parts) == side // 2 + 1
    assert area(parts, parts[0], side) == 1 / side**2
    assert area(parts, (parts[0] + parts[1]) / 2, side) == (3 / side) ** 2
    assert area(parts, 1 - 1e-9, side) == 1


def test_a_report_is_of_enlarged_images():
    model, x = Pools().eval(), drawn(6, 1, 6, 6).float()
    found = report(model, [x[:4], x[4:]], 18)
    assert (found["pixels"], found["images"], len(found["shares"])) == (18, 6, 10)
    assert len(found["map"]) == 18 and max(map(max, found["map"])) == 1
    enlarged = torch.nn.functional.interpolate(x, (18, 18), mode="bicubic")
    expected = shares(receptive_field(model, [enlarged]))
    assert found["shares"] == pytest.approx(expected.tolist(), rel=1e-4)


def test_what_cannot_be_measured_is_told_in_one_line():
    model, x = Pools().eval(), torch.zeros(1, 1, 8, 8)
    with pytest.raises(ValueError, match="first is in train mode: call"):
        model.first.train()
        receptive_field(model, [x])
    model.eval()
    with pytest.raises(ValueError, match=r"layer \(='third'\) must be the name of a module"):
        receptive_field(model, [x], layer="third")
    with pytest.raises(ValueError, match=r"layer \(='head'\) gives a map \(N, C, h, w\) of more"):
        receptive_field(model, [x], layer="head")
    with pytest.raises(ValueError, match="batches is empty"):
        receptive_field(model, [])
    with pytest.raises(ValueError, match="no pixel moves the centre"):
        shares(torch.zeros(4, 4))


TABLE = """
title: "Seeing"
question: "How far?"
control: small
seeds: [0, 1]
cell: {data: digits, train_images: 80, held_out: 20, body: digits, block: convbn, batch_size: 30}
recipes: {base: {epochs: 1, learning_rate: 0.1, receptive_field: 24}}
rows:
  small: {label: "As it <is>", use: [base]}
  unmeasured: {label: "Not measured", use: [base], set: {receptive_field: null}}
"""


def test_a_cell_measures_it_and_a_page_says_what_the_evidence_says(tmp_path):
    with at_home(tmp_path, {"seeing": TABLE}):
        results = Results("seeing", "tiny")
        fields = Fields(results)
        assert fields.maps() is fields.curves() is None and fields.table().data == MISSING
        assert results.train(device="cpu").trained == 4
        fields = Fields(results)
        assert list(fields.measured) == ["small"]
        found = results.evidence("small")[1]["result"]["receptive_field"]
        assert (found["pixels"], found["images"]) == (24, 50)
        assert "receptive_field" not in results.evidence("unmeasured")[0]["result"]
        halves = []
        for seed in (0, 1):
            parts = results.evidence("small")[seed]["result"]["receptive_field"]["shares"]
            radius = next(i for i, part in enumerate(parts) if part >= 0.5)
            halves.append(100 * ((2 * radius + 1) / 24) ** 2)
        html = fields.table().data
        assert "As it &lt;is&gt;" in html
        cells = re.findall(r"<td>(.*?)</td>", html)
        assert cells[3].startswith(f"{sum(halves) / 2:.3g} ")
        assert len(fields.curves().axes) == 1
        both = [found["map"] for found in fields.measured["small"].values()]
        mean = (torch.tensor(both[0]) + torch.tensor(both[1])) / 2
        drawn = torch.as_tensor(fields.maps().axes[0].images[0].get_array())
        assert torch.allclose(10 ** drawn.float(), (mean / mean.max()).clamp(min=1e-4), rtol=1e-4)
        title = fields.maps().axes[0].get_title()
        assert title.startswith("As it <is>") and not math.isnan(halves[0])
