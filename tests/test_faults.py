"""`kill -9` at any moment, then the same command: every result is the same bit for bit.

The table has every kind of cell: plain, control, official, preserving, distilled, and a teacher.
"""

import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from conftest import TINY, Project

from replib.__main__ import main
from replib.blocks import RepBlock
from replib.experiments.store import Store, canonical, read_evidence

whole_only = pytest.mark.skipif(
    "REPLIB_KILLS" not in os.environ, reason="half a minute each: make test-faults"
)

CELLS = 6
RUN = ["run", "tiny9", "--profile", "tiny", "--checkpoint-seconds", "1e-9", "--device", "cpu"]
KILLS = int(os.environ.get("REPLIB_KILLS", "2"))  # `make test-faults` asks for 50
PATIENCE = 120  # seconds after which a test gives up; nothing here measures a time


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


def children(pid: int, word: str = "spawn_main") -> list[int]:
    """Child processes whose command has a word in it; of itself, replib's workers."""
    found = []
    with suppress(FileNotFoundError, ProcessLookupError):  # of those that have just ended
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            if word.encode() in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(int(child))
    return found


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


def whole_files(project: Project, undisturbed: dict[str, bytes], known: dict) -> None:
    """Every result is there once and for all, and right; `known` has those of the calls before."""
    now = {p: p.stat().st_mtime_ns for p in Store(project.folder).runs.glob("*/result.json")}
    assert now.items() >= known.items(), "a finished cell was lost, or trained again"
    known.update(now)
    found = results(project)
    assert len(found) == len(now), "half a result"
    assert found.items() <= undisturbed.items()


@pytest.mark.slow
@pytest.mark.faults
def test_killed_at_any_moment(project, undisturbed):
    """Killed again and again, each time a random while after the first thing it writes; now all
    processes at once, now the main one alone. A sweep that gets near its end begins anew."""
    add_table(project)
    draw, known = random.Random(0), {}
    for turn in range(KILLS):
        if len(results(project)) >= CELLS - 1:
            finish(project, undisturbed)
            assert left_over(project) == []
            Store(project.folder).clean()
            known.clear()
        seen, pause = set(Store().runs.rglob("*")), draw.random() * 0.6

        def moment(project, seen=seen, pause=pause) -> bool:
            if set(Store().runs.rglob("*")) <= seen:
                return False
            time.sleep(pause)
            return True

        killed(project, turn % 2 == 0, moment)
        whole_files(project, undisturbed, known)
    finish(project, undisturbed)
    whole_files(project, undisturbed, known)
    assert left_over(project) == []


def left_over(project: Project) -> list[Path]:
    """Files in the store that are neither results nor weights."""
    files = (path for path in Store(project.folder).runs.rglob("*") if path.is_file())
    return [p for p in files if p.name not in ("result.json", "weights.ckpt")]


# -- the disk ------------------------------------------------------------------------------------
@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own; skips where this process may not mount one."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def remount(folder: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(folder)], check=True)


def refused(project: Project, *named: str, **options) -> None:
    """The run ends in one line that has these words, and leaves no process."""
    process = project.start(*RUN, **options)
    _, error = process.communicate()
    assert process.returncode == 2 and error.count("\n") == 1, error
    assert all(name in error for name in named), error
    until(lambda: not alive(process.pid))


@pytest.mark.slow
@pytest.mark.faults
def test_a_full_disk_and_one_that_may_not_be_written(project, undisturbed):
    """A disk of its own, too small for the sweep; then the same disk read-only; then large."""
    add_table(project)
    known: dict = {}
    with small_disk(Store(project.folder).runs, "256k") as disk:
        refused(project, "No space left", "make room")
        whole_files(project, undisturbed, known)
        remount(disk, "ro")
        refused(project, "cannot be written", "Read-only")
        remount(disk, "rw,size=100m")
        finish(project, undisturbed)
        whole_files(project, undisturbed, known)


@whole_only
@pytest.mark.slow
@pytest.mark.faults
def test_a_file_that_may_not_grow(project, undisturbed):
    """The system refuses to write more than so much into a file: a limit (RLIMIT_FSIZE) below the
    length of a network's weights, which needs no right to mount anything."""
    import resource

    add_table(project)

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    refused(project, "too large", "make room", preexec_fn=limited)
    assert results(project) == {}
    finish(project, undisturbed)
    assert left_over(project) == []


# -- two at once ---------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.faults
def test_two_runs_of_one_store_train_every_cell_once(project, undisturbed):
    add_table(project)
    both = [project.start(*RUN, "--workers", "1") for _ in range(2)]
    said = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert [error for _, error in said] == ["", ""]
    numbers = [re.search(r"(\d+) cells trained, (\d+) were there", out) for out, _ in said]
    assert sum(int(found[1]) for found in numbers) == CELLS
    assert all(int(found[1]) + int(found[2]) == CELLS for found in numbers)
    assert results(project) == undisturbed and left_over(project) == []


