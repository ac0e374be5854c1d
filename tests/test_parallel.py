"""Several processes and lower precision: the network that all hold, and the gradients that count.

Two gloo processes are started once, go through every scenario below and leave what they found; a
test reads it. What changes a network must leave the same bits in both.
"""

import contextlib
import copy
import dataclasses
import datetime
import functools
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import small_task
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from whole import scrambled

from replib import parallel
from replib.errors import UserError
from replib.experiments import executor
from replib.experiments.cells import Plan, Planned
from replib.experiments.claims import Held
from replib.experiments.executor import Outcome, run_plan
from replib.experiments.params import Cell
from replib.experiments.queue import states_folder
from replib.experiments.store import Store
from replib.methods import dyrep
from replib.methods.calibration import calibrate
from replib.methods.cycle import Cycle
from replib.methods.dyrep import DyRep
from replib.methods.repoptimizers import (
    POWER_OF,
    RepAdamW,
    RepSGD,
    multipliers,
    reinitialise,
    scales_of,
)
from replib.methods.resrep import ResRep, shrunk
from replib.models import build
from replib.report.results import Results
from replib.training import step
from replib.training.augmentation import Augmentation
from replib.training.checkpoint import write_bytes
from replib.training.loop import OutOfTime, fit
from replib.training.optimisation import parameter_groups

IMAGES = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double()
LABELS = torch.arange(16) % 5
SCENARIOS = {}


def scenario(function):
    """Something that both processes do, given which of the two it is."""
    SCENARIOS[function.__name__] = function
    return function


def over(name, values):
    """A scenario for each of these values."""

    def decorate(function):
        for label in values:
            SCENARIOS[f"{function.__name__} {label}"] = functools.partial(
                function, **{name: values[label] if isinstance(values, dict) else label}
            )
        return function

    return decorate


