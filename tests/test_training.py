"""The training loop: schedules, selection, phases, and resuming bit for bit."""

import copy
import dataclasses
import functools
import io
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import small_task
from torch.utils._python_dispatch import TorchDispatchMode

from replib.fusing import deployed_copy
from replib.methods.cycle import Cycle, decay_groups
from replib.networks import outermost_blocks
from replib.training import loop
from replib.training.augmentation import Augmentation
from replib.training.evaluation import Split, accuracy, deployed_report
from replib.training.loop import OutOfTime, fit, training_flops
from replib.training.optimisation import cosine
from replib.training.step import Step

RECIPE = dict(
    phases=2, epochs=3, batch_size=32, learning_rate=0.3, momentum=0.9, nesterov=True,
    weight_decay=1e-3, clip_norm=5.0, clip="decayed",
    augmentation=Augmentation(crop_padding=1), next_start="best", select="validation",
    reseed_each_phase=False,
)  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


def task(method=True, protocol="clean", **recipe):
    """60 training images."""

    def cycle(model):
        return Cycle(model, warmup=2, freeze="skip", fidelity="preserving") if method else None

    groups = functools.partial(decay_groups, weight_decay=1e-3)
    return small_task(RECIPE | recipe, groups, cycle, protocol=protocol)


def test_cosine_ends():
    assert cosine(0, 30, 0.75) == 0.75
    assert cosine(30, 30, 0.75) == pytest.approx(0, abs=1e-15)
    assert cosine(15, 30, 0.75) == pytest.approx(0.375)
    rates = [cosine(e, 30, 0.75) for e in range(31)]
    assert rates == sorted(rates, reverse=True)


def test_the_same_task_twice_is_the_same_to_the_bit():
    one, two = fit(task()), fit(task())
    assert one.history == two.history and one.restarts == two.restarts
    assert all(torch.equal(v, two.best["weights"][k]) for k, v in one.best["weights"].items())


@pytest.mark.parametrize("stop", range(1, 6))
def test_resuming_after_any_epoch_changes_nothing(stop):
    """Six epochs in two phases, stopped after `stop`, through a file, in a new process's place."""
    whole, kept, seen = fit(task()), [], []

    class Stopped(Exception):
        pass

    def tick():
        seen.append(1)

    def keep(state):
        buffer = io.BytesIO()
        torch.save(state, buffer)
        kept.append(buffer.getvalue())
        if len(seen) == stop:
            raise Stopped

    with pytest.raises(Stopped):
        fit(task(), checkpoint=keep, checkpoint_seconds=0, tick=tick)
    resume = torch.load(io.BytesIO(kept[-1]), weights_only=True)
    resumed = fit(task(), resume=resume)
    assert resumed.history == whole.history and resumed.restarts == whole.restarts
    weights = resumed.best["weights"]
    assert all(torch.equal(v, weights[k]) for k, v in whole.best["weights"].items())


def test_resuming_between_any_two_steps_changes_nothing():
    """Ten times, each attempt gets as far as one step or one evaluation; through a file."""
    whole, resume, attempts, places = fit(task(phases=1)), None, 0, set()
    while attempts < 30:
        kept = []
        try:
            done = fit(task(phases=1), resume=resume, checkpoint=kept.append, deadline=0.0)
            break
        except OutOfTime:
            (state,) = kept
            places.add((state["progress"]["epoch"], state["progress"]["batch"]))
            buffer = io.BytesIO()
            torch.save(state, buffer)
            resume = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
            attempts += 1
    assert attempts < 30, "it gets no further"
    assert {(0, 1), (0, 2), (1, 0), (1, 1), (1, 2)} <= places  # inside, before and after evaluation
    assert done.history == whole.history
    weights = done.best["weights"]
    assert all(torch.equal(v, weights[k]) for k, v in whole.best["weights"].items())


def test_an_evaluation_is_given_up_once_but_not_again(monkeypatch):
    """Time runs out inside it: it stops, and is done whole at the start of the next attempt."""
    late, measure = [], loop.accuracy
    monkeypatch.setattr(loop.time, "monotonic", lambda: 2.0 if late else 0.0)
    monkeypatch.setattr(loop, "accuracy", lambda *a: (late.append(1), measure(*a))[1])
    kept = []
    with pytest.raises(OutOfTime):
        fit(task(), checkpoint=kept.append, deadline=1.0)
    first = copy.deepcopy(kept[0]["progress"])
    with pytest.raises(OutOfTime):
        fit(task(), resume=copy.deepcopy(kept[0]), checkpoint=kept.append, deadline=1.0)
    second = kept[1]["progress"]
    assert (first["epoch"], first["batch"], len(first["history"])) == (0, 2, 0)
    assert (second["epoch"], second["batch"], len(second["history"])) == (1, 0, 1)
    assert second["history"] == fit(task()).history[:1]


