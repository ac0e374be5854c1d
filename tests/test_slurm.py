"""Cells through Slurm: what is submitted, once; and on a Slurm of one node, what comes of it.

The slow ones, of `make test-slurm`, need slurmd, slurmctld and munged (`apt-get install slurm-wlm
munge`), which tests/slurm-node.sh starts on loopback, in a folder of the tests.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from types import SimpleNamespace

import pytest
from conftest import ROOT, TINY, at_home
from submitit.core.utils import DelayedSubmission
from test_executor import CELL
from test_own_blocks import FILE, forgotten  # noqa: F401 (a fixture of all tests here, too)

from replib.__main__ import main
from replib.blocks import BLOCKS, own
from replib.errors import UserError
from replib.experiments import executor, slurm
from replib.experiments.cells import Plan, Planned, plan
from replib.experiments.claims import progress
from replib.experiments.executor import NotTrained, run_plan
from replib.experiments.params import Table
from replib.experiments.slurm import Batch, Head, NoAnswer, Options, options_of, run_on_slurm
from replib.experiments.store import Store
from replib.report.results import Results
from replib.training.checkpoint import write_bytes


# -- what is asked for -----------------------------------------------------------------------------
def test_options_of_the_command_line():
    given = ["partition=gpu", "time=90", "mem=2.5", "sbatch.reservation=mine", "setup=a b=c"]
    asked = options_of(given)
    assert (asked.partition, asked.time, asked.mem, asked.setup) == ("gpu", 90, 2.5, "a b=c")
    assert asked.sbatch == {"reservation": "mine"} and asked.cells == 1
    assert options_of([]) == Options()


@pytest.mark.parametrize(
    "setting, said",
    [
        ("partitoin=x", "partition, account"),
        ("time", "KEY=VALUE"),
        ("time=1", r"time \(=1\)"),
        ("gpus=many", r"gpus \(='many'\)"),
        ("sbatch=3", "sbatch.FLAG"),
        ("time.x=3", "KEY=VALUE"),
    ],
)
def test_options_that_cannot_be(setting, said):
    with pytest.raises(UserError, match=said) as error:
        options_of([setting])
    assert "--slurm" in str(error.value) and "\n" not in str(error.value)


def table(rows: dict, seeds: list[int] = (0,)) -> Plan:
    return plan(
        Table.model_validate(
            dict(title="t", question="q", control="a", seeds=list(seeds), cell=CELL, rows=rows)
        )
    )


FAMILY = {
    "a": {"label": "a"},
    "b": {"label": "b", "start": "a", "set": {"learning_rate": 0.2}},
    "c": {"label": "c", "start": "a", "set": {"learning_rate": 0.3}},
    "d": {"label": "d", "start": "c", "set": {"learning_rate": 0.4}},
}


def test_what_slurm_is_asked_for(project):
    asked = Options(partition="gpu", gpus=2, mem=1.5, setup="module load x", sbatch={"nice": 5})
    head = Head(Plan(), Store(), asked, {}, {})
    out = head.parameters("replib-1", frozenset({"7_1", "7_0"}))
    assert out["dependency"] == "afterany:7_0:7_1" and out["mem"] == "1536M"
    assert out["gpus_per_node"] == 2 and out["additional_parameters"]["requeue"] is True
    assert out["additional_parameters"]["nice"] == 5 and out["setup"] == ["module load x"]
    plain = head.parameters("replib-1", frozenset())
    assert "dependency" not in plain and "qos" not in plain


# -- what is submitted, by a head without a Slurm --------------------------------------------------
BIN = {
    "sbatch": r"""
read -r how < answers
sed -i 1d answers
if [ "$how" != refused ]; then
    number=$(cat number) && echo $((number + 1)) > number
    name=$(sed -n 's/^#SBATCH --job-name=//p' "$1")
    last=$(sed -n 's/^#SBATCH --array=0-\([0-9]*\).*/\1/p' "$1")
    if [ "$last" ]; then
        for i in $(seq 0 "$last"); do echo "${number}_$i|PENDING|$name"; done >> queue
    else
        echo "$number|PENDING|$name" >> queue
    fi
fi
failed="sbatch: error: Batch job submission failed:"
case $how in
    taken) echo "Submitted batch job $number" ;;
    refused) echo "$failed Job violates accounting/QOS policy" >&2; exit 1 ;;
    *) [ "$how" = lost ] || touch silent
       echo "$failed Socket timed out on send/recv operation" >&2; exit 1 ;;
