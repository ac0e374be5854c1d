"""One holder of a cell at a time, whoever dies, and whatever the clocks say."""

import errno
import functools
import itertools
import json
import os
import resource
import subprocess
import sys
import threading
from concurrent.futures import Future

import pytest
from conftest import ROOT, Inline
from test_executor import CELL

from replib.experiments import claims, executor
from replib.experiments.cells import plan
from replib.experiments.claims import BLIND, STALE, Claims, last, progress
from replib.experiments.executor import run_plan
from replib.experiments.params import Table
from replib.experiments.store import Store
from replib.training.checkpoint import write_bytes

ELSEWHERE = {"machine": "another", "pid": 1, "born": "1", "job": [], "beat": 0, "epochs": 3}


@pytest.fixture(autouse=True)
def no_job(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)


def by_another(folder, number=0, **said):
    write_bytes(folder / f"claim.{number}", json.dumps(ELSEWHERE | said).encode())


def test_one_of_many_gets_it(tmp_path):
    """Threads that begin at once, again and again, with claims of others that were given back."""
    for number in range(20):
        folder, won, gate = tmp_path / str(number), [], threading.Barrier(8)
        if number % 2:
            by_another(folder, released=True)

        def take(folder=folder, won=won, gate=gate):
            gate.wait()
            won.append(Claims().take(folder))

        threads = [threading.Thread(target=take) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        held = [claim for claim in won if claim is not None]
        assert len(held) == 1 and last(folder)[0] == held[0].number == number % 2
        held[0].release(finished=True)
        assert last(folder) == (-1, None) and not list(folder.iterdir())


def aged(path, seconds):
    """A file as old as that by the clock of the file system, whatever this machine's says."""
    path.touch()
    now = path.stat().st_mtime
    os.utime(path, (now - seconds, now - seconds))


def test_what_a_killed_holder_left_half_written_goes(tmp_path):
    """When it is too old for a holder that lives; whatever its age, when the cell is finished."""
    by_another(tmp_path, released=True)
    old, new = tmp_path / ".result.json.1.part", tmp_path / ".result.json.2.part"
    aged(old, STALE + 30)
    aged(new, STALE - 30)
    claim = Claims().take(tmp_path)
    assert not old.exists() and new.exists()
    aged(old, STALE + 30)
    assert Claims().take(tmp_path) is None and old.exists()  # the holder may be writing it
    claim.release()
    assert new.exists()
    Claims().take(tmp_path).release(finished=True)
    assert not list(tmp_path.iterdir())


def test_a_claim_that_could_not_be_written_is_none(tmp_path):
    """On a disk that is full: nobody waits for it. Here files may not grow."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            Claims().take(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())
    Claims().take(tmp_path).release(finished=True)


def test_what_is_given_back_is_taken_again(tmp_path):
    claim = Claims().take(tmp_path)
    assert Claims().take(tmp_path) is None
    claim.release()
    again = Claims().take(tmp_path)
    assert again.number == 1
    again.release(finished=True)


@pytest.mark.slow
def test_a_process_that_died_here_holds_nothing(tmp_path):
    """At once: it is not waited for. One that lives is."""
    text = (
        "import sys, pathlib; from replib.experiments.claims import Claims\n"
        "assert Claims().take(pathlib.Path(sys.argv[1])); print('held', flush=True); input()"
    )
    command = [sys.executable, "-c", text, str(tmp_path)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        assert Claims().take(tmp_path) is None
        other.kill()
        other.wait()
        Claims().take(tmp_path).release()


class Observer(Claims):
    """One who asks again and again, by a clock of its own."""

    def __init__(self, folder):
        self.now, self.folder = 0.0, folder
        super().__init__(clock=lambda: self.now)

    def after(self, seconds, every=BLIND):
        """What it gets at the end of so many seconds; nothing before."""
        for _ in range(round(seconds / every)):
            assert self.take(self.folder) is None
            self.now += every
        return self.take(self.folder)


def test_one_elsewhere_is_dead_when_its_beat_has_stopped(tmp_path):
    """By the observer's clock: what the file says of time does not come in."""
    by_another(tmp_path)
    observer = Observer(tmp_path)
    assert observer.after(STALE) is None
    by_another(tmp_path, beat=1)
    assert observer.after(STALE) is None  # it lived
    claim = observer.after(BLIND)
    assert claim.number == 1 and progress(tmp_path) == ELSEWHERE["epochs"]
    claim.release()
    assert json.loads((tmp_path / "claim.0").read_text())["beat"] == 1  # not taken from it


def test_seconds_in_which_nobody_could_look_do_not_count(tmp_path):
    """Both were without the file system: the holder, which lives, could not write either."""
    by_another(tmp_path)
    observer = Observer(tmp_path)
    assert observer.after(STALE) is None
    assert observer.after(10 * STALE, every=10 * STALE) is None
    assert observer.after(STALE) is None
    observer.now += 1
    observer.take(tmp_path).release()


def test_the_second_who_finds_it_dead_comes_too_late(tmp_path):
    by_another(tmp_path)
    first, second = Observer(tmp_path), Observer(tmp_path)
    assert first.after(STALE) is second.after(STALE) is None
    claim = first.after(BLIND)
    assert claim.number == 1 and second.after(BLIND) is None
    claim.release()


@pytest.mark.parametrize("who", [{"uid": os.getuid() + 1}, {}], ids=["another user", "not known"])
def test_a_process_of_another_user_here_is_not_dead_because_it_is_hidden(tmp_path, who):
    """/proc may show one's own processes only (hidepid): it is judged by its beats."""
    hidden = {"machine": claims.machine(), "pid": 2**22, "born": "1"}
    by_another(tmp_path, **hidden, **who)
    observer = Observer(tmp_path)
    assert observer.after(STALE) is None
    observer.now += 1
    observer.take(tmp_path).release()
    by_another(tmp_path, 2, **hidden, uid=os.getuid())
    Claims().take(tmp_path).release()  # one's own is asked for


def test_a_holder_shows_that_it_lives_until_it_is_overtaken(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "BEAT", 0.01)
    claim = Claims().take(tmp_path)
    claim.epochs = 7
    for _ in range(500):
        if progress(tmp_path) == 7:
            break
        threading.Event().wait(0.01)
    assert last(tmp_path)[1]["beat"] > 0 and progress(tmp_path) == 7
    by_another(tmp_path, 1)  # it had slept too long
    claim.thread.join(5)
    assert not claim.thread.is_alive()
    assert claim.overtaken
    for finished in (False, True):
        claim.release(finished)
        assert last(tmp_path) == (1, ELSEWHERE)  # the other's is left alone


def test_a_holder_lives_on_where_its_file_system_is_away_for_a_while(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "BEAT", 0.01)
    real, away, tries = claims.last, threading.Event(), []

    def last(folder):
        tries.append(away.is_set())
        if away.is_set():
            raise OSError(errno.ESTALE, "Stale file handle")
        return real(folder)

    claim = Claims().take(tmp_path)
    monkeypatch.setattr(claims, "last", last)
    away.set()
    while tries.count(True) < 3 and claim.thread.is_alive():
        threading.Event().wait(0.01)
    away.clear()
    beats = claim.beats
    for _ in range(500):
        if claim.beats > beats:
            break
        threading.Event().wait(0.01)
    assert claim.thread.is_alive() and claim.beats > beats
    claim.release(finished=True)


def test_a_job_knows_its_own_claim_of_before_it_was_requeued(tmp_path, monkeypatch):
    by_another(tmp_path, job=["12", "0"])
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    assert Claims().take(tmp_path) is None  # another process of the same job
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    Claims().take(tmp_path).release()
    by_another(tmp_path, 5, job=["13", "0"])
    assert Claims().take(tmp_path) is None


def test_a_file_that_is_not_whole_is_a_claim(tmp_path):
    (tmp_path / "claim.0").write_bytes(b"")
    observer = Observer(tmp_path)
    assert observer.after(STALE) is None
    observer.after(BLIND).release()


# -- two runs and one store ------------------------------------------------------------------------
def test_a_run_waits_for_a_cell_that_another_trains(project, in_process, monkeypatch):
    """And trains it where the other gives up; what the other has finished is not trained again."""
    monkeypatch.setattr(executor, "ASK", 0.05)
    rows = {"a": {"label": "a"}, "b": {"label": "b", "set": {"learning_rate": 0.2}}}
    table = Table.model_validate(
        dict(title="t", question="q", control="a", seeds=[0], cell=CELL, rows=rows)
    )
    made, store, trained = plan(table), Store(), []
    first, second = made.cells
    real = executor.run_cell

    def run_cell(planned, *arguments, **options):
        trained.append(planned.key)
        real(planned, *arguments, **options)

    run_plan(made.of([first]), store, workers=1, device="cpu")
    kept = {path.name: path.read_bytes() for path in store.folder(first).iterdir()}
    for path in store.folder(first).iterdir():
        path.unlink()
    for key in made.cells:
        by_another(store.folder(key))
    looks = []
    real_take = Claims.take

    def take(self, folder):
        looks.append(folder)
        if looks.count(store.folder(first)) == 3:  # the other finishes one, and leaves one
            for name, content in kept.items():
                write_bytes(folder / name, content)
            (store.folder(first) / "claim.0").unlink(missing_ok=True)
            by_another(store.folder(second), released=True)
        return real_take(self, folder)

    monkeypatch.setattr(Claims, "take", take)
    monkeypatch.setattr(executor, "run_cell", run_cell)
    done = run_plan(made, store, workers=1, device="cpu")
    assert trained == [second] and (done.trained, done.present, done.out_of_time) == (1, 1, 0)
    assert not list(store.runs.glob("*/claim.*"))


def one_cell():
    return plan(
        Table.model_validate(
            dict(title="t", question="q", control="a", seeds=[0], cell=CELL,
                 rows={"a": {"label": "a"}})
        )
    )  # fmt: skip


WRITES = {
    "a checkpoint": lambda store, key: store.save(key, "checkpoint", {"of": "the first"}),
    "its weights": lambda store, key: store.save(key, "weights", {"of": "the first"}),
    "its evidence": lambda store, key: store.write(key, {"key": key}, {}),
}


def overtaken_once(store, key, write):
    """In place of `run_cell`: another run takes the cell over, and gives it back, while this one is
    away; then it writes. The second time it is not disturbed. Which claim was there each time."""
    numbers = []

    def run_cell(planned, cells, own_store, *, tick, **_):
        folder = store.folder(key)
        numbers.append(last(folder)[0])
        tick()
        if len(numbers) == 1:
            write_bytes(folder / "checkpoint.ckpt", b"of the other")
            by_another(folder, 1, released=True)
        write(own_store, key)
        assert len(numbers) == 2, "it has written over what the other wrote"

    return run_cell, numbers


@pytest.mark.parametrize("write", WRITES)
def test_who_has_been_overtaken_writes_nothing(write, project, in_process, monkeypatch):
    """It waits until the other has finished, or given up; here it goes on after that."""
    made, store = one_cell(), Store()
    (key,) = made.cells
    run_cell, numbers = overtaken_once(store, key, WRITES[write])
    monkeypatch.setattr(executor, "run_cell", run_cell)
    monkeypatch.setattr(executor, "ASK", 0.05)
    done = run_plan(made, store, workers=1, device="cpu")
    assert (done.trained, done.present, done.out_of_time) == (1, 0, 0) and numbers == [0, 2]
    assert not list(store.folder(key).glob("claim.*"))


@pytest.mark.parametrize("write", WRITES)
def test_processes_that_have_been_overtaken_write_nothing(write, project, monkeypatch, one_thread):
    """Those that train one cell together, here of one."""
    made, store = one_cell(), Store()
    (key,) = made.cells
    run_cell, numbers = overtaken_once(store, key, WRITES[write])
    monkeypatch.setattr(executor, "run_cell", run_cell)
    monkeypatch.setattr(executor, "settle", lambda threads: None)
    done = executor.one_by_one(made, store, list(made.cells.values()), "", {"device": "cpu"})
    assert (done.trained, done.present, done.out_of_time) == (1, 0, 0) and numbers == [0, 2]
    assert not list(store.folder(key).glob("claim.*"))


def test_what_is_taken_from_under_who_has_been_overtaken_is_no_failure(
    project, in_process, monkeypatch
):
    """The other has finished, and removed all that was half written."""
    made, store = one_cell(), Store()
    (key,) = made.cells
    calls = []

    def run_cell(*_, **__):
        calls.append(key)
        if len(calls) == 1:
            (store.folder(key) / "claim.0").unlink()
            raise FileNotFoundError(2, "No such file", ".checkpoint.ckpt.1.part")

    monkeypatch.setattr(executor, "run_cell", run_cell)
    monkeypatch.setattr(executor, "ASK", 0.05)
    assert run_plan(made, store, workers=1, device="cpu").trained == 1 and len(calls) == 2


def test_a_dead_holder_is_found_dead_while_other_cells_are_trained(project, monkeypatch):
    """Its cell, more urgent than others, is not left to the end: it is looked at all the time."""
    rows = {name: {"label": name, "set": {"learning_rate": 0.1 + n / 50}}
            for n, name in enumerate("abcd")}  # fmt: skip
    made = plan(
        Table.model_validate(
            dict(title="t", question="q", control="a", seeds=[0], cell=CELL, rows=rows)
        )
    )
    store, (dead, *_) = Store(), made.cells
    by_another(store.folder(dead))
    looks, order, long, real = [], [], Future(), Claims.look

    def look(self, folder):
        looks.append(folder)
        if len(looks) == 5:  # more than STALE seconds have passed
            long.set_result("finished")
        return real(self, folder)

    class Pool(Inline):
        """A worker whose first cell takes long."""

        def submit(self, function, planned, *arguments):
            order.append(planned.rows[0])
            return super().submit(lambda: "finished") if len(order) > 1 else long

    clock = functools.partial(next, itertools.count(step=BLIND))
    monkeypatch.setattr(Claims, "look", look)
    monkeypatch.setattr(executor, "Claims", lambda: Claims(clock))
    monkeypatch.setattr(executor, "BEAT", 0)
    monkeypatch.setattr(executor, "ASK", 0)
    monkeypatch.setattr(executor, "Workers", Pool)
    run_plan(made, store, workers=1, device="cpu")
    assert order == ["b", "a", "c", "d"]


def test_a_budget_does_not_wait_for_others(project, in_process):
    table = Table.model_validate(
        dict(title="t", question="q", control="a", seeds=[0], cell=CELL, rows={"a": {"label": "a"}})
    )
    made, store = plan(table), Store()
    by_another(store.folder(next(iter(made.cells))))
    done = run_plan(made, store, workers=1, device="cpu", budget_seconds=0.2)
    assert (done.trained, done.present, done.out_of_time) == (0, 0, 1)
