"""`kill -9` at any moment, then the same command: every result is the same bit for bit.

The table has every kind of cell: plain, control, official, preserving, distilled, and a teacher.
"""

import itertools
import os
import random
import signal
import time
from pathlib import Path

import pytest
from conftest import TINY, Project

from replib.__main__ import main
from replib.blocks import RepBlock
from replib.experiments.store import Store, canonical, read_evidence

CELLS = 6
RUN = ["run", "tiny9", "--profile", "tiny", "--checkpoint-seconds", "1e-9", "--device", "cpu"]
PATIENCE = 60  # seconds after which a test gives up; nothing here measures a time


def add_table(project: Project) -> Project:
    project.table("tiny9", TINY)
    return project


def results(project: Project) -> dict[str, bytes]:
    """key -> the result of every finished cell, as the bytes that are hashed."""
    found = map(read_evidence, Store(project.folder).runs.glob("*/result.json"))
    return {e["result"]["key"]: canonical(e["result"]) for e in found if e is not None}


@pytest.fixture(scope="module")
def undisturbed(shared_project) -> dict[str, bytes]:
    """The results of a run that nobody disturbed, in one process and without checkpoints."""
    return results(shared_project)


def until(condition, process=None) -> None:
    """Wait until something is so; fail when the process ends before, or never does."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert process is None or process.poll() is None, "it ended too early to be disturbed"
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)


def alive(group: int) -> bool:
    """Whether a process of the group is left."""
    try:
        os.killpg(group, 0)
        return True
    except ProcessLookupError:
        return False


def count(project: Project, name: str) -> int:
    return len(list(Store(project.folder).runs.glob(f"*/{name}")))


def killed(project: Project, whole_group: bool, moment, workers: int = 2) -> None:
    """Start the run, and kill it at a moment: with its workers, or alone, and they must follow."""
    process = project.start(*RUN, "--workers", str(workers))
    try:
        until(lambda: moment(project), process)
        (os.killpg if whole_group else os.kill)(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        until(lambda: not alive(process.pid))
    finally:
        if alive(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def stopped_inside_a_cell(project: Project) -> bool:
    """There are checkpoints to go on from."""
    return count(project, "checkpoint.ckpt") > 0


def finish(project: Project, undisturbed: dict[str, bytes]) -> None:
    """Run to the end; then everything is as if nothing had happened, and nothing is left to do."""
    before = len(results(project))
    status, out, error = project.run(*RUN)
    assert (status, error) == (0, ""), error
    assert f"{CELLS - before} cells trained, {before} were there" in out
    assert results(project) == undisturbed
    assert not stopped_inside_a_cell(project)


def inside_a_cycle(project: Project) -> bool:
    """Some cells are done, another is in the middle."""
    return count(project, "result.json") > 1 and stopped_inside_a_cell(project)


@pytest.mark.slow
def test_killed_twice(project, undisturbed):
    """All at once inside the first cell; then, inside a cycle, the main process alone: its workers
    must be gone too, and nothing may be lost."""
    add_table(project)
    killed(project, True, stopped_inside_a_cell, workers=1)
    assert stopped_inside_a_cell(project) and len(results(project)) < CELLS
    killed(project, False, inside_a_cycle)
    finish(project, undisturbed)


def test_a_second_run_trains_nothing(shared_project, undisturbed, monkeypatch, capfd):
    monkeypatch.setenv("REPLIB_HOME", str(shared_project.folder))
    files = {p: p.stat().st_mtime_ns for p in Store().runs.rglob("*") if p.is_file()}
    assert main(RUN) == 0
    assert f"0 cells trained, {CELLS} were there" in capfd.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in Store().runs.rglob("*") if p.is_file()} == files


def test_a_budget_stops_and_goes_on(project, in_process, undisturbed, capfd):
    """Time runs out again and again, inside cells; in the end nothing can be told of it."""
    add_table(project)
    stops = inside = 0
    while len(results(project)) < CELLS:
        assert main([*RUN, "--budget-seconds", "0.3"]) == 0
        out = capfd.readouterr().out
        left = CELLS - len(results(project))
        assert (f"{left} cells not finished" in out) == (left > 0)
        stops, inside = stops + 1, inside + stopped_inside_a_cell(project)
        assert stops < 200, "it never ends"
    assert inside > 2, "it was to stop inside cells"
    assert results(project) == undisturbed


class Stopped(BaseException):
    """What no code of ours handles: as sudden as a kill, in the same process."""


@pytest.mark.parametrize("block", [2, 6])
@pytest.mark.slow
def test_stopped_between_merge_and_restore(project, in_process, undisturbed, monkeypatch, block):
    """A block has been merged and redrawn, and does not get its kernel back."""
    add_table(project)
    calls, restore = itertools.count(1), RepBlock.restore

    def stopped(self, *arguments, **options):
        if next(calls) == block:
            raise Stopped
        return restore(self, *arguments, **options)

    monkeypatch.setattr(RepBlock, "restore", stopped)
    with pytest.raises(Stopped):
        main([*RUN, "--workers", "1"])
    assert 0 < len(results(project)) < CELLS
    assert main([*RUN, "--workers", "1"]) == 0
    assert next(calls) > 2 * block and results(project) == undisturbed


def children(pid: int) -> list[int]:
    """Child processes that run replib's workers."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(c) for c in found if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]


@pytest.mark.slow
def test_a_killed_worker_is_reported_in_one_line(project, undisturbed):
    add_table(project)
    process = project.start(*RUN)
    until(lambda: stopped_inside_a_cell(project), process)
    os.kill(children(process.pid)[0], signal.SIGKILL)
    _, error = process.communicate()
    assert process.returncode == 2 and error.count("\n") == 1 and "a worker process died" in error
    until(lambda: not alive(process.pid))
    finish(project, undisturbed)


@pytest.mark.slow
def test_killed_at_any_moment(project, undisturbed):
    """Killed again and again, each time a random while after the first thing it writes."""
    add_table(project)
    draw = random.Random(0)
    for turn in range(2):
        seen, pause = set(Store().runs.rglob("*")), draw.random() * 0.6

        def moment(project, seen=seen, pause=pause) -> bool:
            if set(Store().runs.rglob("*")) <= seen:
                return False
            time.sleep(pause)
            return True

        if len(results(project)) >= CELLS - 1:
            break
        killed(project, turn % 2 == 0, moment)
    finish(project, undisturbed)