esac
""",
    "squeue": """
[ -f silent ] || exec cat queue
echo "slurm_load_jobs error: Unable to contact slurm controller" >&2
exit 1
""",
    "scontrol": "echo 'ClusterName             = here'",
    "srun": "exit 1",
}


class Commands:
    """Slurm's commands as a head runs them; submitit is the real one. What sbatch answers: taken,
    refused, lost (taken, but sbatch does not know), or silent: the same, and squeue fails, too."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        for name, text in BIN.items():
            path = folder / "bin" / name
            path.write_text(f"#!/bin/sh\ncd '{folder}'\n{text}")
            path.chmod(0o755)
        (folder / "number").write_text("100\n")
        (folder / "queue").touch()

    def answer(self, *answers: str) -> None:
        (self.folder / "answers").write_text("".join(f"{one}\n" for one in answers))

    def queue(self) -> dict[str, str]:
        """id -> name of the jobs that were taken."""
        lines = (self.folder / "queue").read_text().split()
        return {line.split("|")[0]: line.split("|")[2] for line in lines}


@pytest.fixture
def commands(project, monkeypatch) -> Commands:
    made = Commands(project.folder / "fake")
    monkeypatch.setenv("PATH", f"{made.folder / 'bin'}:{os.environ['PATH']}")
    monkeypatch.delenv("SLURM_CLUSTER_NAME", raising=False)
    monkeypatch.setattr(slurm, "POLL", 0.01)
    return made


class Cluster:
    """What a head asks Slurm: jobs stay in its queue until a test takes them out."""

    def __init__(self, monkeypatch):
        self.jobs: dict[str, tuple[str, str]] = {}
        self.arrays: list[tuple[list[list[str]], frozenset]] = []
        self.answers, self.dies = True, False
        monkeypatch.setattr(slurm, "queue", self.queue)
        monkeypatch.setattr(Head, "submit_array", lambda *a: self.submit(*a))

    def queue(self):
        if not self.answers:
            raise NoAnswer("no")
        return dict(self.jobs)

    def submit(self, head, jobs, after):
        batch = Batch(f"replib-{len(self.arrays):08x}", jobs)
        batch.write(head.folder)
        first = str(100 + len(self.arrays))
        self.arrays.append((jobs, after))
        ids = [f"{first}_{n}" for n in range(len(jobs))] if len(jobs) > 1 else [first]
        self.jobs |= {one: (batch.name, "PENDING") for one in ids}
        if self.dies:
            raise KeyboardInterrupt  # before it wrote down what Slurm said
        batch.ids = ids
        batch.write(head.folder)
        return batch


@pytest.fixture
def cluster(project, monkeypatch) -> Cluster:
    return Cluster(monkeypatch)


def head_of(made: Plan, cells: int = 1) -> Head:
    return Head(made, Store(), Options(cells=cells), {}, dict(made.cells))


def named(made: Plan, jobs: list[list[str]]) -> list[set[str]]:
    return [{made.cells[key].rows[0] for key in keys} for keys in jobs]


def test_cells_wait_for_those_that_they_start_from(cluster):
    made = table(FAMILY, [0, 1])
    head_of(made).submit()
    (first, nothing), *rest = cluster.arrays
    assert named(made, first) == [{"a"}, {"a"}] and not nothing
    by_row = {key: row for row, key in made.by_row.items()}
    for jobs, after in rest:
        assert len(after) == 1
        seeds = {by_row[key][1] for keys in jobs for key in keys}
        assert len(seeds) == 1  # a seed does not wait for the others
        before = [keys for batch, _ in cluster.arrays for keys in batch]
        number = next(iter(after))
        parents = {p for keys in jobs for k in keys for p in made.cells[k].parents.values()}
        batch, _, index = number.partition("_")
        assert parents == set(cluster.arrays[int(batch) - 100][0][int(index or 0)])
        assert len(before) == len(made.cells)
    assert sorted(map(len, (jobs for jobs, _ in rest))) == [1, 1, 2, 2]


