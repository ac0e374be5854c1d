"""The watched cycle: the same training as without watching, and what a restore does to lengths."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from replib.analysis import annealing
from replib.analysis.precision import exact_input, stack
from replib.analysis.scale_invariance import filters, normalised_convolutions
from replib.blocks import BLOCKS
from replib.methods.cycle import Cycle
from replib.training.optimisation import cosine

HOW = {"epochs": 3, "learning_rate": 0.1, "weight_decay": 0.01, "batch_size": 6}


def problem(block="repvgg", channels=4):
    """Two scrambled blocks and a classifier in float64, images and labels."""
    images = exact_input((18, channels, 6, 6), 0)
    blocks = stack(block, 2, 3, images, 0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3).double()]
    model = nn.Sequential(blocks[0], nn.ReLU(), blocks[1], nn.ReLU(), *head)
    return model, images, torch.arange(18) % 3


def test_watching_changes_nothing():
    model, images, labels = problem("convbn")
    by_hand = copy.deepcopy(model).train()
    decayed = [by_hand[i].branches["conv"][0].weight for i in (0, 2)]
    generator = torch.Generator().manual_seed(7)
    losses = []
    for epoch in range(3):
        order, total = torch.randperm(18, generator=generator), 0.0
        for batch in order.split(6):
            torch.randint(18, (6,), generator=generator)  # labels are noisy with a share of 0
            torch.rand(6, generator=generator)
            by_hand.zero_grad()
            loss = F.cross_entropy(by_hand(images[batch]), labels[batch])
            loss.backward()
            with torch.no_grad():
                for parameter in by_hand.parameters():
                    decay = 0.01 if any(parameter is one for one in decayed) else 0.0
                    parameter -= cosine(epoch, 3, 0.1) * (parameter.grad + decay * parameter)
            total += loss.item() / 3
        losses.append(total)
    history = annealing.train(model, images, labels, seed=7, **HOW)
    for ours, theirs in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert [row["loss"] for row in history.epochs] == pytest.approx(losses)
    assert [row["learning_rate"] for row in history.epochs] == [cosine(e, 3, 0.1) for e in range(3)]
    assert {row["rate"] for row in history.epochs} == {1.0}
    assert [row["epoch"] for row in history.filters] == [0, 0, 1, 1, 2, 2]


def test_a_cycle_restarts_everything():
    model, images, labels = problem()
    cycle = Cycle(model, warmup=2)
    history = annealing.train(model, images, labels, seed=0, cycle=cycle, cycles=2, **HOW)
    assert [row["epoch"] for row in history.epochs] == list(range(6))
    assert [row["learning_rate"] for row in history.epochs] == [
        cosine(e, 3, 0.1) for e in range(3)
    ] * 2
    assert [row["rate"] for row in history.epochs] == [1.0, 1.0, 1.0] * 2
    assert {row["epoch"] for row in history.restarts} == {0, 3}
    for row in history.restarts:
        assert abs(row["after"] - row["before"]) > 1e-3, "official replaces the function"
    assert {row["role"] for row in history.filters} == {"main", "side"}


def test_without_a_cycle_nothing_is_restarted():
    model, images, labels = problem()
    history = annealing.train(model, images, labels, seed=0, **HOW | {"epochs": 1})
    assert {row["mode"] for row in history.restarts} == {"eval", "train"}
    assert all(row["before"] == row["after"] for row in history.restarts)


def test_what_a_restart_did_is_told_of_the_right_moment():
    model, images, labels = problem()
    before = annealing.mean_losses(model, images, labels)
    assert before["eval"] == F.cross_entropy(model.eval()(images), labels).item()
    untouched = copy.deepcopy(model.state_dict())
    cycle = Cycle(model, warmup=2, fidelity="preserving", rate_schedule="ramp")
    history = annealing.train(model, images, labels, seed=0, cycle=cycle, **HOW)
    found = {row["mode"]: row for row in history.restarts}
    assert found["eval"]["before"] == before["eval"] and found["train"]["before"] == before["train"]
    assert found["eval"]["after"] == pytest.approx(before["eval"], abs=1e-9)
    assert untouched.keys() == model.state_dict().keys()
    assert [row["rate"] for row in history.epochs] == [0.0, 0.5, 1.0]


def test_label_noise_replaces_a_share():
    labels = torch.arange(4000)
    batch = torch.arange(4000)

    def drawn(share):
        return annealing.noisy(labels, batch, share, torch.Generator().manual_seed(0))

    assert torch.equal(drawn(0.0), labels)
    assert (drawn(1.0) != labels).double().mean() > 0.99
    assert (drawn(0.3) != labels).double().mean().item() == pytest.approx(0.3, abs=0.03)


def test_roles_by_name():
    model = nn.Sequential(BLOCKS["dbb"](3, 4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    roles = annealing.roles_of(model)
    assert roles["0.branches.origin.0"] == "main" and roles["1"] == "plain"
    assert roles["0.branches.1x1_kxk.2"] == roles["0.branches.1x1.0"] == "side"
    assert roles.keys() == normalised_convolutions(model).keys()


@pytest.mark.parametrize("norm", ["keep", "unit", "match"])
def test_what_restore_does_to_the_length_of_the_main_branch(norm):
    """The merged kernel K, through its norm: K s / gamma, K s, or K itself."""
    model, images, _ = problem()
    changed = annealing.restored(model, norm, images)
    old, new = model[0], changed[0]
    kernel = old.merged().weight.detach().flatten(1)
    layer = old.branches["dense"][1].norm
    deviation = (layer.running_var + layer.eps).sqrt()
    factor = {"keep": deviation / layer.weight, "unit": deviation, "match": torch.ones(4)}[norm]
    expected = kernel * factor.detach().double().unsqueeze(1)
    torch.testing.assert_close(filters(new.branches["dense"][0]), expected, rtol=0, atol=1e-12)
    assert new.rate.item() == (0.0 if norm == "match" else 1.0)


def test_length_changes_by_hand():
    model, images, labels = problem()
    changed = annealing.restored(model, "unit", images)
    rate = 1e-6  # angles are then lr |g| / |w|
    rows = annealing.length_changes(model, changed, images, labels, rate)
    names = ["dense.0", "1x1.0"] * 2
    assert [row["convolution"] for row in rows] == names
    assert [row["role"] for row in rows] == ["main", "side"] * 2
    assert [row["block"] for row in rows] == ["0", "0", "2", "2"]
    for when, network in (("before", model), ("after", changed)):
        twin = copy.deepcopy(network).train()
        F.cross_entropy(twin(images), labels).backward()
        for row in rows:
            branch, position = row["convolution"].split(".")
            conv = twin[int(row["block"])].branches[branch][int(position)]
            lengths = filters(conv).norm(dim=1)
            assert row[when] == pytest.approx(math.sqrt(lengths.square().mean()))
            turned = rate * conv.weight.grad.flatten(1).norm(dim=1) / lengths
            assert row[f"angle_{when}"] == pytest.approx(turned.square().mean().sqrt().item(), 1e-3)
            row[f"lengths_{when}"] = lengths
    for row in rows:
        ratio = (row["lengths_before"] / row["lengths_after"]).square().median()
        assert row["factor"] == pytest.approx(ratio.item())


def test_measuring_leaves_the_model_alone():
    model, images, labels = problem()
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    annealing.length_changes(model, annealing.restored(model, "keep", images), images, labels, 0.1)
    annealing.mean_losses(model, images, labels)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
