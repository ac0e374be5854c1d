"""Several cells at once: how many, in which order, and for how long."""

import errno
import itertools
import json
import os
import platform
import re
import time
import weakref
from pathlib import Path

import pytest
import torch
from conftest import TINY

from replib.errors import UserError
from replib.experiments import executor
from replib.experiments.cells import Planned, cost_of, plan
from replib.experiments.claims import Claims, Held
from replib.experiments.executor import NotTrained, check_writable, run_plan, urgency
from replib.experiments.packing import GAIN, Packing, next_number
from replib.experiments.params import Cell, Table
from replib.experiments.store import Store
from replib.report.results import Results
from replib.training.loop import OutOfTime, training_flops
from replib.training.step import Step

CELL = dict(data="digits", train_images=60, held_out=20, body="digits", epochs=2, batch_size=20,
            learning_rate=0.1)  # fmt: skip


# -- how many share a GPU --------------------------------------------------------------------------
@pytest.mark.parametrize(
    "rates, most, number",
    [
        ({}, 8, 1),
        ({}, 0, 1),
        ({1: 10.0}, 8, 2),
        ({1: 10.0}, 1, 1),
        ({1: 10.0, 2: 10.9}, 8, 1),  # less than a tenth more
        ({1: 10.0, 2: 11.1}, 8, 4),
        ({1: 10.0, 2: 20.0, 4: 40.0}, 6, 6),  # 8 are too many
        ({1: 10.0, 2: 20.0, 4: 40.0, 6: 41.0}, 6, 4),
        ({1: 10.0, 2: 20.0, 4: 40.0, 6: 60.0}, 6, 6),
        ({1: 10.0, 2: 9.0}, 8, 1),
    ],
)
def test_the_next_number_of_cells(rates, most, number):
    assert next_number(rates, most) == number


def shared_gpu(alone: float, whole: float, most: int, cells: int = 40) -> Packing:
    """A GPU that gives a cell `alone` units a second and all together at most `whole`, simulated:
    epochs of 10 units, cells of 12 to 25 of them, 2 seconds to start."""
    packing, now = Packing(most), 0.0
    waiting, running = [f"cell{i}" for i in range(cells)], {}
    while waiting or running:
        while waiting and len(running) < packing.wanted:
            end = 12 + 5 * len(waiting) % 14
            running[waiting.pop()] = {"start": now + 2, "done": 0.0, "epochs": 0, "end": end}
        now += 0.01
        busy = [cell for cell in running.values() if cell["start"] <= now]
        for key, cell in list(running.items()):
            if cell in busy:
                cell["done"] += 0.01 * min(alone, whole / len(busy))
            if cell["done"] >= 10 * (cell["epochs"] + 1):
                cell["epochs"] += 1
                packing.tick(frozenset(running), key, 10.0, now)
            if cell["epochs"] == cell["end"]:
                del running[key]
    return packing


@pytest.mark.parametrize(
    "whole, most, number",
    [(5.0, 16, 1), (10.2, 16, 2), (17.0, 16, 4), (1000.0, 6, 6), (1000.0, 1, 1)],
)
def test_cells_are_added_while_that_makes_them_faster_together(whole, most, number):
    """One cell alone reaches 5 units a second; the rates that decide are those of the model."""
    packing = shared_gpu(5.0, whole, most)
    assert packing.wanted == number
    for n, rate in packing.rates.items():
        assert rate == pytest.approx(min(5.0 * n, whole), rel=0.02)


def test_epochs_beside_other_cells_do_not_count():
    """While one is starting the others are faster: they are measured when all have ticked."""
    packing = Packing(8, wanted=2, rates={1: 1.0})
    for now in range(5):
        packing.tick(frozenset("a"), "a", 1.0, now)
    both = frozenset("ab")
    for now in range(5, 9):
        packing.tick(both, "a", 1.0, now)
    assert packing.measured == {}
    for now in (9.0, 11.0, 13.0, 15.0, 17.0):
        packing.tick(both, "b", 1.0, now)
        packing.tick(both, "a", 1.0, now)
    assert packing.rates[2] == pytest.approx(1.0) and packing.wanted == 1