def test_an_entry_of_a_queue_comes_before_the_next(cluster):
    """However long the cells of the next one are; among those of one, long ones come first."""
    both = Plan()
    for name, epochs in (("first", (1, 2)), ("second", (8, 9))):
        rows = {f"{name}{n}": {"label": name, "set": {"epochs": n}} for n in epochs}
        both.take(
            plan(
                Table.model_validate(
                    dict(title="t", question="q", control=next(iter(rows)), seeds=[0], cell=CELL,
                         rows=rows)
                )
            )
        )  # fmt: skip
    head_of(both).submit()
    ((jobs, _),) = cluster.arrays
    assert named(both, jobs) == [{"first2"}, {"first1"}, {"second9"}, {"second8"}]


def test_several_cells_in_a_job(cluster):
    made = table({name: {"label": name, "set": {"learning_rate": 0.1 + i / 50}}
                  for i, name in enumerate("abcde")})  # fmt: skip
    head_of(made, cells=2).submit()
    ((jobs, _),) = cluster.arrays
    assert sorted(map(len, jobs)) == [1, 2, 2]
    assert sorted(key for keys in jobs for key in keys) == sorted(made.cells)


@pytest.mark.parametrize("dies", [False, True])
def test_nothing_is_submitted_twice(cluster, dies):
    """Also where the head died between sbatch and its own note, in the middle of all arrays."""
    made = table(FAMILY)
    cluster.dies = dies
    if dies:
        with pytest.raises(KeyboardInterrupt):
            head_of(made).submit()
        assert len(cluster.arrays) == 1 and Batch.all(head_of(made).folder)[0].ids is None
        cluster.dies = False
        head_of(made).submit()
    head_of(made).submit()
    head_of(made).submit()
    keys = [key for jobs, _ in cluster.arrays for one in jobs for key in one]
    assert sorted(keys) == sorted(made.cells)
    assert cluster.arrays[1][1] == {"100"}  # children wait for the job that was found again


def own_clock(monkeypatch, sleep) -> None:
    """Sleeps of the head alone go here: other threads of the test's process sleep on."""
    clock = SimpleNamespace(time=time.time, monotonic=time.monotonic, sleep=sleep)
    monkeypatch.setattr(slurm, "time", clock)


def test_what_has_left_the_queue_unfinished_is_submitted_again(cluster):
    made = table(FAMILY)
    head_of(made).submit()
    gone = next(iter(cluster.jobs))
    error = head_of(made).error_of(Batch("replib-00000000", []), 0)
    error.parent.mkdir(parents=True)
    error.write_text("of the first try")
    del cluster.jobs[gone]
    head_of(made).submit()
    assert named(made, cluster.arrays[-1][0]) == [{"a"}] and not error.exists()
    assert len(cluster.arrays) == 4


def test_one_head_submits_at_a_time(cluster, monkeypatch):
    waits, wait = threading.Event(), threading.Event().wait
    own_clock(monkeypatch, lambda seconds: (waits.set(), wait(0.01)))
    made = table(FAMILY)
    claim = head_of(made).alone()
    second = threading.Thread(target=head_of(made).submit)
    second.start()
    assert waits.wait(10) and not cluster.arrays
    claim.release(finished=True)
    second.join(30)
    assert not second.is_alive() and len(cluster.arrays) == 3


def test_a_head_that_was_stopped_for_long_submits_no_more(cluster):
    """Another one has taken over; its right to submit stays."""
    made = table(FAMILY)
    head = head_of(made)

    def submit(*given):
        write_bytes(head.folder / "claim.1", b'{"released": true}')
        return cluster.submit(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Head, "submit_array", submit)
        with pytest.raises(UserError, match=r"^another command submits these cells by now"):
            head.submit()
    assert len(cluster.arrays) == 1 and (head.folder / "claim.1").exists()
    head_of(made).submit()
    assert len(cluster.arrays) == 3


def test_a_head_waits_for_slurm(cluster, monkeypatch):
    """It does not take an answer that does not come for an empty queue."""
    made, slept = table(FAMILY), []
    head_of(made).submit()
    cluster.answers = False

    def sleep(seconds):
        slept.append(seconds)
        cluster.answers = len(slept) == 3

    own_clock(monkeypatch, sleep)
    head_of(made).submit()
    assert len(slept) == 3 and len(cluster.arrays) == 3


