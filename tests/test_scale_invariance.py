"""A filter before a norm: its length, its gradient, its equilibrium, against numbers by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from replib.analysis import scale_invariance as scale
from replib.blocks import BLOCKS
from replib.branches import Norm


def problem(block="convbn", seed=0, eps=1e-20):
    """A float64 network in train mode, its norms (almost) without eps, and a batch."""
    torch.manual_seed(seed)
    layers = [BLOCKS[block](3, 4), nn.ReLU(), BLOCKS[block](4, 4), nn.AdaptiveAvgPool2d(1)]
    model = nn.Sequential(*layers, nn.Flatten()).double().train()
    for module in model.modules():
        if isinstance(module, Norm):
            module.norm.eps = eps
            nn.init.uniform_(module.norm.weight, 0.5, 1.5)
            nn.init.uniform_(module.norm.bias, -0.5, 0.5)
    return model, torch.randn(8, 3, 6, 6, dtype=torch.float64), torch.arange(8) % 4


def loss_of(model, x, y):
    model.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss.item()


@pytest.mark.parametrize(
    "block, names",
    [
        ("convbn", {"conv.0"}),
        ("repvgg", {"dense.0", "1x1.0"}),
        ("dbb", {"origin.0", "1x1.0", "avg.0", "1x1_kxk.0", "1x1_kxk.2"}),
        ("csla", set()),  # scaled and summed before one norm: only the sum is free of scale
        ("orepa", set()),
    ],
)
def test_normalised_convolutions_are_those_whose_output_a_norm_takes(block, names):
    found = scale.normalised_convolutions(nn.Sequential(BLOCKS[block](4, 4)))
    assert {name.removeprefix("0.branches.") for name in found} == names


def test_plain_convolutions_are_found_by_tracing():
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU()]
    assert list(scale.normalised_convolutions(nn.Sequential(*layers))) == ["0"]


@pytest.mark.parametrize("block", ["convbn", "repvgg", "acb"])
def test_the_loss_ignores_length_and_the_gradient_does_not(block):
    model, x, y = problem(block)
    loss = loss_of(model, x, y)
    for conv in scale.normalised_convolutions(model).values():
        before = conv.weight.grad.clone()
        assert scale.radial_share(conv).max() < 1e-12
        assert before.norm() > 1e-3
        with torch.no_grad():
            conv.weight.mul_(3)
        assert loss_of(model, x, y) == pytest.approx(loss, abs=1e-12)
        torch.testing.assert_close(conv.weight.grad, before / 3, rtol=1e-9, atol=1e-12)


def test_radial_share_sees_a_weight_whose_length_matters():
    conv = nn.Conv2d(1, 2, 1, bias=False)
    conv.weight = nn.Parameter(torch.tensor([3.0, 4.0]).view(2, 1, 1, 1))
    conv.weight.grad = torch.tensor([-2.0, 0.0]).view(2, 1, 1, 1)
    assert scale.radial_share(conv).tolist() == [1.0, 0.0]


def test_effective_learning_rate_by_hand():
    model = nn.Sequential(nn.Conv2d(1, 2, (1, 2), bias=False), nn.BatchNorm2d(2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, 4.0], [0.0, 0.5]]).view(2, 1, 1, 2))
    rates = scale.effective_learning_rate(model, 0.5)
    assert rates["0"].tolist() == pytest.approx([0.02, 2.0])


def test_the_filter_of_an_offset_has_the_identity_in_it():
    conv = BLOCKS["dbb"](4, 4).branches["1x1_kxk"][0]
    assert conv.offset and not conv.weight.any()
    assert torch.equal(scale.filters(conv), torch.eye(4))


def test_equilibrium_is_where_one_step_keeps_the_length():
    """(1 - lr wd)^2 |w|^2 + lr^2 |g|^2 = |w|^2, to first order in lr wd."""
    rate, decay, unit_gradient = 0.1, 1e-4, 0.7
    length = scale.equilibrium_length(unit_gradient, rate, decay)
    w = torch.tensor([length, 0.0], dtype=torch.float64)
    g = torch.tensor([0.0, unit_gradient / length], dtype=torch.float64)
    stepped = w - rate * (g + decay * w)
    assert stepped.norm().item() == pytest.approx(length, rel=1e-9)
    angle = math.atan2(stepped[1].abs(), stepped[0])
    assert angle == pytest.approx(scale.equilibrium_angle(rate, decay), rel=1e-4)


def test_watch_notes_what_the_step_did():
    model = nn.Sequential(nn.Conv2d(1, 1, (1, 2), bias=False), nn.BatchNorm2d(1)).double()
    conv = model[0]
    optimizer = torch.optim.SGD([conv.weight], lr=0.5)
    watch = scale.Watch(model)
    for start, gradient in (([3.0, 4.0], [-8.0, 6.0]), ([0.0, 2.0], [2.0, 0.0])):
        with torch.no_grad():
            conv.weight.copy_(torch.tensor(start).view_as(conv.weight))
        conv.weight.grad = torch.tensor(gradient, dtype=torch.float64).view_as(conv.weight)
        watch.step(optimizer)
    (row,) = watch.rows()
    # Steps of length 5 and 1 at right angles to filters of length 5 and 2.
    assert row["convolution"] == "0"
    assert row["length"] == pytest.approx(math.sqrt((25 + 4) / 2))
    assert row["unit_gradient"] == pytest.approx(math.sqrt((50**2 + 4**2) / 2))
    angles = math.atan(1), math.atan(0.5)
    assert row["angle"] == pytest.approx(math.hypot(*angles) / math.sqrt(2))
    assert row["effective"] == pytest.approx((0.5 / 25 + 0.5 / 4) / 2)
    assert watch.rows() == []


def test_tiny_angles_are_not_lost_to_rounding():
    old = torch.tensor([[1.0, 0.0]])
    new = torch.tensor([[1.0, 1e-6]])  # the cosine is 1 in float32
    assert scale.rejection(new, old).item() == pytest.approx(1e-6)


def test_a_watched_filter_without_gradient_stands_still():
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.BatchNorm2d(2))
    watch = scale.Watch(model)
    watch.step(torch.optim.SGD(model.parameters(), lr=0.1))
    (row,) = watch.rows()
    assert row["angle"] == row["unit_gradient"] == 0 and row["length"] > 0


def test_against_theory_takes_the_last_third():
    rows = [
        {"convolution": "a", "length": float(n), "unit_gradient": 2.0 * n, "angle": 0.1 * n}
        for n in (9, 9, 9, 9, 3, 4)
    ]
    (row,) = scale.against_theory(rows, 0.1, 0.01)
    assert row["length"] == pytest.approx(math.sqrt((9 + 16) / 2))
    assert row["angle"] == pytest.approx(0.1 * math.sqrt((9 + 16) / 2))
    assert row["predicted_length"] == pytest.approx((0.1 * 4 * 12.5 / 0.02) ** 0.25)
    assert row["predicted_angle"] == pytest.approx(math.sqrt(0.002))