# -- checkpoints ---------------------------------------------------------------------------------
DAMAGES = {
    "cut short": lambda content, other: content[: len(content) // 2],
    "empty": lambda content, other: b"",
    "a wrong bit": lambda content, other: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
    "of another cell": lambda content, other: other,
    "no checkpoint": lambda content, other: b"PK\x03\x04" + content,
}


@whole_only
@pytest.mark.slow
@pytest.mark.faults
def test_a_bad_checkpoint_costs_time_only(project, in_process, undisturbed, capfd):
    """Each kind of damage to the checkpoint of a cell that was stopped; and a stale one, of an
    earlier moment of the same cell, from which it just goes on."""
    add_table(project)
    runs, earlier = Store(project.folder).runs, {}
    for how in [*DAMAGES, "stale"]:
        while count(project, "checkpoint.ckpt") == 0:
            assert main([*RUN, "--budget-seconds", "0.05"]) == 0
            if len(results(project)) == CELLS:
                Store(project.folder).clean()
        (path,) = runs.glob("*/checkpoint.ckpt")
        whole = path.read_bytes()
        if how == "stale":
            earlier = {path: whole}
            assert main([*RUN, "--budget-seconds", "0.05"]) == 0
            content = earlier[path]
        else:
            weights = b"".join(p.read_bytes() for p in [*runs.glob("*/weights.ckpt")][:1])
            content = DAMAGES[how](whole, weights or b"other")
        path.write_bytes(content)
        capfd.readouterr()
        assert main(RUN) == 0
        assert capfd.readouterr().err.count("starts again") == (how != "stale"), how
        assert results(project) == undisturbed, how
        Store(project.folder).clean()


# -- clocks --------------------------------------------------------------------------------------
BACK = """
import time
_time, _calls = time.time, [0]


def back():
    _calls[0] += 1
    return _time() - 3600 * 24 * (_calls[0] % 7)


time.time = back
time.time_ns = lambda: int(back() * 1e9)
"""


@whole_only
@pytest.mark.slow
@pytest.mark.faults
def test_a_clock_that_is_set_back(project, undisturbed):
    """Files of the future, from before it was set back, and a clock that jumps by days at every
    look, in all processes (this test cannot set the machine's own)."""
    add_table(project)
    killed(project, True, inside_a_cycle)
    for path in Store(project.folder).runs.rglob("*"):
        os.utime(path, (4e9, 4e9))
    (project.folder / "clock").mkdir()
    (project.folder / "clock" / "sitecustomize.py").write_text(BACK)
    old = project.environment.get("PYTHONPATH", "")
    project.environment["PYTHONPATH"] = f"{project.folder / 'clock'}{os.pathsep}{old}"
    finish(project, undisturbed)


# -- notebooks and keys --------------------------------------------------------------------------
REPRODUCE = ["reproduce", "tiny9", "--profile", "tiny"]


def kernel_of(pid: int) -> int | None:
    """The process of a notebook that a command runs."""
    return next(iter(children(pid, "ipykernel")), None)


@whole_only
@pytest.mark.slow
@pytest.mark.faults
def test_a_killed_kernel_is_reported_in_one_line(project, undisturbed):
    add_table(project)
    process = project.start(*REPRODUCE)
    until(lambda: count(project, "result.json") > 0, process)
    kernel = kernel_of(process.pid)
    os.kill(kernel, signal.SIGKILL)
    _, error = process.communicate()
    assert process.returncode == 2 and error.count("\n") == 1, error
    assert "died" in error and "run the same command again" in " ".join(error.split())
    until(lambda: not alive(process.pid) and not alive(kernel))
    assert not (project.folder / "reports" / "tiny9-tiny.html").exists()
    finish(project, undisturbed)


@pytest.mark.slow
def test_workers_do_not_hear_ctrl_c(project, undisturbed):
    """Not while they start, nor in a cell: a terminal sends it to all, one process answers."""
    add_table(project)
    process, heard = project.start(*RUN, "--workers", "2"), set()
    while process.poll() is None:
        for worker in children(process.pid):
            with suppress(ProcessLookupError):
                os.kill(worker, signal.SIGINT)
                heard.add(worker)
        time.sleep(0.01)
    out, error = process.communicate()
    assert len(heard) == 2 and (process.returncode, error) == (0, ""), error
    assert f"{CELLS} cells trained" in out and results(project) == undisturbed


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("command", [RUN, REPRODUCE], ids=["run", "reproduce"])
def test_interrupted_twice(command, project, undisturbed):
    """Ctrl-C goes to all processes of a terminal; the second one comes while they are stopping."""
    add_table(project)
    process = project.start(*command)
    until(lambda: count(project, "result.json") > 0, process)
    kernel = kernel_of(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(0.3)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate()
    # By the signal itself where it comes while Python ends: to a shell that is 130 too.
    assert process.returncode in (130, -signal.SIGINT), error
    assert error == "replib: stopped; run the same command again to go on.\n"
    until(lambda: not alive(process.pid) and (kernel is None or not alive(kernel)))
    finish(project, undisturbed)
