"""Running statistics measured anew are those of a plain loop, and nothing else changes."""

import copy

import pytest
import torch
from torch import nn

from replib.methods.calibration import calibrate

GENERATOR = torch.Generator().manual_seed(3)
BATCHES = [torch.randn(6, 3, 5, 5, generator=GENERATOR).double() for _ in range(3)]


def network():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.9), nn.Conv2d(4, 2, 1)
    return nn.Sequential(*layers, nn.BatchNorm2d(2, momentum=0.3)).double()


def test_statistics_are_the_average_over_batches():
    model = network()
    first, second = [], []
    for batch in BATCHES:
        x = model[0](batch)
        first.append((x.mean((0, 2, 3)), x.var((0, 2, 3))))
        x = (x - x.mean((0, 2, 3), keepdim=True)) / (
            x.var((0, 2, 3), correction=0, keepdim=True) + 1e-5
        ).sqrt()
        x = model[4](x.relu())  # dropout is off
        second.append((x.mean((0, 2, 3)), x.var((0, 2, 3))))
    assert calibrate(model, BATCHES) == ["1", "5"]
    for norm, found in ((model[1], first), (model[5], second)):
        for buffer, values in zip(
            (norm.running_mean, norm.running_var), zip(*found, strict=True), strict=True
        ):
            torch.testing.assert_close(buffer, sum(values) / len(values), rtol=1e-12, atol=1e-12)


def test_all_else_is_left_as_it_was():
    model = network().train()
    model[1].eval()
    before, state = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    calibrate(model, BATCHES, lambda name, norm: name == "5")
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    assert (model[1].momentum, model[5].momentum) == (0.1, 0.3)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, state[k])}
    assert changed == {"5.running_mean", "5.running_var", "5.num_batches_tracked"}


def test_nothing_to_measure_on_is_refused():
    model = network()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="batches"):
        calibrate(model, [])
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