def test_memory_bounds_the_number():
    packing = Packing(16, wanted=4)
    packing.memory(2, free=60, total=80)  # 10 each
    assert packing.most == 7 and packing.wanted == 4
    packing.memory(4, free=0, total=80)
    assert packing.wanted == packing.most == 3
    packing.out_of_memory(3)
    assert packing.wanted == 2 and GAIN > 1
    assert next_number(packing.rates | {1: 1.0}, packing.most) <= 2


# -- in which order --------------------------------------------------------------------------------
def planned(key: str, start: str | None = None, teacher: str | None = None, epochs: int = 1):
    return Planned(key, Cell.model_construct(start=start, teacher=teacher, epochs=epochs, phases=1))


def test_the_longest_line_of_cells_comes_first():
    cells = [planned("a"), planned("b"), planned("c", "b"), planned("d", "c", "a"), planned("e")]
    costs = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0, "e": 8.0}
    assert urgency(cells, costs) == {"d": 4, "c": 7, "b": 9, "a": 5, "e": 8}


def test_cells_are_started_by_urgency(project, in_process, monkeypatch):
    """After the first, longer cells come first, and a long child's parent before them."""

    def row(epochs, rate=0.1, start=None):
        return dict(label="r", start=start, set={"epochs": epochs, "learning_rate": rate})

    rows = {"a": row(1), "b": row(3), "f": row(1, 0.3), "c": row(1, 0.2), "d": row(4, start="c")}
    rows["e"] = row(2)
    table = Table.model_validate(
        dict(title="t", question="q", control="a", seeds=[0], cell=CELL, rows=rows)
    )
    made, order = plan(table), []
    monkeypatch.setattr(executor, "run_cell", lambda p, *_, **__: order.append(p.rows[0]))
    run_plan(made, Store(), workers=2, device="cpu")
    assert order == ["a", "b", "c", "e", "d", "f"]  # d waits for c


def test_the_cost_of_a_cell_is_near_what_is_measured():
    cell = Cell.model_validate(CELL | {"seed": 0})
    cost = cost_of(Planned("a", cell), {})
    from test_training import task

    measured = training_flops(task(method=False))[0] * 2 * 40
    assert 0.9 < cost / measured < 1.2
    taught = cell.model_copy(update={"teacher": "t"})
    more = cost_of(Planned("b", taught), {"t": Planned("t", cell)})
    assert more == pytest.approx(cost * 4 / 3)
    larger = cell.model_copy(update={"resized_crop": 16})
    assert cost_of(Planned("c", larger), {}) > 3 * cost


# -- for how long ----------------------------------------------------------------------------------
def test_a_budget_is_filled_and_not_exceeded(project, in_process, monkeypatch):
    """Cells are started until the budget is over although none can finish in it, and each run
    of the command ends within a step of its end, far inside an epoch (of 40 steps).

    Time stands still, but for one second with every look at the clock.
    """
    count = itertools.count()
    monkeypatch.setattr(time, "monotonic", lambda: float(next(count)))
    steps = []
    update = Step.update
    monkeypatch.setattr(Step, "update", lambda *a, **k: (steps.append(1), update(*a, **k))[1])
    rows = {"a": {"label": "a"}, "b": {"label": "b", "set": {"learning_rate": 0.2}}}
    table = Table.model_validate(
        dict(title="t", question="q", control="a", seeds=[0], cell=CELL | {"batch_size": 1},
             rows=rows)
    )  # fmt: skip
    runs, done = 0, None
    while done is None or done.out_of_time:
        begin = time.monotonic()
        done = run_plan(plan(table), Store(), workers=1, device="cpu", budget_seconds=20.0)
        if done.out_of_time:
            assert 20 < time.monotonic() - begin < 20 + 25
        runs += 1
        assert runs < 60
    assert runs > 4 and len(steps) == 2 * 2 * 40, "a step was done twice, or left out"