def test_a_job_that_ends_without_its_cells_is_told(cluster, monkeypatch):
    """By what it said, or after a while in which its files may still appear."""
    made = table({name: {"label": name, "set": {"learning_rate": 0.1 + i / 50}}
                  for i, name in enumerate("ab")})  # fmt: skip
    first, second = made.cells
    head = head_of(made)
    head.submit()
    (batch,) = Batch.all(head.folder)
    keys = [one for (one,) in batch.jobs]
    now = [0.0]
    monkeypatch.setattr(slurm.time, "monotonic", lambda: now[0])
    assert head.lost(head.states(cluster.jobs)) == {}
    assert head.states(cluster.jobs) == {first: "PENDING", second: "PENDING"}
    cluster.jobs.clear()
    error = head.error_of(batch, keys.index(second))
    error.parent.mkdir(parents=True)
    error.write_text("no memory\n")
    assert head.lost(head.states(cluster.jobs)) == {second: "no memory"}
    now[0] = slurm.SETTLE + 1
    found = head.lost(head.states(cluster.jobs))
    assert f"{batch.ids[keys.index(first)]}_0_log.err" in found[first]


@pytest.mark.parametrize(
    "options, said",
    [
        (["--executor", "slurm", "--budget-seconds", "9"], "--budget-seconds (=9)"),
        (["--slurm", "time=9"], "is for --executor slurm"),
        (["--executor", "slurm", "--slurm", "tine=9"], "--slurm tine=9"),
    ],
)
def test_a_command_that_cannot_be(project, capfd, options, said):
    assert main(["run", "table2", "--profile", "smoke", *options]) == 2
    assert said in capfd.readouterr().err


def test_without_submitit_or_slurm_it_says_what_to_install(project, monkeypatch):
    made = table({"a": {"label": "a"}})
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="no squeue here"):
        run_on_slurm(made, Store(), device="cpu")
    monkeypatch.setattr(slurm.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'replib\[slurm\]'"):
        run_on_slurm(made, Store(), device="cpu")


def test_make_hands_over_which_executor(project, monkeypatch):
    from replib.report.page import Page

    given = {}
    monkeypatch.setenv("REPLIB_EXECUTOR", "slurm")
    monkeypatch.setenv("REPLIB_SLURM", "partition=low setup=module load x time=9")
    page = Page.__new__(Page)
    page.results = type("Results", (), {"train": lambda self, **o: given.update(o) or 1 / 0})()
    with pytest.raises(ZeroDivisionError):
        page.train()
    assert given["executor"] == "slurm"
    assert given["slurm"] == ["partition=low", "setup=module load x", "time=9"]


# -- when Slurm does not do what it is asked for ---------------------------------------------------
def waiting_for(head: Head) -> list[str]:
    """The ids of jobs that have what they are to do."""
    return sorted(
        path.name.partition("_sub")[0] for path in head.folder.glob("log/*_submitted.pkl")
    )


def test_jobs_that_slurm_took_though_sbatch_failed(commands):
    """It timed out: they are not submitted again, and get what they are to do."""
    made = table(FAMILY)
    commands.answer("lost", "lost", "taken")
    head = head_of(made)
    head.submit()
    head_of(made).submit()
    assert sorted(commands.queue()) == ["100", "101_0", "101_1", "102"] == waiting_for(head)
    assert all(batch.ids for batch in Batch.all(head.folder))


def test_what_is_not_known_is_not_submitted_again(commands):
    """Nor does squeue answer: the next command asks again."""
    made = table(FAMILY)
    commands.answer("silent")
    head = head_of(made)
    with pytest.raises(UserError, match=r"Slurm takes no job: .*: Socket timed out"):
        head.submit()
    assert [batch.ids for batch in Batch.all(head.folder)] == [None] and not waiting_for(head)
    (commands.folder / "silent").unlink()
    other = table({"a": {"label": "a", "set": {"learning_rate": 0.9}}})
    commands.answer("taken", "taken", "taken")
    head_of(other).submit()  # which does not know what the first job is to do
    assert waiting_for(head) == ["101"]
    head_of(made).submit()
    expected = ["100", "101", "102_0", "102_1", "103"]
    assert sorted(commands.queue()) == expected == waiting_for(head)


def test_a_refusal_is_forgotten(commands):
    commands.answer("refused")
    head = head_of(table(FAMILY))
    with pytest.raises(
        UserError, match=r"^Slurm takes no job: .* violates .*--slurm says"
    ) as error:
        head.submit()
    assert "\n" not in str(error.value) and not Batch.all(head.folder) and not commands.queue()


def test_jobs_that_were_taken_are_watched_where_others_were_refused(commands, monkeypatch, capfd):
    """As where a user may submit so many jobs only; at the end the others are told."""
    made = table(FAMILY, [0, 1])
    folder = head_of(made).folder

    def finished_since(key, store):
        return any(key in keys for batch in Batch.all(folder) for keys in batch.jobs)

    monkeypatch.setattr(slurm, "finished_since", finished_since)
    commands.answer("taken", "taken", "refused")
    with pytest.raises(NotTrained, match=r"^4 of 8 .*; cell .*: it is in no job: .*QOS") as error:
        run_on_slurm(made, Store(), device="cpu")
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("replib: ")]
    assert len(told) == 1 and "4 jobs were taken, 2 refused (" in told[0]
    assert "4 cells are in none" in told[0] and len(error.value.failed) == 4
    assert len(commands.queue()) == 4