def go_through(rank, folder, names):
    """All of these, as one of the two processes."""
    torch.set_num_threads(1)
    timeout, store = datetime.timedelta(seconds=120), (folder / "store").as_uri()
    dist.init_process_group("gloo", store, rank=rank, world_size=2, timeout=timeout)
    try:
        found = {name: SCENARIOS[name](rank) for name in names}
        torch.save(found, folder / f"{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def together(folder, names):
    """name -> what the two processes have found; the first is this very one."""
    other = torch.multiprocessing.get_context("spawn").Process(
        target=go_through, args=(1, folder, names)
    )
    other.start()
    threads = torch.get_num_threads()
    try:
        go_through(0, folder, names)
    finally:
        torch.set_num_threads(threads)
        other.join(60)
        other.kill()
    two = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
    return {name: [found[name] for found in two] for name in names}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return together(tmp_path_factory.mktemp("two"), [n for n in SCENARIOS if "slow" not in n])


@pytest.fixture(scope="module")
def found_slowly(tmp_path_factory):
    return together(tmp_path_factory.mktemp("two"), [n for n in SCENARIOS if "slow" in n])


def same(first, second):
    """Bit for bit."""
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            same(first[key], second[key])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            same(one, other)
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    else:
        assert first == second


def network(block="repvgg", classes=5, in_channels=3):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build("digits", block, classes=classes, in_channels=in_channels)
    return scrambled(model.double()).train()


def state(model, optimizer=None):
    values = {name: value.clone() for name, value in model.state_dict().items()}
    if optimizer is not None:
        values["optimizer"] = copy.deepcopy(optimizer.state_dict()["state"])
    return values


def rows(rank):
    return slice(8 * rank, 8 * rank + 8)


def train(wrapper, optimizer, rank, after=lambda: None, steps=2):
    """Some steps in one's own loop, on images of one's own."""
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(wrapper(IMAGES[rows(rank)]), LABELS[rows(rank)]).backward()
        after()
        optimizer.step()


def sgd(model):
    return torch.optim.SGD(parameter_groups(model, 1e-3), lr=0.1, momentum=0.9)


# -- in one's own loop -----------------------------------------------------------------------------
CYCLES = {
    "official": {},
    "frozen": dict(freeze="zero"),
    "matched": dict(norm="match"),
    "calibrated": dict(calibrate=True),
    "preserving": dict(fidelity="preserving"),
    "redraw": dict(restructure="redraw"),
}


@over("options", CYCLES)
def cycle(rank, options):
    """A cycle after some steps, on images of one's own, seeds of one's own, and some steps more."""
    model = network()
    wrapper, optimizer = DistributedDataParallel(model), sgd(model)
    train(wrapper, optimizer, rank)
    method = Cycle(model, warmup=2, seed=rank, **options)
    apart, before = state(model), model.eval()(IMAGES)
    model.train()
    method.start_cycle(IMAGES[rows(rank)])
    restarted, after = state(model), model.eval()(IMAGES)
    model.train()
    optimizer = sgd(model)
    train(wrapper, optimizer, rank, method.after_backward)
    jump = ((after - before).abs().max() / before.abs().max()).item()
    return apart, restarted, state(model, optimizer), jump


@pytest.mark.slow
@pytest.mark.parametrize("kind", CYCLES)
def test_a_cycle_leaves_all_processes_the_same_network(found, kind):
    (apart, restarted, trained, jump), other = found[f"cycle {kind}"]
    statistics = [name for name in apart if "running" in name]
    assert any(not torch.equal(apart[name], other[0][name]) for name in statistics)
    same(restarted, other[1])
    buffers = ("running_mean", "running_var", "num_batches_tracked")  # of one's own again
    for values in (trained, other[2]):
        for name in [name for name in values if name.endswith(buffers)]:
            del values[name]
    same(trained, other[2])
    assert any(not torch.equal(restarted[name], trained[name]) for name in trained if name in apart)
    if kind == "preserving":  # the function of the first process, statistics included
        assert jump < 1e-12 < other[3]


def growing(model, optimizer, **options):
    options = dict(interval=1, last_epoch=100, calibration_batches=2, score="snip") | options
    return DyRep(model, optimizer, **options)


def slopes(block, value):
    """As if two branches had faded."""
    for number, branch in enumerate(block.side_branches.values()):
        dyrep.last_norm(branch).weight.data.fill_(value if number < 2 else 1.5)


@scenario
def growth(rank):
    """Epochs in each of which a block grows; in the last, branches are cut. Wrapped again."""
    model = network("convbn")
    wrapper, optimizer = DistributedDataParallel(model), sgd(model)
    method = growing(model, optimizer, recalibration_batches=1)
    states = []
    for epoch in range(3):
        if epoch == 2:
            for path in method.structure:
                slopes(model.get_submodule(path), 0.01)
        train(wrapper, optimizer, rank, method.after_backward)
        adjusted = method.after_epoch([IMAGES[rows(rank)]])
        states.append(state(model, optimizer))  # before a wrapper makes them equal
        if adjusted:
            wrapper = DistributedDataParallel(model)
    train(wrapper, optimizer, rank, steps=1)
    learned = {n: p.grad is not None and bool(p.grad.any()) for n, p in model.named_parameters()}
    return states, method.log, [p.detach() for p in model.parameters()], learned


def test_growth_and_cuts_leave_all_processes_the_same_network(found):
    (states, log, trained, learned), other = found["growth"]
    same(states, other[0])
    same(log, other[1])
    same(trained, other[2])
    assert [entry["grown"] is not None for entry in log] == [True] * 3 and log[2]["cut"]
    assert len({entry["grown"] for entry in log}) > 1
    assert all(learned.values()), [name for name, there in learned.items() if not there]
    assert len(states[0]) < len(states[1])


@scenario
def forgotten(rank):
    """The wrapper of before the growth goes on to be used."""
    model = network("convbn")
    wrapper, optimizer = DistributedDataParallel(model), sgd(model)
    method = growing(model, optimizer)
    try:
        for _ in range(2):
            train(wrapper, optimizer, rank, method.after_backward)
            method.after_epoch([IMAGES[rows(rank)]])
    except RuntimeError as error:
        return str(error)


def test_a_network_that_was_not_wrapped_again_is_noticed(found):
    for said in found["forgotten"]:
        assert "different parameters" in said and "DistributedDataParallel(model)" in said


@scenario
def scores(rank):
    """Of gradients that are averaged; statistics do not come in."""
    model = network("convbn").eval()
    method = growing(model, None)
    train(DistributedDataParallel(model), sgd(model), rank, method.after_backward, steps=3)
    return method.means()


def test_scores_are_those_of_the_whole_batch(found):
    model = network("convbn").eval()
    method, optimizer = growing(model, None), sgd(model)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(IMAGES), LABELS).backward()
        method.after_backward()
        optimizer.step()
    same(*found["scores"])
    for name, values in method.means().items():
        # float64; synflow is what is left of a sum in which all but an eps cancels
        assert found["scores"][0][name] == pytest.approx(values, rel=1e-9, abs=1e-12), name


