"""Scores of kernels: against a plain loop, without touching the model, and what a norm does."""

import copy

import pytest
import test_annealing
import torch
import torch.nn.functional as F
from torch import nn

from replib.analysis.layer_scores import layer_scores
from replib.networks import branch_by_branch


def problem(block="repvgg", channels=4):
    """The network of test_annealing, and its images in three batches of different sizes."""
    model, images, labels = test_annealing.problem(block, channels)
    return model, [(images[a:b], labels[a:b]) for a, b in ((0, 8), (8, 14), (14, 18))]


# Where the kernels of a block lie: (branch, the numbers of its convolutions in the chain).
KERNELS = {
    "convbn": [("conv", [0])],
    "repvgg": [("dense", [0]), ("1x1", [0])],
    "acb": [("square", [0]), ("axis0", [0]), ("axis1", [0])],
    "dbb": [("origin", [0]), ("1x1", [0]), ("avg", [0]), ("1x1_kxk", [0, 2])],
}


@pytest.mark.parametrize("family", KERNELS)
def test_scores_are_those_of_a_plain_loop(family):
    """Backward on a copy, branch by branch; every kernel and every weight added by hand."""
    model, batches = problem(family)
    twin = branch_by_branch(copy.deepcopy(model).train())
    expected = {}
    for images, labels in batches:
        twin.zero_grad()
        F.cross_entropy(twin(images), labels).backward()
        for place in (0, 2):
            for branch, numbers in KERNELS[family]:
                row = expected.setdefault((str(place), branch), [0, 0.0, 0.0, 0.0])
                row[0], squares = 0, 0.0
                for number in numbers:
                    piece = twin[place].branches[branch][number]
                    weight = piece.weight.detach()
                    if piece.offset:
                        weight = weight + torch.eye(4, dtype=weight.dtype)[:, :, None, None]
                    for w, g in zip(
                        weight.flatten().tolist(), piece.weight.grad.flatten().tolist(), strict=True
                    ):
                        row[0] += 1
                        row[1] += abs(g * w) / len(batches)
                        row[2] += g * w / len(batches)
                        squares += g * g
                row[3] += squares**0.5 / len(batches)
    names = ("weights", "snip", "synflow", "grad_norm")
    found = layer_scores(model, batches, F.cross_entropy)
    assert [(row["block"], row["branch"]) for row in found] == list(expected)
    for row, values in zip(found, expected.values(), strict=True):
        assert [row[name] for name in names] == pytest.approx(values, rel=1e-9, abs=1e-12)
        assert row["role"] == ("main" if row["branch"] == KERNELS[family][0][0] else "side")


def test_the_model_is_left_as_it_is():
    model, batches = problem()
    model[0].eval()
    model[2].branches["dense"][0].weight.requires_grad_(False)  # scored all the same
    before = copy.deepcopy(model)
    found = layer_scores(model, batches, F.cross_entropy)
    assert all(row["snip"] > 0 for row in found)
    for ours, theirs in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(ours, theirs) and ours.grad is None
        assert ours.requires_grad == theirs.requires_grad
    for name, buffer in before.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer), name
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]


def without_eps(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-30  # torch refuses 0
    return model


@pytest.mark.parametrize("family", ["repvgg", "dbb"])
def test_signed_sums_vanish_before_a_norm(family):
    """Every kernel that a norm follows; absolute ones and gradients do not. With eps, nearly."""
    model, batches = problem(family)
    for row in layer_scores(without_eps(copy.deepcopy(model)), batches, F.cross_entropy):
        assert abs(row["synflow"]) < 1e-12 * row["snip"], row
        assert row["snip"] > 1e-3 and row["grad_norm"] > 1e-3, row
    with_eps = layer_scores(model, batches, F.cross_entropy)
    assert 1e-10 < max(abs(row["synflow"]) / row["snip"] for row in with_eps) < 1e-3


def test_signed_sums_do_not_vanish_without_a_norm():
    """OREPA has one norm behind the sum of its branches, so no single kernel is free of scale."""
    model, batches = problem("orepa")
    found = layer_scores(without_eps(model), batches, F.cross_entropy)
    assert max(abs(row["synflow"]) - 1e-2 * row["snip"] for row in found) > 1e-3


def test_a_model_without_blocks_and_no_batches_are_refused():
    model, _ = problem()
    with pytest.raises(ValueError, match="batches is empty"):
        layer_scores(model, [], F.cross_entropy)
    with pytest.raises(ValueError, match="Linear has no block with kernels"):
        layer_scores(nn.Linear(2, 2), [(torch.zeros(1, 2), torch.zeros(1))], F.cross_entropy)