def test_a_cell_that_does_not_stop_is_stopped(project, monkeypatch):
    """A worker that overlooks the end of the budget is given `GRACE` seconds."""
    monkeypatch.setattr(executor, "GRACE", 0.5)
    monkeypatch.setattr(executor, "work", sleep)
    table = Table.model_validate(
        dict(title="t", question="q", control="a", seeds=[0], cell=CELL, rows={"a": {"label": "a"}})
    )
    done = run_plan(plan(table), Store(), workers=1, device="cpu", budget_seconds=0.2)
    assert (done.trained, done.out_of_time) == (0, 1)


def sleep(*arguments) -> str:
    """In place of a cell, in a worker."""
    time.sleep(30)
    return "finished"


# -- when a cell fails -----------------------------------------------------------------------------
FAMILY = {
    "a": {"label": "a"},
    "b": {"label": "b", "set": {"learning_rate": 0.2}},
    "c": {"label": "c", "start": "b", "set": {"learning_rate": 0.3}},
    "d": {"label": "d", "start": "c", "set": {"learning_rate": 0.4}},
    "e": {"label": "e", "start": "a", "set": {"learning_rate": 0.5}},
}


def family():
    return plan(
        Table.model_validate(
            dict(title="t", question="q", control="a", seeds=[0], cell=CELL, rows=FAMILY)
        )
    )


FAILURES = {
    "a fault": (ZeroDivisionError("two\nlines"), r"it failed with ZeroDivisionError: two \(see "),
    "a user's mistake": (UserError("narrow: too much."), r"narrow: too much\.$"),
    "a file": (FileNotFoundError(2, "No such file", "x.jpg"), r"x\.jpg: No such file\.$"),
    "no memory": (torch.OutOfMemoryError("no"), r"it needs more memory than the GPU has"),
}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("failure", FAILURES)
def test_the_others_are_trained_where_one_fails(
    failure, workers, project, in_process, monkeypatch, capfd
):
    """All but those that wait for it; at the end it is told, in one line, which and why."""
    (error, said), made, store = FAILURES[failure], family(), Store()
    order = []

    def run_cell(planned, *_, **__):
        order.append(planned.rows[0])
        if planned.rows == ("b",):
            raise error

    monkeypatch.setattr(executor, "run_cell", run_cell)
    with pytest.raises(NotTrained, match=r"^3 of 5 cells were not trained; cell ") as told:
        run_plan(made, store, workers=workers, device="cpu")
    assert sorted(order) == ["a", "b", "e"]
    by_row = {row: key for (row, _), key in made.by_row.items()}
    assert list(told.value.failed) == [by_row[row] for row in "bcd"]
    b, c, _ = told.value.failed.values()
    assert b.startswith(f"cell {by_row['b'][:16]} (b, seed 0): ") and re.search(said, b)
    assert str(told.value).endswith(b) and "\n" not in str(told.value)
    assert f"it waits for cell {by_row['b'][:16]}" in c
    assert capfd.readouterr().out.count(b) == 1  # as soon as it is so
    left = [json.loads(path.read_bytes()) for path in store.runs.glob("*/claim.*")]
    assert all(claim["released"] for claim in left)


def test_a_cell_alone_says_why_it_failed(project, in_process, monkeypatch):
    made = family()
    (first, *_) = made.cells
    monkeypatch.setattr(executor, "run_cell", lambda *_, **__: 1 / 0)
    with pytest.raises(UserError, match=rf"^cell {first[:16]} \(a, seed 0\): it failed with Zero"):
        run_plan(made.of([first]), Store(), device="cpu")


def test_time_that_is_over_is_told_beside_a_failure(project, in_process, monkeypatch):
    def run_cell(planned, *_, **__):
        raise {"a": OutOfTime(), "b": UserError("no.")}[planned.rows[0]]

    monkeypatch.setattr(executor, "run_cell", run_cell)
    monkeypatch.setattr(executor, "GRACE", 60)
    with pytest.raises(UserError, match=r"^3 of 5 cells were not trained, 2 not finished in"):
        run_plan(family(), Store(), workers=2, device="cpu", budget_seconds=0)