@scenario
def measured(rank):
    model = network()
    calibrate(model, [IMAGES[rows(rank)][:4], IMAGES[rows(rank)][4:]])
    return state(model)


def test_calibration_is_over_the_batches_of_all(found):
    model = network()
    calibrate(model, IMAGES.split(4))
    same(*found["measured"])
    for name, value in state(model).items():
        if "tracked" not in name:
            torch.testing.assert_close(found["measured"][0][name], value, rtol=1e-12, atol=1e-12)


@scenario
def pruning(rank):
    """Steps after each of which more channels are masked; the network of the first is pruned."""
    model = network("convbn")
    method = resrep(model)
    optimizer = torch.optim.SGD(method.parameter_groups(1e-3), lr=0.1, momentum=0.9)
    wrapper = DistributedDataParallel(model)
    for _ in range(3):
        train(wrapper, optimizer, rank, method.after_backward, steps=1)
        method.after_step()
    trained = [parameter.detach().clone() for parameter in model.parameters()]
    masks, pruned = method.state_dict()["masks"], method.pruned()
    shorter, kept = shrunk(network("convbn"), IMAGES, target=0.6, rule="magnitude")
    return trained, masks, state(pruned), state(shorter), kept


def resrep(model):
    return ResRep(model, IMAGES, target=0.6, interval=1, rows=2, strength=1e-2, drop="target")


def test_all_processes_prune_the_same_channels(found):
    (trained, masks, pruned, shorter, kept), other = found["pruning"]
    same((trained, masks, pruned, shorter, kept), other)
    assert sum(int((mask == 0).sum()) for mask in masks.values()) >= 4
    assert sum(map(torch.numel, pruned.values())) < sum(map(torch.numel, trained))


@scenario
def too_early(rank):
    """Wrapped before the compactors are there."""
    model = network("convbn")
    wrapper = DistributedDataParallel(model)
    method = resrep(model)
    optimizer = torch.optim.SGD(method.parameter_groups(1e-3), lr=0.1)
    train(wrapper, optimizer, rank, method.after_backward, steps=1)
    try:
        method.after_step()
    except RuntimeError as error:
        return str(error)


def test_a_network_that_was_wrapped_too_early_is_noticed(found):
    for said in found["too_early"]:
        assert "different parameters" in said and "after ResRep" in said


REPOPTIMIZERS = {"sgd": RepSGD, "adamw": RepAdamW}


def searched(seed, **shape):
    """A search network whose scales are no ones, nor those of another seed."""
    generator, search = torch.Generator().manual_seed(seed), network("csla", **shape)
    with torch.no_grad():
        for scale in scales_of(search).values():
            scale.mul_(1 + torch.rand(scale.shape, generator=generator, dtype=scale.dtype))
    return search


@over("kind", list(REPOPTIMIZERS))
def multiplied(rank, kind):
    """Scales, and kernels to begin with, of one's own."""
    model, search = network("convbn"), searched(rank)
    wrapper = DistributedDataParallel(model)
    reinitialise(model, search, torch.Generator().manual_seed(rank))
    optimizer = REPOPTIMIZERS[kind](model, search, lr=0.01)
    train(wrapper, optimizer, rank, steps=3)
    return [p.detach() for p in model.parameters()], [*optimizer.factors.values()]


@pytest.mark.parametrize("kind", REPOPTIMIZERS)
def test_multipliers_are_those_of_the_first(found, kind):
    same(*found[f"multiplied {kind}"])
    want = multipliers(network("convbn"), searched(0), POWER_OF[kind])
    same(found[f"multiplied {kind}"][0][1], [*want.values()])


@scenario
def agreement(rank):
    """In every memory layout and dtype; numbers of the first."""
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3).double())
    layout = torch.channels_last if rank else torch.contiguous_format
    model.to(memory_format=layout)
    own = state(model)
    before = parallel.same(model)
    parallel.agree(model)
    numbers = parallel.of_the_first([rank + 0.5, None, not rank])
    return own, state(model), (before, parallel.same(model)), numbers


def test_agreement_is_with_the_first(found):
    for _, after, (before, now), numbers in found["agreement"]:
        same(after, found["agreement"][0][0])
        assert not before and now and numbers == [0.5, None, 1.0]


