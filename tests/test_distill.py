"""The distillation loss against a plain loop and against RepAn's own numbers; logits that are known
are those that the teacher would give, bit for bit."""

import math
import time

import pytest
import torch
from test_vectors import SHARED
from torch import nn

from replib.experiments.cells import plan, run_cell
from replib.experiments.params import Table
from replib.experiments.store import Store, sha256
from replib.fusing import deployed_copy
from replib.methods.distill import distillation_loss
from replib.models import build
from replib.training import known_logits as known
from replib.training import loader
from replib.training.augmentation import Augmentation
from replib.training.data import load
from replib.training.evaluation import Normalise
from replib.training.known_logits import known_logits, left_over, views
from replib.training.loop import OutOfTime
from replib.training.step import autocast


def looped(z, t, y, alpha, temperature):
    """The same from its definition, one sample and one class at a time."""
    total = 0.0
    for logits, taught, label in zip(z.tolist(), t.tolist(), y.tolist(), strict=True):

        def softmax(values, temperature):
            powers = [math.exp(v / temperature) for v in values]
            return [p / sum(powers) for p in powers]

        p, q = softmax(taught, temperature), softmax(logits, temperature)
        divergence = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        hard = -math.log(softmax(logits, 1)[label])
        total += alpha * temperature**2 * divergence + (1 - alpha) * hard
    return total / len(z)