@pytest.mark.parametrize("number", sorted(executor.UNWRITABLE))
def test_a_disk_that_takes_nothing_ends_the_run(number, project, in_process, monkeypatch):
    """Every other cell would find the same."""
    began = []

    def run_cell(planned, *_, **__):
        began.append(planned.key)
        raise OSError(number, os.strerror(number), "FILE")

    monkeypatch.setattr(executor, "run_cell", run_cell)
    said = rf"^FILE cannot be written \({os.strerror(number)}\): make room, .*; finished cells"
    with pytest.raises(UserError, match=said):
        run_plan(family(), Store(), workers=1, device="cpu")
    assert len(began) == 1


def test_other_trouble_with_a_file_is_told_as_it_is(project, in_process, monkeypatch):
    """Here of the store itself, on a file system that has gone away."""
    gone = OSError(errno.ESTALE, "Stale file handle", "FOLDER")
    monkeypatch.setattr(Claims, "take", lambda *_: (_ for _ in ()).throw(gone))
    with pytest.raises(UserError, match=r"^FOLDER: Stale file handle; finished cells are kept\.$"):
        run_plan(family(), Store(), workers=1, device="cpu")
    monkeypatch.setattr(Path, "touch", lambda *_: (_ for _ in ()).throw(gone))
    with pytest.raises(UserError, match=r"^FOLDER: Stale file handle\.$"):
        check_writable(Store())


def test_processes_of_many_machines_ask_whether_a_folder_can_be_written(project, monkeypatch):
    """Each with a file of its own, whatever their numbers; one that is gone is no trouble."""
    names, touch = set(), Path.touch

    def taken_away(path):
        touch(path)
        names.add(path.name)
        path.unlink()

    monkeypatch.setattr(Path, "touch", taken_away)
    for _ in range(2):
        check_writable(Store())
    assert len(names) == 2 and all(platform.node() in name for name in names)


def test_a_worker_lets_go_of_a_cell_that_failed(project, in_process, monkeypatch):
    """Its tensors would take the memory of the next one; also those of the error that led to it."""
    held = []

    def run_cell(*_, **__):
        weights = torch.zeros(3)
        held.append(weakref.ref(weights))
        try:
            raise KeyError("inner")
        except KeyError:
            raise UserError("outer") from None

    monkeypatch.setattr(executor, "run_cell", run_cell)
    (planned, *_) = family().cells.values()
    claim = Claims().take(Store().folder(planned.key))
    with pytest.raises(UserError, match="outer") as error:
        executor.work(planned, {}, Held(Store(), claim.number), {"device": "cpu"})
    claim.release()
    assert error.value.__traceback__ is not None and held[0]() is None


# -- when memory is short --------------------------------------------------------------------------
@pytest.mark.parametrize("alone", [False, True])
def test_a_cell_without_memory_waits_for_fewer_beside_it(alone, project, in_process, monkeypatch):
    """It is tried again with fewer cells; where it was alone, that is said in one line."""
    calls = []

    def crowded(p, *_, **__):
        calls.append(p.key)
        if alone or len(calls) == 1:
            raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(executor, "run_cell", crowded)
    monkeypatch.setattr(executor, "device_here", lambda wanted: "cuda")
    monkeypatch.setattr(executor, "Packing", lambda most: Packing(most, wanted=most))
    monkeypatch.setattr(executor, "cores", lambda: 2)
    table = Table.model_validate(
        dict(title="t", question="q", control="a", seeds=[0, 1], cell=CELL,
             rows={"a": {"label": "a"}})
    )  # fmt: skip
    if alone:
        with pytest.raises(UserError, match="more memory than the GPU has"):
            run_plan(plan(table), Store(), device="cuda")
    else:
        done = run_plan(plan(table), Store(), device="cuda")
        assert done.trained == 2 and len(calls) == 3


def test_a_recording_is_refused_where_there_is_no_gpu(project, in_process):
    project.table("tiny9", TINY)
    with pytest.raises(UserError, match=r"^compile \(=cudagraphs\) needs a GPU"):
        Results("tiny9", "tiny").train(device="cpu", compile="cudagraphs")