# -- in the training loop --------------------------------------------------------------------------
RECIPE = dict(
    phases=1, epochs=2, batch_size=25, learning_rate=0.1, momentum=0.9, nesterov=True,
    weight_decay=1e-3, clip_norm=1.0, clip="all", augmentation=Augmentation(crop_padding=1),
    next_start="last", select="validation", reseed_each_phase=False, accumulate=2,
)  # fmt: skip
GROWS = dict(interval=1, last_epoch=100, calibration_batches=1, score="snip")
RUNS = {  # 60 images in batches of 25, 25 and 10, in parts of 13: one process is left without
    "cycle": (
        dict(phases=2, epochs=1, augmentation=Augmentation(mixup=1.0)),
        "repvgg",
        lambda model: Cycle(model, warmup=2, fidelity="preserving"),
    ),
    "dyrep slow": (dict(epochs=3), "convbn", lambda model: DyRep(model, **GROWS)),
    "orepa slow": (dict(optimizer="adamw", ema=0.9), "orepa", lambda model: None),
    "resrep slow": (
        {},
        "convbn",
        lambda model: ResRep(model, DIGITS, target=0.6, interval=2, rows=2, strength=1e-2),
    ),
    "repopt slow": ({}, "convbn", lambda model: None),
    # One part, whose norms see all of it; of the last batch, of one image, one process sees none.
    "split": (dict(accumulate=1, batch_size=59, ema=0.9), "repvgg", lambda model: None),
    "split dbb slow": (dict(accumulate=1), "dbb", lambda model: None),
    "split cycle slow": (
        dict(accumulate=1, phases=2, epochs=1),
        "repvgg",
        lambda model: Cycle(model, warmup=2, fidelity="preserving"),
    ),
    "split resrep slow": (
        dict(accumulate=1),
        "convbn",
        lambda model: ResRep(model, DIGITS, target=0.6, interval=2, rows=2, strength=1e-2),
    ),
    "split dyrep slow": (
        dict(accumulate=1, epochs=3),
        "convbn",
        lambda model: DyRep(model, **GROWS),
    ),
}
DIGITS = torch.zeros(1, 1, 8, 8, dtype=torch.float64)


def norms(model, accumulate):
    return parallel.synchronised(model) if parallel.splits(accumulate) else model