@pytest.mark.parametrize("alpha, temperature", [(0.9, 10.0), (0.5, 4.0), (0.0, 1.0), (1.0, 2.0)])
def test_equals_a_plain_loop(alpha, temperature):
    generator = torch.Generator().manual_seed(0)
    z, t = (torch.randn(6, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    y = torch.tensor([0, 1, 2, 3, 4, 0])
    got = distillation_loss(z, t, y, alpha=alpha, temperature=temperature)
    assert got.item() == pytest.approx(looped(z, t, y, alpha, temperature), abs=1e-12)


@pytest.mark.parametrize("name, alpha, temperature", [
    ("kd_a0.9_T10", 0.9, 10.0), ("kd_a0.5_T4", 0.5, 4.0), ("kd_a0.1_T1", 0.1, 1.0),
])  # fmt: skip
def test_equals_repan(name, alpha, temperature):
    path = SHARED / "spec/fixtures/repan.pt"
    if not path.is_file():
        pytest.skip(f"{path} is not here: RepAn's numbers are data outside the repository")
    entry = torch.load(path, weights_only=True)[name]
    z, taught = entry["z"].double().requires_grad_(), entry["t"].double()
    loss = distillation_loss(z, taught, entry["y"], alpha=alpha, temperature=temperature)
    loss.backward()
    # Theirs is in float32: a divergence near 0 whose rounding is multiplied by T^2 = 100.
    torch.testing.assert_close(loss.item(), float(entry["loss"]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(z.grad.float(), entry["grad"], rtol=1e-5, atol=2e-6)


# -- known logits ----------------------------------------------------------------------------------
def teacher(**options):
    torch.set_num_threads(1)
    torch.manual_seed(4)
    return deployed_copy(build("digits", "dbb", classes=10, in_channels=1).eval())


class Watched(nn.Module):
    """A network that notes how many images it was shown at a time."""

    def __init__(self, network):
        super().__init__()
        self.network, self.shown = network, []

    def forward(self, x):
        self.shown.append(len(x))
        return self.network(x)


def table_of(network, augmentation=Augmentation(), count=75, **options):  # noqa: B008
    options = dict(batch=20, epochs=10) | options
    train = torch.arange(count) * 3 + 1
    return train, *known_logits(network, load("digits"), train, augmentation, **options)


@pytest.mark.parametrize("augmentation, kinds", [
    (Augmentation(), 1),
    (Augmentation(label_smoothing=0.1), 1),
    (Augmentation(flip=True), 2),
    (Augmentation(crop_padding=1), 0),
    (Augmentation(flip=True, cutout=2), 0),
    (Augmentation(mixup=0.2), 0),
    (Augmentation(cutmix=0.2), 0),
    (Augmentation(resized_crop=8), 0),
    (Augmentation(policy="raug15"), 0),
    (Augmentation(brightness=0.1), 0),
    (Augmentation(erasing=0.1), 0),
])  # fmt: skip
def test_how_many_inputs_an_image_becomes(augmentation, kinds):
    assert views(augmentation) == kinds


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("flip", [False, True])
def test_rows_are_the_teachers_logits_of_any_full_batch(flip, precision):
    network, digits, augmentation = teacher(), load("digits"), Augmentation(flip=flip)
    train, table, asked = table_of(network, augmentation, precision=precision)
    assert table.shape == (1 + flip, 75, 10) and asked == 2 * (1 + flip) * 80
    generator = torch.Generator().manual_seed(1)
    for chunk in torch.randperm(75, generator=generator)[:60].split(20):
        mirrored = flip * (torch.rand(20, generator=generator) < 0.5)  # some of a batch
        pixels = next(loader.batches(digits.train_images, [train[chunk]], "cpu"))
        pixels = augmentation.apply(pixels, {"flip": mirrored})
        with torch.no_grad(), autocast("cpu", precision):
            assert torch.equal(
                table[mirrored.long(), chunk], network(Normalise(digits, "cpu")(pixels))
            )
    if flip:
        mirror = digits.normalised(digits.train_images[train].flip(3))
        with torch.no_grad(), autocast("cpu", precision):
            near = network(mirror)
        assert (table[1] - near).abs().max() < 0.02 < (table[0] - near).abs().max()


def test_nothing_is_computed_that_does_not_repay(monkeypatch):
    network = Watched(teacher())
    for options in (
        dict(epochs=2),
        dict(augmentation=Augmentation(flip=True), epochs=4),
        dict(augmentation=Augmentation(cutout=2)),
        dict(batch=80, count=75),  # no full batch
    ):
        assert table_of(network, **options)[1:] == (None, 0)
    monkeypatch.setattr(known, "MOST_BYTES", 75 * 10 * 4 - 1)
    assert table_of(network)[1:] == (None, 0)
    assert network.shown == []


class Uneven(nn.Module):
    """What it says of an image depends on its place in the batch, in the last bit, now and then."""

    def __init__(self, network, places):
        super().__init__()
        self.network, self.places = network, places

    def forward(self, x):
        logits = self.network(x)
        last = logits[self.places, 3]
        logits[self.places, 3] = torch.nextafter(last, last + 1)
        return logits


def test_one_bit_that_depends_on_the_place_is_found():
    said = []
    _, table, asked = table_of(Uneven(teacher(), [7]), say=said.append)
    assert table is None and asked == 160
    assert len(said) == 1 and "asked at every step" in said[0] and "\n" not in said[0]


@pytest.mark.parametrize("images, batch, part, want", [
    (100, 20, 20, 0), (75, 20, 20, 15), (75, 20, 10, 5), (15, 15, 15, 0), (15, 15, 8, 7),
])  # fmt: skip
def test_what_is_left_over(images, batch, part, want):
    places = [list(range(images))[i : i + batch] for i in range(0, images, batch)]
    parts = [p[i : i + part] for p in places for i in range(0, len(p), part)]
    assert left_over(images, batch, part) == sum(len(p) for p in parts if len(p) < part) == want


# -- a cell with and without them ------------------------------------------------------------------
def planned(**changes):
    """A distilled cell of six epochs, and its plan."""
    cell = dict(data="digits", train_images=71, held_out=15, body="digits", epochs=1,
                batch_size=20, learning_rate=0.3, momentum=0.5)  # fmt: skip
    taught = dict(distill=dict(alpha=0.9, temperature=4.0), epochs=6)
    rows = {
        "teacher": dict(label="t", set=dict(body="digits_wide"), hidden=True),
        "row": dict(label="r", teacher="teacher", set=taught | changes),
    }
    made = plan(Table.model_validate(
        dict(title="t", question="q", control="row", seeds=[0], cell=cell, rows=rows)
    ))  # fmt: skip
    return made, made.cells[made.by_row["row", 0]]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Store(tmp_path_factory.mktemp("store"))


def ran(store, made, cell, **options):
    """Evidence of the row; its teacher is trained once."""
    torch.set_num_threads(1)
    for parent in made.missing(store):
        if parent is not cell:
            run_cell(parent, made.cells, store)
    run_cell(cell, made.cells, store, **options)
    return store.read(cell.key)


CASES = {
    "mirrored": dict(flip=True),
    "a cycle": dict(cycle=dict(warmup=1), phases=3, epochs=2, batch_size=11, label_smoothing=0.1),
    "in parts": dict(accumulate=2, batch_size=22),  # of 56: 2 x 11, 2 x 11, 11 and 1
    "in bfloat16": dict(precision="bfloat16"),
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_a_cell_is_the_same_to_the_bit(changes, store, monkeypatch):
    made, cell = planned(**changes)
    with_table = ran(store, made, cell)
    monkeypatch.setattr(known, "MOST_BYTES", 0)
    without = ran(store, made, cell)
    assert with_table["result_sha256"] == without["result_sha256"] == sha256(without["result"])
    ways = [e["context"]["teacher"]["logits"] for e in (with_table, without)]
    assert ways == ["computed once", "asked at every step"]


def test_flops_are_those_that_were_computed(store, monkeypatch):
    made, cell = planned()
    with_table = ran(store, made, cell)
    monkeypatch.setattr(known, "MOST_BYTES", 0)
    without = ran(store, made, cell)
    always = without["result"]["compute"]["teacher_flops"]
    assert without["context"]["teacher"]["flops"] == always > 0
    # 56 images in batches of 20: two passes of three batches, and 16 images in each of 6 epochs.
    each = always // (6 * 56)
    assert with_table["context"]["teacher"]["flops"] == each * (2 * 60 + 6 * 16)


def test_the_teacher_is_shown_only_what_is_left_over(store, monkeypatch):
    from replib.experiments import cells

    made, cell = planned()
    shown, real = [], cells.teacher_of

    def watched(*arguments):
        if (network := real(*arguments)) is None:
            return None
        network = Watched(network)
        network.shown = shown
        return network

    monkeypatch.setattr(cells, "teacher_of", watched)
    ran(store, made, cell)
    # Two passes; a batch that counts FLOPs; what is left over of six epochs; the test split.
    assert shown[: 6 + 1 + 6] == [20] * 6 + [20] + [16] * 6
    assert sum(shown[13:]) == 797


def test_a_run_that_is_stopped_goes_on_alike(store):
    made, cell = planned(epochs=3)
    want, stops = ran(store, made, cell), 0
    while True:
        try:
            got = ran(store, made, cell, deadline=time.monotonic() - 1, checkpoint_seconds=0)
            break
        except OutOfTime:
            stops += 1
    assert stops > 5
    assert got["result_sha256"] == want["result_sha256"]
    assert got["context"]["teacher"]["flops"] > want["context"]["teacher"]["flops"]


def test_a_teacher_that_is_uneven_is_asked(store, monkeypatch):
    """What it says then is used, not the table."""
    from replib.experiments import cells

    made, cell = planned()
    said, real = [], cells.teacher_of

    def uneven(*arguments):
        network = real(*arguments)
        return network and Uneven(network, [0])

    monkeypatch.setattr(cells, "teacher_of", uneven)
    found = ran(store, made, cell, say=said.append)
    assert found["context"]["teacher"]["logits"] == "asked at every step"
    assert any("are not kept" in line for line in said)


@pytest.mark.slow
def test_a_compiled_step_is_given_the_rows(store):
    """Compiled arithmetic rounds otherwise, so the losses are near, and nothing is said."""
    made, cell = planned()
    want, said = ran(store, made, cell)["result"]["history"]["train_loss"], []
    found = ran(store, made, cell, compile="default", say=said.append)
    assert said == [] and found["context"]["compile"] == "default"
    assert found["context"]["teacher"]["logits"] == "computed once"
    assert found["result"]["history"]["train_loss"] == pytest.approx(want, rel=0.05)