class Synchronised(TorchDispatchMode):
    """Counts what would make the host wait for a GPU: values and sizes that it must read."""

    WAITS = ("_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "is_nonzero")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket.__name__
        if name in self.WAITS:
            self.found.append(name)
        return function(*arguments, **(options or {}))


def test_nothing_waits_for_the_device_within_a_step():
    """Clipped, frozen, its branch held, in augmented batches: no step reads a value back."""
    run = task(augmentation=Augmentation(crop_padding=1, flip=True, label_smoothing=0.1))
    waits, update = [], Step.__call__

    def watched(step, *inputs, **share):
        with Synchronised() as mode:
            loss = update(step, *inputs, **share)
        waits.append(mode.found)
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Step, "__call__", watched)
        fit(run)
    assert len(waits) == 2 * 3 * 2
    assert all(found == [] for found in waits), waits[0]


def test_an_epoch_uses_what_was_drawn_for_it():
    """Every image once, with its own label, and what was drawn for its place in the order."""
    seen, drawn = [], []

    class Watched(Augmentation):
        def draw(self, n, generator, size, in_channels=3):
            drawn.append(super().draw(n, generator, size, in_channels) | {"place": torch.arange(n)})
            return drawn[-1]

        def apply(self, images, rows):
            seen.append((images.clone(), rows["place"], rows["corner"]))
            return super().apply(images, rows)

    run, labels = task(method=False, phases=1, epochs=2, augmentation=Watched(crop_padding=1)), []
    run.loss = lambda logits, y, inputs: (labels.append(y), F.cross_entropy(logits, y))[1]
    fit(run)
    assert len(drawn) == 2 and len(seen) == 4
    assert torch.equal(torch.cat([place for _, place, _ in seen[:2]]), torch.arange(60))
    assert torch.equal(torch.cat([corner for _, _, corner in seen[2:]]), drawn[1]["corner"])
    digits, pixels = run.data, torch.cat([images for images, _, _ in seen[:2]]).flatten(1)
    trained = {tuple(row): label for row, label in zip(
        digits.train_images[run.train].flatten(1).tolist(),
        digits.train_labels[run.train].tolist(), strict=True)}  # fmt: skip
    assert len(trained) == 60 == len({tuple(row) for row in pixels.tolist()})
    assert [trained[tuple(row)] for row in pixels.tolist()] == torch.cat(labels[:2]).tolist()


@pytest.mark.parametrize("how", [{"label_smoothing": 0.2}, {"mixup": 1.0}, {"cutmix": 1.0}])
def test_mixed_targets_reach_the_loss(how):
    targets = []
    run = task(method=False, phases=1, epochs=1, augmentation=Augmentation(**how))
    run.loss = lambda logits, y, inputs: (targets.append(y), F.cross_entropy(logits, y))[1]
    fit(run)
    for y in targets:
        assert y.shape[1] == 10 and y.is_floating_point()
        torch.testing.assert_close(y.sum(1), torch.ones(len(y)))


def test_dropout_is_drawn_from_the_seed():
    """What a network draws itself: the same twice, also from another state of the generator."""

    def dropped(start):
        torch.manual_seed(start)
        run = task(method=False, phases=1, epochs=1)
        run.model.fc.register_forward_pre_hook(
            lambda module, inputs: F.dropout(inputs[0], 0.5, module.training)
        )
        done, after = fit(run), torch.rand(())
        torch.manual_seed(start)
        assert after == torch.rand(()), "fit used the generator of its caller"
        return done.history[0]["train_loss"]

    assert dropped(1) == dropped(2) != fit(task(method=False, phases=1)).history[0]["train_loss"]


def test_bfloat16_trains_and_is_evaluated_in_float32():
    run, seen = task(method=False, phases=1, epochs=8, precision="bfloat16"), set()
    run.model.fc.register_forward_hook(lambda fc, _, out: seen.add((fc.training, out.dtype)))
    done = fit(run)
    assert seen == {(True, torch.bfloat16), (False, torch.float32)}
    assert all(v.dtype != torch.bfloat16 for v in done.best["weights"].values())
    assert done.history[-1]["train_loss"] < done.history[0]["train_loss"]
    split = Split.test(run.data, "cpu")
    run.model.load_state_dict(done.best["weights"])
    want = done.history[done.best["index"]]["test_accuracy"]
    assert accuracy(deployed_copy(run.model.eval()), split) == want


def test_a_deadline_leaves_a_checkpoint():
    kept = []
    with pytest.raises(OutOfTime):
        fit(task(), checkpoint=kept.append, deadline=0.0)
    assert len(kept) == 1 and kept[0]["progress"]["batch"] == 1  # one step, then it stopped
    assert fit(task(), resume=kept[0]).history == fit(task()).history