@contextlib.contextmanager
def by_oneself():
    """As if there were no other process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "processes", lambda: 1)
        patch.setattr(parallel, "place", lambda: 0)
        yield


def stopped(kind, steps=4):
    """The checkpoint after so many steps."""
    kept = []
    with contextlib.suppress(OutOfTime):
        fit(task(kind), checkpoint=kept.append, checkpoint_seconds=-1)
    return copy.deepcopy(kept[steps - 1])


def task(kind):
    recipe, block, method = RUNS[kind]
    made = small_task(
        RECIPE | recipe,
        lambda model: parameter_groups(model, 1e-3),
        lambda model: method(norms(model.double(), (RECIPE | recipe)["accumulate"])),
        block=block,
    )
    if "resrep" in kind:
        made.groups = lambda: made.method.parameter_groups(1e-3)
    if kind.startswith("repopt"):
        search, model = searched(0, in_channels=1, classes=10), made.model.double()
        reinitialise(model, search, torch.Generator().manual_seed(0))
        kind = functools.partial(RepSGD, model, search)
        made.optimizer = functools.partial(step.sgd, momentum=0.9, nesterov=True, kind=kind)
    return made


@over("kind", list(RUNS))
def trained(rank, kind):
    """A whole run, and one that was stopped after a step and goes on."""
    run, kept = task(kind), []
    history = fit(run).history
    stopped, resumed, ends = task(kind), task(kind), False
    try:
        fit(stopped, checkpoint=kept.append, deadline=0.0)
    except OutOfTime:
        ends = True
    written = [copy.deepcopy(kept)]
    dist.broadcast_object_list(written, 0)
    again = fit(resumed, resume=written[0][0]).history
    return state(run.model), history, state(resumed.model), again, ends, len(kept)


MOVED = ["split", "split cycle slow", "orepa slow", "resrep slow"]


@over("kind", MOVED)
def moved(rank, kind):
    """A run that one process began and two go on with; a checkpoint of two, for one."""
    with by_oneself():
        begun = stopped(kind)
    run = task(kind)
    history = fit(run, resume=begun).history
    kept = []
    fit(task(kind), checkpoint=lambda state: kept.append(copy.deepcopy(state)),
        checkpoint_seconds=-1)  # fmt: skip
    return state(run.model), history, kept[3] if kept else None


def check_moved(found, kind):
    alone = task(kind)
    whole = fit(alone).history
    (model, history, checkpoint), other = found[f"moved {kind}"]
    same((model, history), other[:2])
    assert other[2] is None
    back = task(kind)
    again = fit(back, resume=checkpoint).history
    for one, theirs in ((model, history), (state(back.model), again)):
        for name, value in alone.model.state_dict().items():  # float64, sums in another order
            torch.testing.assert_close(one[name], value, rtol=1e-7, atol=1e-9, msg=name)
        for ours, wanted in zip(theirs, whole, strict=True):
            assert known(ours) == pytest.approx(known(wanted), rel=1e-6)


def known(row):
    """A row of a history less what a run does not have."""
    return {name: value for name, value in row.items() if value is not None}


@pytest.mark.parametrize("kind", [kind for kind in MOVED if "slow" not in kind])
def test_a_run_goes_on_with_another_number_of_processes(found, kind):
    check_moved(found, kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in MOVED if "slow" in kind])
def test_a_run_of_any_method_goes_on_with_another_number(found_slowly, kind):
    check_moved(found_slowly, kind)


def check_run(found, kind):
    """The two processes, and this one alone."""
    run = task(kind)
    alone = fit(run).history
    (model, history, resumed, again, *ends), other = found[f"trained {kind}"]
    same((model, history), other[:2])
    same((model, history), (resumed, again))  # bit for bit
    assert (ends, list(other[4:])) == ([True, 1], [True, 0])  # both stop, the first writes
    # float64, sums in another order; a block that has grown pads with its process's statistics
    close = dict(rtol=1e-2, atol=1e-3) if kind.startswith("dyrep") else dict(rtol=1e-7, atol=1e-9)
    for name, value in run.model.state_dict().items():
        if (value.is_floating_point() and "running" not in name) or close["rtol"] < 1e-3:
            torch.testing.assert_close(model[name], value, **close, msg=name)
    for ours, theirs in zip(history, alone, strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=close["rtol"])
    return ours, theirs


@pytest.mark.parametrize("kind", [kind for kind in RUNS if "slow" not in kind])
def test_processes_train_what_one_trains(found, kind):
    ours, theirs = check_run(found, kind)
    assert known(ours) == pytest.approx(known(theirs), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in RUNS if "slow" in kind])
def test_processes_train_what_one_trains_by_every_method(found_slowly, kind):
    check_run(found_slowly, kind)


def test_a_part_for_each_process(monkeypatch):
    monkeypatch.setattr(parallel, "processes", lambda: 3)
    run = task("cycle")
    with pytest.raises(ValueError, match=r"accumulate \(=2\) must be a multiple of 3"):
        fit(run)


def test_what_cannot_be_split(monkeypatch):
    """Mixing within a batch, and norms that see a share of it only."""
    monkeypatch.setattr(parallel, "processes", lambda: 3)
    run = task("split")
    run.recipe = dataclasses.replace(run.recipe, augmentation=Augmentation(mixup=1.0))
    with pytest.raises(ValueError, match=r"accumulate \(=1\) with mixup .* accumulate=3"):
        fit(run)
    run = task("split")
    run.kind = object()
    with pytest.raises(ValueError, match=r"accumulate \(=1\) with transfer .* accumulate=3"):
        fit(run)
    with by_oneself():
        run = task("split")
    with pytest.raises(ValueError, match=r"needs a model of parallel.synchronised"):
        fit(run)


@pytest.mark.parametrize("images, count", [(25, 2), (25, 4), (3, 4), (1, 2)])
def test_a_part_is_split_evenly(monkeypatch, images, count):
    monkeypatch.setattr(parallel, "processes", lambda: count)
    seen = []
    for turn in range(count):
        monkeypatch.setattr(parallel, "place", lambda turn=turn: turn)
        share = parallel.share(images, 64, split=True)
        assert share.rows.start < share.rows.stop <= images and not share.alone
        seen.append(list(range(images)[share.rows]) if share.parts else [])
    assert [i for rows in seen for i in rows] == list(range(images))
    assert max(map(len, seen)) - min(map(len, seen)) <= 1


NORMS = {"images": (nn.BatchNorm2d, (6, 3, 4, 4)), "rows": (nn.BatchNorm1d, (6, 3))}
NORMS["average"] = (functools.partial(nn.BatchNorm1d, momentum=None), (6, 3))
NORMS["plain"] = (functools.partial(nn.BatchNorm2d, affine=False), (6, 3, 2, 2))
NORMS["forgetful"] = (functools.partial(nn.BatchNorm1d, track_running_stats=False), (6, 3))


def stirred(layer):
    """With statistics, slopes and shifts that are not those of a fresh norm, where it has any."""
    for tensor in (*layer.parameters(), *layer.buffers()):
        if tensor.is_floating_point():
            tensor.data += torch.linspace(0.1, 0.7, tensor.numel(), dtype=tensor.dtype)
    return layer


@over("kind", NORMS)
def norm_over_all(rank, kind):
    """Two images here, four there; then all there, while what is here does not count."""
    make, shape = kind
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3)).double() + 100
    layer = nn.Sequential(make(shape[1]).double())
    statistics = stirred(layer).state_dict()
    model, out = parallel.synchronised(layer), []
    assert type(model[0]) is parallel.Synchronised and list(model.state_dict()) == list(statistics)
    for rows, counts in ((slice(2 * rank, 2 + 4 * rank), True), (slice(0, 6), rank == 1)):
        mine = x[rows].clone().requires_grad_()
        with parallel.counting(counts):
            y = model.train()(mine)
        loss = (y**3).sum() * counts
        grads = torch.autograd.grad(loss, [mine, *model.parameters()])
        parallel.add_up(grads[1:])
        out.append((y.detach(), *grads))
    return out, state(model), model.eval()(x)


@pytest.mark.parametrize("kind", NORMS)
def test_a_synchronised_norm_sees_the_batch_of_all(found, kind):
    make, shape = NORMS[kind]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3)).double() + 100
    layer = stirred(nn.Sequential(make(shape[1]).double())).train()
    (first, statistics, evaluated), (second, *same_there) = found[f"norm_over_all {kind}"]
    close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)
    for turn in range(2):
        all_of_it = x.clone().requires_grad_()
        y = layer(all_of_it)
        wanted = torch.autograd.grad((y**3).sum(), [all_of_it, *layer.parameters()])
        pairs = [first[turn], second[turn]] if turn == 0 else [second[turn]]
        close(torch.cat([one[0] for one in pairs]), y.detach())
        close(torch.cat([one[1] for one in pairs]), wanted[0])
        for ours, theirs in zip(second[turn][2:], wanted[1:], strict=True):
            close(ours, theirs)
    same([statistics, evaluated], same_there)
    for name, value in layer.state_dict().items():
        close(statistics[name], value, check_dtype=False)
    close(evaluated, layer.eval()(x).detach())


@pytest.mark.parametrize("images, part, count", [(25, 13, 3), (25, 5, 2), (4, 4, 2), (7, 2, 4)])
def test_every_part_is_dealt_out_once(monkeypatch, images, part, count):
    monkeypatch.setattr(parallel, "processes", lambda: count)
    seen, later = [], []
    for turn in range(count):
        monkeypatch.setattr(parallel, "place", lambda turn=turn: turn)
        share = parallel.share(images, part)
        assert share.images == images and share.count == -(-images // part)
        assert share.rows.start < share.rows.stop  # there is always something to go through
        seen += range(images)[share.rows] if share.parts else []
        later.append((share.parts, share.later))
    assert seen == list(range(images))
    assert all(
        rest == sum(parts for parts, _ in later[i + 1 :]) for i, (_, rest) in enumerate(later)
    )


# -- lower precision, and a batch in parts ---------------------------------------------------------
class Loop:
    """A network, its optimizer, what is called in every step, and what has been found out."""

    block = "convbn"

    def __init__(self):
        self.model = network(self.block).float().eval()
        self.optimizer = self.prepared()

    def prepared(self):
        return sgd(self.model)

    def after_backward(self):
        pass

    def report(self):
        return {}


class Orepa(Loop):
    block = "orepa"


class Frozen(Loop):
    block = "repvgg"

    def prepared(self):
        method = Cycle(self.model, warmup=2, freeze="zero")
        method.epoch(0)
        self.after_backward = method.after_backward
        return sgd(self.model)


class Scored(Loop):
    def prepared(self):
        optimizer = sgd(self.model)
        self.method = growing(self.model, optimizer)
        self.after_backward = self.method.after_backward
        return optimizer

    def report(self):
        return self.method.means() | {"steps": [self.method.count.item()]}


class Pruned(Loop):
    def prepared(self):
        method = resrep(self.model)
        self.after_backward, self.method = method.after_backward, method
        return torch.optim.SGD(method.parameter_groups(1e-3), lr=0.1, momentum=0.9)


class Multiplied(Loop):
    kind = RepSGD

    def prepared(self):
        return self.kind(self.model, searched(0).float(), lr=0.01)


class MultipliedAdamW(Multiplied):
    kind = RepAdamW


LOOPS = {kind.__name__: kind for kind in (Orepa, Frozen, Scored, Pruned, Multiplied,
                                          MultipliedAdamW)}  # fmt: skip


def looped(kind, scaler=None, parts=1, steps=3, overflow=None):
    """Some steps in float32, norms as evaluated, so that a batch is the sum of its parts."""
    loop = LOOPS[kind]()
    for turn in range(steps):
        loop.optimizer.zero_grad()
        for x, y in zip(IMAGES.float().chunk(parts), LABELS.chunk(parts), strict=True):
            loss = F.cross_entropy(loop.model(x), y) / parts
            (loss if scaler is None else scaler.scale(loss)).backward()
        if turn == overflow:
            next(loop.model.parameters()).grad.view(-1)[0] = float("inf")
        if scaler is None:
            loop.after_backward()
            loop.optimizer.step()
        else:
            scaler.unscale_(loop.optimizer)
            loop.after_backward()
            scaler.step(loop.optimizer)
            scaler.update()
    return state(loop.model), loop.report()


@pytest.mark.parametrize("kind", LOOPS)
def test_a_scaled_loss_trains_the_same_network(kind):
    """A power of 2 is exact, and nothing here is small enough to be lost without it."""
    same(looped(kind), looped(kind, torch.amp.GradScaler("cpu", init_scale=2.0**12)))


@pytest.mark.parametrize("kind", LOOPS)
def test_a_step_that_overflows_is_as_if_it_had_not_been(kind):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    same(looped(kind, scaler, overflow=2), looped(kind, steps=2))
    assert scaler.get_scale() == 2.0**11


@pytest.mark.parametrize("kind", LOOPS)
def test_a_batch_in_parts_trains_the_same_network(kind):
    (whole, said), (parts, too) = looped(kind), looped(kind, parts=2)
    for name, value in whole.items():  # float32: sums in another order
        torch.testing.assert_close(parts[name], value, rtol=1e-4, atol=1e-5, msg=name)
    for name in said.keys() - {"synflow"}:  # which is what rounding leaves of it
        assert too[name] == pytest.approx(said[name], rel=1e-4)


@pytest.mark.parametrize("kind", ["preserving", "matched", "calibrated"])
def test_a_cycle_is_in_full_precision(kind):
    """Also where autocast is on: it would measure in bfloat16, and with kernels of before."""
    lower = functools.partial(torch.autocast, "cpu", torch.bfloat16)

    def restarted(**options):
        model = network().float()
        with lower(**options):
            Cycle(model, warmup=2, **CYCLES[kind]).start_cycle(IMAGES.float())
        return state(model)

    same(restarted(), restarted(enabled=False))
    model = network().float()
    with lower():
        model(IMAGES.float())
        Cycle(model, warmup=2, **CYCLES[kind]).start_cycle(IMAGES.float())
        within = model.eval()(IMAGES.float())
    with lower():
        assert torch.equal(within, model(IMAGES.float()))


def test_growth_is_in_full_precision():
    def grown(lower):
        model = network("convbn").float()
        method = growing(model, None, score="random")
        with torch.autocast("cpu", torch.bfloat16, enabled=lower):
            method.after_epoch([IMAGES.float()])
        return state(model)

    same(grown(True), grown(False))


# -- which cells -----------------------------------------------------------------------------------
CELLS = {key: Planned(key, Cell.model_construct(seed=0, epochs=1)) for key in ("one", "other")}
SEEN = {"the other is missing": ["other"], "none is": [], "both are": ["one", "other"]}


def run_of(cells, seen, train=lambda store, key, tick, tries: None):
    """What a process trains of a plan of these cells that it finds missing, or what it says."""
    trained = []

    def run_cell(planned, cells, store, *, tick, **_):
        trained.append(planned.key)
        train(store, planned.key, tick, len(trained))

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Plan, "missing", lambda plan, store: [CELLS[key] for key in seen])
        patch.setattr(executor, "settle", lambda threads: None)  # of this process, for good
        patch.setattr(executor, "run_cell", run_cell)
        try:
            done = run_plan(Plan(cells), Store(Path(folder)), device="cpu")
        except UserError as error:
            return str(error)
    return trained, done


@over("seen", SEEN)
def chosen(rank, seen):
    """The second process sees other files of the store than the first."""
    return run_of(CELLS, seen if rank else ["one"])


@pytest.mark.parametrize("seen", SEEN)
def test_all_processes_train_the_cells_that_the_first_one_misses(found, seen):
    assert found[f"chosen {seen}"] == [(["one"], Outcome(1, 1, 0))] * 2


@scenario
def unknown(rank):
    """The second process has other code, or other data: its cells have other keys."""
    return run_of({"other": CELLS["other"]} if rank else CELLS, ["other"] if rank else ["one"])


def test_a_cell_that_one_process_does_not_know_is_refused_by_all(found):
    said, other = found["unknown"]
    assert said == other and "\n" not in said
    assert re.match(r"process 1, on .*, does not know cell one, .* same code", said)


@scenario
def overtaken(rank):
    """Another run takes over the cell of both, who were away, and gives it back."""
    there = []

    def train(store, key, tick, tries):
        checkpoint = store.folder(key) / "checkpoint.ckpt"
        if rank == 0:
            if tries == 1:
                write_bytes(store.folder(key) / "claim.1", b'{"released": true}')
            store.save(key, "checkpoint", {})  # by the first process, in the middle of an epoch
            there.append(checkpoint.exists())
        tick()
        store.save(key, "weights", {})
        there.append((store.folder(key) / "weights.ckpt").exists())

    return run_of(CELLS, ["one"], train), there


def test_processes_that_were_overtaken_stop_together(found):
    """At the end of the epoch; until then the first one keeps what it has to itself."""
    first, second = found["overtaken"]
    assert first[0] == second[0] == (["one", "one"], Outcome(1, 1, 0))
    assert first[1] == [False, True, True] and second[1] == [False]


@scenario
def different_checkpoints(rank):
    """The second process does not see yet what is to be gone on from."""
    with tempfile.TemporaryDirectory() as folder:
        store, at = Store(Path(folder)), {"phase": 0, "epoch": 1, "batch": 0}
        store.save("one", "checkpoint", {"progress": at})  # which the first one alone writes
        said = []
        for name in ("weights", "checkpoint"):
            try:
                said.append(Held(store, 0).load("one", name)[1])
            except UserError as error:
                said.append(str(error).replace(folder, "FOLDER"))
        return said


def test_processes_do_not_go_on_from_different_checkpoints(found):
    first, second = found["different_checkpoints"]
    assert first == second and first[0] is None
    assert first[1].startswith("the processes see different checkpoints of cell one in FOLDER")


# -- from the command line -------------------------------------------------------------------------
TABLE = """
title: t
question: q
control: base
seeds: [0]
cell: {data: digits, train_images: 60, held_out: 20, body: digits, epochs: 2, batch_size: 20,
       accumulate: 2, learning_rate: 0.1}
