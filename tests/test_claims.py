"""One holder of a cell at a time, whoever dies, and whatever the clocks say."""

import json
import subprocess
import sys
import threading

import pytest
from conftest import ROOT
from test_executor import CELL

from replib.experiments import claims, executor
from replib.experiments.cells import plan
from replib.experiments.claims import STALE, Claims, last, progress
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


def test_what_a_killed_holder_left_half_written_goes(tmp_path):
    by_another(tmp_path, released=True)
    half = tmp_path / ".result.json.1.part"
    half.touch()
    claim = Claims().take(tmp_path)
    assert not half.exists()
    half.touch()
    assert Claims().take(tmp_path) is None and half.exists()  # the holder may be writing it
    claim.release(finished=True)


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


def test_one_elsewhere_is_dead_when_its_beat_has_stopped(tmp_path):
    """By the observer's clock: what the file says of time does not come in."""
    by_another(tmp_path)
    now = [0.0]
    observer = Claims(clock=lambda: now[0])
    for moment in (0.0, STALE, STALE):
        now[0] = moment
        assert observer.take(tmp_path) is None
    by_another(tmp_path, beat=1)
    now[0] = 2 * STALE
    assert observer.take(tmp_path) is None  # it lives
    now[0] = 3 * STALE
    assert observer.take(tmp_path) is None  # not for `STALE` seconds since that beat
    now[0] = 3 * STALE + 1
    claim = observer.take(tmp_path)
    assert claim.number == 1 and progress(tmp_path) == ELSEWHERE["epochs"]
    claim.release()
    assert json.loads((tmp_path / "claim.0").read_text())["beat"] == 1  # not taken from it


def test_the_second_who_finds_it_dead_comes_too_late(tmp_path):
    by_another(tmp_path)
    now = [0.0]
    first, second = (Claims(clock=lambda: now[0]) for _ in range(2))
    assert first.take(tmp_path) is second.take(tmp_path) is None
    now[0] = STALE + 1
    claim = first.take(tmp_path)
    assert claim.number == 1 and second.take(tmp_path) is None
    claim.release()


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
    claim.release()
    assert last(tmp_path) == (1, ELSEWHERE)  # the other's is left alone


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
    now = [0.0]
    observer = Claims(clock=lambda: now[0])
    assert observer.take(tmp_path) is None
    now[0] = STALE + 1
    observer.take(tmp_path).release()


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


def test_a_budget_does_not_wait_for_others(project, in_process):
    table = Table.model_validate(
        dict(title="t", question="q", control="a", seeds=[0], cell=CELL, rows={"a": {"label": "a"}})
    )
    made, store = plan(table), Store()
    by_another(store.folder(next(iter(made.cells))))
    done = run_plan(made, store, workers=1, device="cpu", budget_seconds=0.2)
    assert (done.trained, done.present, done.out_of_time) == (0, 0, 1)
