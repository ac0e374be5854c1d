"""The figures of RepOptimizers: variances by hand, scales from evidence and from a file."""

import math
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from replib.analysis.identity_share import identity_shares
from replib.blocks import BLOCKS
from replib.methods.repoptimizers import mean_scales, save_scales
from replib.models import build
from replib.report import scale_figures
from replib.report.scale_figures import Searches, by_layer, identity_share_figure

X = torch.randn(4, 6, 9, 9, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_the_share_of_a_block_is_that_of_its_variances():
    torch.manual_seed(0)
    block = BLOCKS["csla"](6, 6)
    for name, value in (("conv", 0.5), ("1x1", -1.5)):
        block.branches[name][1].weight.fill_(value)
    block.branches["identity"].weight.copy_(torch.linspace(0.5, 2, 6))
    network = nn.Sequential(block, nn.ReLU()).eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    path = X * block.branches["identity"].weight.view(6, 1, 1)
    whole = path + 0.5 * nn.functional.conv2d(X, block.branches["conv"][0].weight, padding=1)
    whole = whole - 1.5 * nn.functional.conv2d(X, block.branches["1x1"][0].weight)
    shares = [t.var((0, 2, 3), unbiased=False).mean().item() for t in (path, whole)]
    found = identity_shares(network, X)
    assert found == {"0": pytest.approx(shares[0] / shares[1], rel=1e-4)}
    assert not network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    with pytest.raises(ValueError, match="no block that adds its input"):
        identity_shares(nn.Sequential(nn.Conv2d(6, 6, 1)), X)


@torch.no_grad()
def test_the_share_of_a_residual_block():
    from torchvision.models.resnet import BasicBlock

    torch.manual_seed(0)
    block = BasicBlock(6, 6)
    inside = block.bn2(block.conv2(block.bn1(block.conv1(X)).relu()))
    spread = [t.var((0, 2, 3), unbiased=False).mean().item() for t in (X, X + inside)]
    found = identity_shares(nn.ModuleDict({"a": block})["a"], X)
    assert found == {"": pytest.approx(spread[0] / spread[1], rel=1e-4)}


def test_scales_that_begin_smaller_give_the_identity_more_weight():
    """Figure 4: flat with ones; rising with sqrt(2/l), and in a ResNet."""
    figure = identity_share_figure(width=0.0625, pixels=64, images=4, seed=0)
    lines = {line.get_label(): line.get_ydata() for line in figure.axes[0].lines}
    resnet, ones, published = lines.values()
    for line in figure.axes[0].lines:  # the first block of the stage has no identity
        assert list(line.get_xdata()) == [*range(2, 17)]
    assert len(ones) == len(published) == len(resnet) == 15
    assert published[-1] > published[0] + 0.3 and resnet[-1] > resnet[0] + 0.3
    assert max(ones) - min(ones) < 0.3


def evidence(epochs):
    return {"result": {"history": {"scales": epochs}}}


@pytest.fixture
def searches(tmp_path, monkeypatch):
    """Two rows that have searched for two epochs, and a released file."""
    torch.manual_seed(0)
    network = build("repopt_vgg_b1", "csla", classes=2, in_channels=3, width=0.0625)
    first = mean_scales(network)
    second = {name: 2 * value for name, value in first.items()}
    steep = {name: math.exp(3 * value) for name, value in first.items()}  # in the same order
    last = {"a": steep, "b": second}
    labels = {"a": SimpleNamespace(label="A"), "b": SimpleNamespace(label="B")}
    results = SimpleNamespace(
        rows=["a", "b"],
        fallback=False,
        table=SimpleNamespace(rows=labels),
        evidence=lambda row, published: {0: evidence([first, last[row]])},
    )
    monkeypatch.setenv("REPLIB_HOME", str(tmp_path))
    (tmp_path / "data").mkdir()
    save_scales(network, tmp_path / scale_figures.RELEASED)
    return Searches(results), network


def test_scales_are_read_from_evidence_and_from_the_released_file(searches):
    found, network = searches
    frame = found.frame
    assert len(frame) == 2 * 2 * len(mean_scales(network)) and set(frame.layer) == {*range(1, 29)}
    one = frame[(frame.row == "b") & (frame.epoch == 2) & (frame.layer == 4)]
    values = dict(zip(one.branch, one["mean"], strict=True))
    expected = {"conv": 2 * 1.0, "1x1": 2 * 1.0, "identity": 2.0}  # sqrt(2/2), doubled
    assert values == pytest.approx(expected, rel=1e-4)
    released = found.released[found.released.layer == 4]
    assert dict(zip(released.branch, released["mean"], strict=True))["conv"] == pytest.approx(1.0)
    titles = [axis.get_title() for axis in found.by_block().axes]
    assert titles == ["A", "B", "released (RepOpt-VGG-B1, CIFAR-100)"]
    final = [axis.lines[0].get_ydata()[3] for axis in found.by_block().axes]  # of layer 4
    assert final == pytest.approx([math.exp(3), 2, 1], rel=1e-4)
    over = found.over_epochs().axes
    line = over[1].lines[0].get_ydata()
    assert line[1] == pytest.approx(2 * line[0])
    # The 28th has a stage of its own, and no identity.
    assert over[0].get_ylabel() == "mean |scale|, layer 27"
    alike = dict(re.findall(r"<td>([^<]+)</td><td>(-?\d\.\d\d)</td>", found.likeness().data))
    assert alike["3 × 3"] == alike["1 × 1"] == "1.00"


def test_layers_are_counted_in_the_order_of_the_network():
    names = ["stage0.scale_conv.weight", "stage1.0.scale_conv.weight", "stage1.0.scale_1x1.weight"]
    scales = dict.fromkeys([*names, "linear.weight"], 1.0)
    assert by_layer(scales) == [(1, "conv", 1.0), (2, "conv", 1.0), (2, "1x1", 1.0)]