rows:
  base: {label: Base}
  cycle: {label: Cycle, start: base, set: {phases: 2, epochs: 1, cycle: {warmup: 1}}}
"""


@pytest.mark.slow
def test_torchrun_trains_a_table(project, in_process):
    """Two processes leave one piece of evidence for each cell, which is that of one process."""
    project.table("two", TABLE)
    command = "-m torch.distributed.run --standalone --nproc-per-node 2 -m replib run two".split()
    bundle = project.folder / "out" / "results.json"
    command += ["--profile", "tiny", "--device", "cpu", "--out", str(bundle)]
    options = dict(env=project.environment, cwd=project.folder, capture_output=True, text=True)
    Results("two", "tiny").train(device="cpu", budget_seconds=0.001)  # so that there is a file
    stopped = subprocess.run([sys.executable, *command, "--budget-seconds", "0.001"], **options)
    assert stopped.returncode == 0, stopped.stderr
    assert stopped.stdout.count("to go on from") == 1 and "2 cells not finished" in stopped.stdout
    assert bundle.is_file() and len(list(states_folder(bundle).iterdir())) == 1
    done = subprocess.run([sys.executable, *command], **options)
    assert done.returncode == 0, done.stderr
    assert list(states_folder(bundle).iterdir()) == []
    assert done.stdout.count("2 cells trained") == 1  # the other process is silent
    two = Results("two", "tiny")
    together = {row: two.evidence(row)[0] for row in ("base", "cycle")}
    two.store.clean()
    alone = Results("two", "tiny")
    alone.train(device="cpu")
    for row, evidence in together.items():
        assert evidence["context"]["processes"] == 2
        ours, theirs = (e["result"]["history"] for e in (evidence, alone.evidence(row)[0]))
        # float32 over a dozen steps, sums in another order
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-3)
        assert len(ours["test_accuracy"]) == 2
