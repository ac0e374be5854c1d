"""Evaluation: the right images, labels and values, normalised once, on a refilled network."""

import pytest
import torch
from torch import nn

from replib.blocks import BLOCKS
from replib.blocks.repmlp import RepMLP
from replib.fusing import deployed_copy, refill
from replib.methods.cycle import Cycle
from replib.training import evaluation
from replib.training.data import load
from replib.training.evaluation import Normalise, Split, accuracy, relative_jump

DIGITS = load("digits")


@pytest.fixture
def few(monkeypatch):
    """Batches of 100 images of 8x8."""
    monkeypatch.setitem(evaluation.BATCH_PIXELS, "cpu", 100 * 64)


@pytest.mark.parametrize("kept", [True, False])
def test_a_split_is_its_images_in_order(kept, few, monkeypatch):
    """The same batches again and again: kept where they are few, else made anew."""
    monkeypatch.setattr(evaluation, "KEPT_BYTES", 4 * 797 * 64 - (not kept))
    split = Split.test(DIGITS, "cpu")
    first, second = list(split.inputs()), list(split.inputs())
    assert [len(x) for x in first] == [100] * 7 + [97]
    assert torch.equal(torch.cat(first), DIGITS.normalised(DIGITS.test_images))
    assert all(a is b for a, b in zip(first, second, strict=True)) == kept
    assert torch.equal(torch.cat(second), torch.cat(first))
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in first)


def test_a_split_that_was_left_early_is_whole_the_next_time(few):
    split = Split.test(DIGITS, "cpu")
    next(split.inputs())
    assert sum(map(len, split.inputs())) == len(split) == 797


def test_views_turn_the_images_and_not_the_labels(few):
    """Against the same images, turned and flipped pixel by pixel."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    split = Split.test(DIGITS, "cpu")
    x, labels = torch.cat(list(split.inputs())), DIGITS.test_labels
    n, turned = 8, {name: torch.empty_like(x) for name in evaluation.VIEWS}
    for h in range(n):
        for w in range(n):
            turned["rotated_90"][:, :, n - 1 - w, h] = x[:, :, h, w]  # against the clock
            turned["rotated_180"][:, :, n - 1 - h, n - 1 - w] = x[:, :, h, w]
            turned["upside_down"][:, :, n - 1 - h, w] = x[:, :, h, w]
    report = evaluation.deployed_report(model, split, list(turned))
    for name, images in turned.items():
        right = (model(images).argmax(1) == labels).float().mean().item()
        assert report["views"][name] == pytest.approx(right)
    assert len({report["test_accuracy"], *report["views"].values()}) == 4, "they differ"
    assert "views" not in evaluation.deployed_report(model, split)


def test_accuracy_counts_the_images_that_are_named(few):
    """A network that knows the label by the first pixel of the image; some labels are wrong."""
    data = DIGITS
    indices = torch.randperm(1000, generator=torch.Generator().manual_seed(0))[:250]
    labels = data.train_labels.clone()
    images = data.train_images.clone()
    images[:, 0, 0, 0] = labels.to(torch.uint8)
    labels[indices[:50]] = (labels[indices[:50]] + 1) % 10

    class Knows(nn.Module):
        def forward(self, x):
            pixel = x[:, 0, 0, 0] * data.deviation[0] + data.mean[0]
            return nn.functional.one_hot((255 * pixel).round().long(), 10).float()

    pauses = []
    split = Split(images, labels, indices, data, "cpu")
    assert accuracy(Knows(), split, lambda: pauses.append(1)) == 200 / 250
    assert len(pauses) == 3


def test_normalisation_is_that_of_the_data_set():
    images = DIGITS.train_images[:9]
    assert torch.equal(Normalise(DIGITS, "cpu")(images), DIGITS.normalised(images))
    exact = Normalise(DIGITS, "cpu", torch.float64)(images)
    assert exact.dtype == torch.float64
    torch.testing.assert_close(exact.float(), DIGITS.normalised(images))


class Mixed(nn.Module):
    """A block at hand, one used twice, a norm and layers outside blocks, and a RepMLP."""

    def __init__(self, family):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.block = BLOCKS[family](4, 4)
        self.last = RepMLP(4, 8, 8)

    def forward(self, x):
        x = self.block(self.block(self.norm(self.stem(x)))).relu()
        return self.last(x)


@pytest.mark.parametrize("family", BLOCKS)
def test_a_refilled_copy_is_a_new_one(family):
    """After training steps, a changed lambda and a restore: values alone have changed."""
    torch.manual_seed(0)
    model, x = Mixed(family).double(), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    deployed = deployed_copy(model.eval())
    old = deployed(x)
    model.train()(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    model.block.set_rate(0.7)
    if model.block.invertible:
        Cycle(model, warmup=1).start_cycle()
    layers = list(deployed.modules())
    refill(deployed, model.eval())
    torch.testing.assert_close(deployed(x), deployed_copy(model)(x), rtol=0, atol=1e-12)
    assert relative_jump(old, deployed(x)) > 1e-3
    assert all(a is b for a, b in zip(layers, deployed.modules(), strict=True))


def test_a_block_at_the_root_is_refilled():
    model = BLOCKS["repvgg"](2, 2).eval()
    deployed, x = deployed_copy(model), torch.randn(1, 2, 5, 5)
    nn.init.normal_(model.main_branch[0].weight)
    refill(deployed, model)
    torch.testing.assert_close(deployed(x), model(x))
