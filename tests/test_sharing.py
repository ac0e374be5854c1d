"""The shared forward computes what the branches compute one by one, for every block."""

import copy

import pytest
import torch
from test_blocks import CASES, DEFAULTS, GEOMETRIES, TRIED, scrambled
from torch import nn

from replib import sharing
from replib.networks import branch_by_branch

torch.set_num_threads(1)
EXACT = 1e-11  # of the largest number, in float64: variances are sums of squares


def observed(block, x, rate):
    """Everything that a training step sees: output, gradients, and what the norms remember."""
    block.set_rate(rate)
    x = x.clone().requires_grad_()
    y = block(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    gradients = torch.autograd.grad(
        (y * weights).sum() + (y * y * weights).sum(),
        [x, *(p for p in block.parameters() if p.requires_grad)],
        allow_unused=True,
    )
    names = ["input", *(name for name, p in block.named_parameters() if p.requires_grad)]
    return {"output": y, **dict(zip(names, gradients, strict=True)), **dict(block.named_buffers())}


def compare(ours, reference, tolerance):
    """Relative to the largest number of its kind: the gradient of a weight whose norm cancels its
    scale may be zero but for rounding."""
    assert ours.keys() == reference.keys()
    scale = max(
        v.abs().max().item() for k, v in reference.items() if v is not None and k != "output"
    )
    for name, value in reference.items():
        if value is None:
            assert ours[name] is None or not ours[name].any(), name
            continue
        assert ours[name].shape == value.shape and ours[name].dtype == value.dtype, name
        error = (ours[name] - value).abs().max().item()
        assert error <= tolerance * max(scale, value.abs().max().item()), (name, error)


FORMS = {  # compiling, covariances wherever they are possible
    "one by one": (False, False),
    "compiling": (True, False),
    "compiling, covariance": (True, True),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("family", "case"), CASES)
def test_it_agrees_with_the_branches_one_by_one(family, case, form, monkeypatch):
    compiling, covariance = FORMS[form]
    monkeypatch.setattr(sharing, "compiling", lambda: compiling)
    pays = lambda term: covariance and term.kernel.groups == 1  # noqa: E731
    monkeypatch.setattr(sharing, "covariance_pays", pays)
    block = scrambled(copy.deepcopy(TRIED[family, case])).double().train()
    g = DEFAULTS | GEOMETRIES[case]
    space = (9, 11, 7)[: g.get("dims", 2)]
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(4, g["in_channels"], *space, generator=generator, dtype=torch.float64) + 0.7
    twin = branch_by_branch(nn.Sequential(copy.deepcopy(block)))[0]
    compare(observed(block, x, 0.7), observed(twin, x, 0.7), EXACT)