def test_a_slurm_that_never_answers_is_given_up(commands, monkeypatch, capfd):
    (commands.folder / "silent").touch()
    asked, real = [], slurm.queue
    monkeypatch.setattr(slurm, "queue", lambda: (asked.append(1), real())[1])
    with pytest.raises(UserError, match=r"^Slurm does not answer \(.*Unable to contact") as error:
        head_of(table(FAMILY)).submit()
    assert "\n" not in str(error.value) and len(asked) == slurm.TRIES
    assert capfd.readouterr().err.count("Unable to contact") == 1  # before it gave up
    assert not list(head_of(Plan()).folder.iterdir())  # nor is the right to submit kept


def test_a_slurm_that_does_not_answer_while_jobs_are_watched(commands, monkeypatch, capfd):
    """That is told, once; their results are what counts."""
    made, looks = table({"a": {"label": "a"}}), []
    monkeypatch.setattr(slurm, "finished_since", lambda *_: looks.append(1) or len(looks) > 9)
    commands.answer("taken")
    head = head_of(made)
    head.submit()
    (commands.folder / "silent").touch()
    assert head.watch("") == {}
    assert capfd.readouterr().err.count("Unable to contact") == 1


def test_what_others_have_written_down_is_left_alone(commands):
    """The queue shows this user's jobs on this cluster: it says nothing of others'."""
    made = table({"a": {"label": "a"}})
    head, jobs = head_of(made), [list(made.cells)]
    mine = {"user": os.getuid(), "cluster": "here"}
    notes = {
        "replib-1": {"user": os.getuid() + 1, "cluster": "here"},
        "replib-2": {"user": os.getuid(), "cluster": "elsewhere"},
        "replib-3": mine,
        "replib-4": {},  # of before users were written down
    }
    for name, who in notes.items():
        Batch(name, jobs, ["100"], **who).write(head.folder)
        head.error_of(Batch(name, jobs), 0).parent.mkdir(exist_ok=True)
        head.error_of(Batch(name, jobs), 0).write_text("no")
    commands.answer("taken")
    head.submit()
    left = {batch.name: batch for batch in Batch.all(head.folder)}
    (new,) = left.keys() - notes.keys()
    assert left.keys() & notes.keys() == {"replib-1", "replib-2"}
    assert {"user": left[new].user, "cluster": left[new].cluster} == mine
    errors = {path.name for path in head.folder.glob("log/*.error")}
    assert errors == {"replib-1-0.error", "replib-2-0.error"}
    assert list(head.states({"100": ("x", "RUNNING")})) == [*made.cells]  # its own job, 100


# -- what a job does -------------------------------------------------------------------------------
def job_of(head: Head, number: str):
    """What submitit left for a job."""
    path = head.folder / "log" / f"{number}_submitted.pkl"
    return DelayedSubmission.load(path).function


@pytest.fixture
def trained(monkeypatch) -> list:
    """The plans that jobs train, in place of training."""
    plans = []
    monkeypatch.setattr(executor, "run_plan", lambda plan, *_, **__: plans.append(plan))
    return plans


def test_a_job_knows_blocks_of_one_s_own(commands, trained, tmp_path):
    """Those of the file as it was read, before the key of a cell is asked for."""
    file = tmp_path / "mine.py"
    file.write_text(FILE)
    own.read(file)
    made = table({"a": {"label": "a", "set": {"block": "twice"}}})
    commands.answer("taken")
    head = head_of(made)
    head.submit()
    file.unlink()
    own.OWN.clear()
    del BLOCKS["twice"]
    job_of(head, "100")()
    assert [list(plan.cells) for plan in trained] == [list(made.cells)] and "twice" in BLOCKS