@pytest.mark.parametrize("select, later", [("validation", True), ("test", False)])
def test_selection_follows_its_own_split(select, later):
    """Validation: the later of equals, so that the smaller learning rate wins. Test: the first."""
    protocol = "clean" if select == "validation" else "paper"
    done = fit(task(method=False, protocol=protocol, phases=1, epochs=8, select=select))
    scores = [epoch[f"{select}_accuracy"] for epoch in done.history]
    places = [i for i, score in enumerate(scores) if score == max(scores)]
    assert done.best["index"] == places[-1 if later else 0]
    assert (done.history[0]["validation_accuracy"] is None) == (select == "test")


@pytest.mark.parametrize("next_start", ["best", "last"])
def test_a_phase_goes_on_from_the_best_or_the_last(next_start):
    start = []

    class Watch(Cycle):
        def start_cycle(self, images=None):
            start.append({k: v.clone() for k, v in self.model.state_dict().items()})
            super().start_cycle(images)

    run = task(next_start=next_start, epochs=6, learning_rate=4.0, momentum=0.0, nesterov=False)
    run.method = Watch(run.model, warmup=2, restructure="none")
    kept = []

    def keep(state):
        if state["progress"]["batch"] == 0:  # at the end of an epoch
            kept.append((state["progress"]["epoch"], copy.deepcopy(state["model"])))

    done = fit(run, checkpoint=keep, checkpoint_seconds=-1)
    first = [epoch for epoch in done.history if epoch["phase"] == 0]
    best = max(range(6), key=lambda i: (first[i]["validation_accuracy"], i))
    wanted = kept[best if next_start == "best" else 5][1]
    assert best != 5, "the two rules must differ for this test to say anything"
    assert all(torch.equal(v, wanted[k]) for k, v in start[1].items())


@pytest.mark.parametrize("reseed", [False, True])
def test_phases_see_a_new_order_unless_reseeded(reseed):
    orders = []
    run = task(method=False, reseed_each_phase=reseed, augmentation=Augmentation())
    run.loss = lambda logits, labels, inputs: (
        orders.append(labels.tolist()),
        F.cross_entropy(logits, labels),
    )[1]
    fit(run)
    batches = math.ceil(60 / 32)
    assert (orders[:batches] == orders[3 * batches : 4 * batches]) == reseed
    assert orders[:batches] != orders[batches : 2 * batches]  # epochs always differ


@pytest.mark.parametrize("clip, clipped", [("all", True), ("decayed", False)])
def test_clipping_covers_the_group_that_it_names(clip, clipped):
    """With a tiny bound and no decay-free clipping, the classifier moves far or hardly at all."""
    run = task(method=False, clip=clip, clip_norm=1e-6, phases=1, epochs=1, momentum=0.0,
               nesterov=False)  # fmt: skip
    before = run.model.fc.bias.detach().clone()
    fit(run)
    assert bool((run.model.fc.bias - before).abs().max() < 1e-5) == clipped


def test_the_logged_accuracy_is_that_of_the_current_rate():
    """Evaluation is on the fused network, so a rate that fusing forgot would show."""
    run = task(phases=1)
    run.method = Cycle(run.model, warmup=50, rate_schedule="ramp")
    done = fit(run)
    model, digits = run.model.eval(), run.data
    now = accuracy(model, Split.test(digits, "cpu"))
    assert abs(now - done.history[-1]["test_accuracy"]) < 2 / 797
    for block in outermost_blocks(model).values():
        assert block.rate.item() == pytest.approx(done.history[-1]["rate"])


def test_flops_are_those_of_the_convolutions():
    """Forward plus two backward passes per convolution, but for the first layer's input."""
    run = task(method=False)
    student, teacher = training_flops(run)
    assert teacher == 0
    blocks = list(outermost_blocks(run.model).values())
    space = [64, 16, 16, 4]
    macs = [
        (9 + 1) * b.in_channels * b.out_channels * s for b, s in zip(blocks, space, strict=True)
    ]
    last = run.model.fc.in_features * 10
    assert student == 2 * (3 * sum(macs) - macs[0] + 3 * last)
    report = deployed_report(run.model, Split.test(run.data, "cpu"))
    plain = [9 * b.in_channels * b.out_channels * s for b, s in zip(blocks, space, strict=True)]
    assert report["flops"] == 2 * (sum(plain) + last)
    assert report["fusing_error"] < 1e-5


def test_flops_are_those_of_the_crops_that_are_trained_on():
    """The whole image is another size: what is cropped of 8 x 8 pixels is made 16 x 16."""
    run, crops = task(method=False), task(method=False, augmentation=Augmentation(resized_crop=16))
    enlarged = run.data.train_images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    run.data = dataclasses.replace(run.data, train_images=enlarged)
    assert training_flops(crops) == training_flops(run)
