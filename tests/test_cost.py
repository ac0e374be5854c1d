"""What is counted of networks: by hand, by plain loops, and the same on the device "meta"."""

import pytest
import torch
from torch import nn

from replib.analysis.cost import layout, operations, saved_bytes, step_cost
from replib.blocks import BLOCKS

SHAPE = (3, 8, 10)


def plain(stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Four layers of every kind that is counted in its own way."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.Conv2d(4, 4, 3, stride, padding=1, groups=groups),
        nn.Conv2d(4, 6, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 5),
    )


def test_saved_storages_count_once_and_own_ones_not_at_all():
    model = nn.Linear(8, 16, bias=False)
    x = torch.randn(4, 8, requires_grad=True)

    def forward():
        y = model(x).relu()  # relu saves its result, the product below the same storage
        return (y @ y.new_ones(16, 3).requires_grad_()).sum()

    ones = 16 * 3 * 4
    assert saved_bytes(model, forward, (x,)) == 4 * 16 * 4 + ones
    assert saved_bytes(model, lambda: model(x).sum(), (x,)) == 0


@pytest.mark.parametrize("stride, groups", [(1, 1), (2, 1), (1, 2)])
def test_operations_by_hand(stride, groups):
    first, last = 80 * 4 * 27, 30
    positions = 80 // stride**2
    second, third = positions * 4 * 36 // groups, positions * 6 * 4
    quick = first * 4 / 9 + (second * 4 / 9 if stride == 1 else second)
    found = operations(plain(stride, groups).eval(), SHAPE)
    assert found == (first + second + third + last, round(quick + third + last))


def test_no_other_convolution_is_done_by_winograd():
    for options in ({"kernel_size": (3, 1)}, {"kernel_size": 5}, {"dilation": 2}):
        layer = nn.Conv2d(3, 4, **{"kernel_size": 3} | options)
        direct, products = operations(layer, SHAPE)
        assert direct == products > 0
    layer = nn.Conv2d(3, 4, 3)
    assert operations(layer, SHAPE)[1] == round(operations(layer, SHAPE)[0] * 4 / 9)


def test_layout_counts_layers_in_a_row():
    made = [nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 6, 1)]
    made += [nn.Conv2d(6, 6, 3, 2, 1), nn.Conv2d(6, 4, 1), nn.Conv2d(4, 4, 1)]
    found = layout(nn.Sequential(*made), (3, 8, 8))
    assert found == [(2, 4, 4), (1, 6, 4), (1, 6, 2), (2, 4, 2)]


def test_a_step_of_one_convolution_by_hand():
    """Forward, the gradient of the weight, and that of the input where it is asked for."""
    conv, once = nn.Conv2d(3, 4, 3, padding=1, bias=False), 2 * 80 * 4 * 27
    first, inside = (step_cost(conv, 5, SHAPE, input_gradient=asked) for asked in (False, True))
    assert (first.forward, first.step, inside.step) == (once, 2 * once, 3 * once)
    assert (first.parameters, first.statistics, first.saved) == (108, 0, 0)
    assert conv.weight.grad is None
    relu = step_cost(nn.Sequential(conv, nn.ReLU()), 5, SHAPE)
    assert relu.saved == 5 * 4 * 80 * 4 and relu.memory == relu.saved + 12 * 108


@pytest.mark.parametrize("family", ["repvgg", "dbb", "orepa", "mobileone"])
def test_shapes_alone_say_the_same(family):
    """What is counted on "meta" is what a processor does and keeps; but for averages, which are
    convolutions there alone."""
    options = {"without": ["avg"]} if family == "dbb" else {}
    found = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            block = BLOCKS[family](3, 4, stride=2, **options)
            found.append(step_cost(block, 5, SHAPE, input_gradient=True))
    assert found[0] == found[1] and found[0].saved > 0
    statistics = sum(b.numel() for name, b in block.named_buffers() if "running" in name)
    assert found[0].statistics == statistics > 0