def test_a_job_says_that_the_code_is_of_another_commit(project, trained, monkeypatch, capfd):
    """And trains: the key of a cell says whether the code that it depends on is another one."""
    made = table({"a": {"label": "a"}})
    head = head_of(made)
    (job,) = head.jobs_of(Batch("replib-1", [list(made.cells)]))
    job()
    assert capfd.readouterr().err == "" and len(trained) == 1
    monkeypatch.setattr(slurm, "commit", lambda folder: "another")
    job()
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and job.commit in said and "another" in said
    assert len(trained) == 2


def test_every_cell_of_a_job_is_told_why_it_failed(project, monkeypatch):
    """In a line of its own; all of them what concerns the whole job."""
    made = table({name: {"label": name, "set": {"learning_rate": 0.1 + i / 50}}
                  for i, name in enumerate("abc")})  # fmt: skip
    head, (first, _, third) = head_of(made), made.cells
    batch = Batch("replib-1", [list(made.cells)], ["7"])
    batch.write(head.folder)
    failed = {k: f"cell {k[:16]} ({made.cells[k].rows[0]}): no." for k in (first, third)}

    def run_plan(*_, **__):
        raise errors.pop()

    errors = [UserError("no GPU here."), NotTrained(failed, 3)]
    monkeypatch.setattr(executor, "run_plan", run_plan)
    for expected in (failed, dict.fromkeys(made.cells, "no GPU here.")):
        with pytest.raises(SystemExit):
            head.jobs_of(batch)[0]()
        assert {key: head.said(key)[0] for key in expected} == expected


# -- on a Slurm ------------------------------------------------------------------------------------
DAEMONS = ("munged", "slurmctld", "slurmd")
SBIN = f"{os.environ['PATH']}:/usr/sbin:/sbin"
ABSENT = [name for name in DAEMONS if shutil.which(name, path=SBIN) is None]
ASKED_FOR = os.environ.get("REPLIB_TEST_SLURM") == "1"
needs_slurm = pytest.mark.skipif(
    bool(ABSENT) or not ASKED_FOR,
    reason=f"no {', '.join(ABSENT)} here: install slurm-wlm and munge"
    if ABSENT
    else "make test-slurm runs it",
)
ASKED = ["cpus=1", "mem=0.4", "partition=low"]
LONG = CELL | {"train_images": 1000, "held_out": 200, "epochs": 200}


def free_port() -> int:
    """A port that is free, and the one after."""
    while True:
        with socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            with contextlib.suppress(OSError, OverflowError):
                two.bind(("127.0.0.1", port + 1))
                return port


@pytest.fixture(scope="module")
def node():
    """A Slurm of this machine. Its folder has a short name: a socket's may not be long."""
    with tempfile.TemporaryDirectory(prefix="slurm") as folder, pytest.MonkeyPatch.context() as p:
        script, environment = str(ROOT / "tests" / "slurm-node.sh"), os.environ.copy()
        environment["PORT"] = str(free_port())
        subprocess.run([script, "start", folder], env=environment, check=True, timeout=60)
        p.setenv("SLURM_CONF", f"{folder}/slurm.conf")
        p.setenv("PYTHONPATH", f"{ROOT}:{os.environ.get('PYTHONPATH', '')}")
        p.setattr(slurm, "ASK", 1)
        p.setattr(slurm, "POLL", 0.5)
        p.setattr(slurm, "SETTLE", 3)
        try:
            yield folder
        finally:
            subprocess.run(["scancel", "--user", str(os.getuid())])
            subprocess.run([script, "stop", folder], check=True)


def asked(*command: str) -> str:
    """What a command of Slurm says."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def until(condition, what: str, seconds: float = 180):
    """What the condition is, as soon as it holds."""
    for _ in range(int(10 * seconds)):
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError(f"{what}: not within {seconds} s; {asked('squeue', '--all')}")


def results_of(store: Store, made: Plan) -> dict[str, str]:
    return {key: store.read(key)["result_sha256"] for key in made.cells}


def submitted(store: Store) -> list[str]:
    return sorted(path.name for path in (store.runs / "slurm" / "log").glob("*_submission.sh"))


@pytest.mark.slow
@needs_slurm
def test_a_table_is_trained_as_jobs_and_its_head_may_die(node, tmp_path, shared_project):
    """The same results, bit for bit, as on this machine; nothing is submitted twice."""
    with at_home(tmp_path, {"tiny9": TINY}) as made:
        store, whole = Store(), Results("tiny9", "tiny").plan
        command = ["run", "tiny9", "--profile", "tiny", "--executor", "slurm", "--device", "cpu"]
        command += [part for one in (*ASKED, "cells=2") for part in ("--slurm", one)]
        head = made.start(*command)
        until(lambda: list((store.runs / "slurm").glob("replib-*.json")), "a batch")
        until(lambda: len(submitted(store)) == 2, "all jobs are submitted")
        time.sleep(1)
        os.killpg(head.pid, signal.SIGKILL)
        head.communicate()
        before = submitted(store)
        done = run_on_slurm(whole, store, slurm=[*ASKED, "cells=2"], device="cpu")
        assert (done.trained + done.present, done.out_of_time) == (6, 0)
        assert submitted(store) == before and len(before) == 2
        assert results_of(store, whole) == results_of(Store(shared_project.folder), whole)
        assert run_on_slurm(whole, store, slurm=ASKED, device="cpu").present == 6


@pytest.mark.slow
@needs_slurm
@pytest.mark.parametrize("how", ["preempted", "out of time"])
def test_a_requeued_job_goes_on_from_its_checkpoint(node, project, how):
    """Bit for bit what an undisturbed run gives. Preempted by a job of a higher partition, or
    warned, as Slurm does before the end of its time."""
    cell = LONG | {"learning_rate": 0.1 if how == "preempted" else 0.2}
    made = plan(
        Table.model_validate(
            dict(
                title="t",
                question="q",
                control="a",
                seeds=[0],
                cell=cell,
                rows={"a": {"label": "a"}},
            )
        )
    )
    store, (key,) = Store(), made.cells
    options = {"slurm": ASKED, "device": "cpu", "checkpoint_seconds": 0.2}
    head = threading.Thread(target=run_on_slurm, args=(made, store), kwargs=options)
    head.start()
    folder = store.folder(key)
    until(lambda: progress(folder) > 2 or store.read(key), "a few epochs")
    assert store.read(key) is None, "too short to be disturbed"
    (batch,) = Batch.all(store.runs / "slurm")
    (number,) = batch.ids
    other = None
    if how == "preempted":
        command = ["srun", "--partition=high", "--exclusive", "--time=1", "sleep", "2"]
        other = subprocess.Popen(command)
    else:
        asked("scancel", "--signal=USR2", number)
    until(lambda: "Restarts=1" in asked("scontrol", "show", "job", number), "it is requeued")
    saved, problem = store.load(key, "checkpoint")
    assert problem is None and (kept := len(saved["progress"]["history"])) > 1
    assert store.read(key) is None
    until(lambda: store.read(key), "it is finished", 300)
    if other is not None:
        assert other.wait(120) == 0
    head.join(120)
    assert not head.is_alive() and submitted(store) == [f"{number}_submission.sh"]
    log = (store.runs / "slurm" / "log" / f"{number}_0_log.out").read_text()
    again = log.split("Starting with JobEnvironment")[2]
    epochs = [int(n) for n in re.findall(rf"(\d+)/{cell['epochs']} ", again)]
    assert min(filter(None, epochs)) >= kept  # its bar begins where it went on
    with at_home(project.folder / "undisturbed", {}):
        run_plan(made, Store(), device="cpu", workers=1)
        assert results_of(Store(), made) == results_of(store, made)


@pytest.mark.slow
@needs_slurm
def test_a_failure_is_one_line(node, project):
    """Of Slurm, which refuses; and of a job, here because its cell is not what it was."""
    made, store = table({"a": {"label": "a"}}), Store()
    with pytest.raises(UserError, match=r"Slurm takes no job: .*artition") as error:
        run_on_slurm(made, store, slurm=["partition=nonesuch"], device="cpu")
    assert "\n" not in str(error.value) and not Batch.all(store.runs / "slurm")
    (planned,) = made.cells.values()
    wrong = Planned("0" * 64, planned.cell, rows=("a",))
    made = Plan({wrong.key: wrong}, {("a", 0): wrong.key})
    with pytest.raises(UserError, match=r"^cell 0{16} is another one by now"):
        run_on_slurm(made, store, slurm=ASKED, device="cpu")
