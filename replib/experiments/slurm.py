"""Cells through Slurm: the other executor of `run_plan`, for a cluster with a shared file system.

    reports/runs/slurm/replib-1a2b3c4d.json     what was submitted: cells of each job, and its id
    reports/runs/slurm/log/                     submitit's scripts, and what jobs say

A job of Slurm trains some cells, one or a few, by `run_plan` on its node, into the same store: so
several of them share a GPU by the same measurement, a cell is never trained twice at a time (see
claims), and a job that is preempted, or at the end of its time, is requeued and goes on from the
checkpoints. Jobs of one kind are one array; cells that start from others are in jobs that Slurm
holds back until those have ended.

The process that submits, the head, only watches. What it is about to submit is written down before
it is, under a name that Slurm keeps, so a head that was killed finds its jobs again and submits
nothing twice; several heads, of other tables, may watch the same store.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import re
import secrets
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError
from tqdm import tqdm

from replib import parallel
from replib.blocks import own
from replib.errors import UserError
from replib.experiments import executor
from replib.experiments.cells import Plan, Planned, cost_of, dataset, key_of
from replib.experiments.claims import Claim, Claims, progress
from replib.experiments.executor import (
    NotTrained,
    Outcome,
    check_writable,
    finished_since,
    urgency,
)
from replib.experiments.params import Strict, in_one_line, parse_yaml
from replib.experiments.store import Store
from replib.machine import commit
from replib.training.checkpoint import write_bytes

POLL = 5  # seconds between two looks at the store, and between questions that got no answer
TRIES, TOLD = 24, 3  # how often Slurm is asked before jobs are submitted; after which that is said
LOOKS = 4  # at the queue for jobs whose sbatch timed out
UNANSWERED = "Slurm does not answer, and is asked again"
ASK = 20  # seconds between two questions to Slurm, which serves others too
SETTLE = 60  # seconds in which files of a job that has ended become visible here
REQUEUES = 10**6  # of a job at the end of its time: as often as it takes
WARNING = 60  # seconds before the end of its time in which a job requeues itself
ARRAY = 1000  # jobs of an array; Slurm's MaxArraySize is 1001 where nobody changed it
CODE = Path(__file__).parent  # whose commit a job compares


class NoAnswer(Exception):
    """Slurm does not answer, as while it is started anew; what squeue says of it."""


class Refused(UserError):
    """Slurm takes no more jobs: why, and how many it refused."""

    def __init__(self, why: str, jobs: int):
        self.why, self.jobs = why, jobs
        super().__init__(f"Slurm takes no job: {why} (--slurm says what is asked for).")


class Options(Strict):
    """What a job asks Slurm for: `--slurm key=value`."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time: Annotated[int, Field(ge=3)] = 60  # minutes of a job; what is not finished is requeued
    gpus: Annotated[int, Field(ge=0)] | None = None  # of a job; None: 1, on a processor 0
    cpus: Annotated[int, Field(ge=1)] = 4  # of a job
    mem: Annotated[float, Field(gt=0)] | None = None  # GB of a job
    cells: Annotated[int, Field(ge=1)] = 1  # that a job trains
    workers: Annotated[int, Field(ge=1)] | None = None  # of them at once; None: as `run_plan`
    parallel: Annotated[int, Field(ge=1)] = 256  # jobs of an array at once
    setup: str | None = None  # a line of shell before all, such as `module load ...`
    sbatch: dict[str, str | int | bool] = Field(default_factory=dict)  # further flags of it


def options_of(settings: list[str]) -> Options:
    """`--slurm key=value` as options; sbatch.KEY=VALUE is a flag --KEY of sbatch.

    Raises: UserError in one line.
    """
    values: dict = {}
    for setting in settings:
        key, sign, text = setting.partition("=")
        first, _, flag = key.partition(".")
        if not sign or first not in Options.model_fields or bool(flag) != (first == "sbatch"):
            known = ", ".join(name for name in Options.model_fields if name != "sbatch")
            raise UserError(
                f"--slurm {setting}: expected KEY=VALUE with a KEY of {known}, or sbatch.FLAG."
            )
        value = parse_yaml(text, f"--slurm {setting}")
        if flag:
            values.setdefault(first, {})[flag] = value
        else:
            values[first] = value
    try:
        return Options.model_validate(values)
    except ValidationError as error:
        raise in_one_line(error, "--slurm") from None


# -- on a node -------------------------------------------------------------------------------------
@dataclass
class Job:
    """What a job of Slurm does. submitit keeps it in a file, and calls `checkpoint` before it
    requeues a job whose time is over."""

    root: Path  # of the store
    error: Path  # where to say why it failed, a line for each cell that did
    plan: Plan
    options: dict  # of `run_plan`
    sources: tuple[own.Source, ...] = ()  # of families of blocks of the user's own, as it read them
    commit: str = "unknown"  # of the code that submitted it

    def __call__(self) -> None:
        os.environ["REPLIB_HOME"] = str(self.root)
        self.error.unlink(missing_ok=True)
        here = commit(CODE)
        if here != self.commit and "unknown" not in (here, self.commit):
            print(
                f"replib: this job was submitted from commit {self.commit} and is run by {here}: "
                "it trains the cells whose keys are the same.",
                file=sys.stderr,
                flush=True,
            )
        try:
            for source in self.sources:
                own.run(source)
            for planned in self.plan.cells.values():
                if key_of(planned.cell, dataset(planned.cell).digest) != planned.key:
                    raise UserError(
                        f"cell {planned.key[:16]} is another one by now: a version of the code, or "
                        "the data, changed since it was submitted; run the same command again."
                    )
            executor.run_plan(self.plan, Store(self.root), **self.options)
        except UserError as error:
            why = error.failed.values() if isinstance(error, NotTrained) else [error]
            write_bytes(self.error, "".join(f"{UserError(line)}\n" for line in why).encode())
            sys.exit(f"replib: {error}")

    def checkpoint(self):
        """The same again: checkpoints are in the store."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


# -- what was submitted ----------------------------------------------------------------------------
@dataclass
class Batch:
    """Jobs that are, or were about to be, submitted together."""

    name: str
    jobs: list[list[str]]  # the keys of the cells of each
    ids: list[str] | None = None  # of each; None: not known to be submitted
    user: int | None = None  # who submitted them, and where; None and "": not known
    cluster: str = ""

    def path(self, folder: Path) -> Path:
        return folder / f"{self.name}.json"

    def write(self, folder: Path) -> None:
        said = {name: value for name, value in vars(self).items() if name != "name"}
        write_bytes(self.path(folder), json.dumps(said).encode())

    @classmethod
    def all(cls, folder: Path) -> list[Batch]:
        """Those that were written down in a folder."""
        found = []
        for path in sorted(folder.glob("replib-*.json")):
            try:
                found.append(cls(path.stem, **json.loads(path.read_bytes())))
            except (OSError, ValueError, TypeError):  # taken away just now
                continue
        return found


def complaint(said: str) -> str:
    """The line of what a command of Slurm says that tells what is wrong."""
    lines = [line.strip() for line in said.splitlines() if line.strip()] or ["no message"]
    return next((line for line in reversed(lines) if "error" in line.lower()), lines[-1])


def queue() -> dict[str, tuple[str, str]]:
    """id -> (name, state) of the user's jobs that are waiting or running, arrays job by job.

    Raises: NoAnswer; UserError where there is no Slurm.
    """
    command = ["squeue", "--noheader", "--array", "--user", str(os.getuid()), "-o", "%i|%T|%j"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except FileNotFoundError:
        raise UserError(
            "--executor slurm: there is no squeue here: run this on a machine of a Slurm cluster."
        ) from None
    except subprocess.CalledProcessError as error:
        raise NoAnswer(complaint(error.stderr)) from None
    except (subprocess.SubprocessError, OSError) as error:
        raise NoAnswer(complaint(str(error))) from None
    lines = [line.split("|", 2) for line in answer.stdout.splitlines()]
    return {line[0]: (line[2], line[1]) for line in lines if len(line) == 3}


def cluster_name() -> str:
    """The name of the cluster; "" where Slurm does not say it."""
    if name := os.environ.get("SLURM_CLUSTER_NAME"):
        return name
    command = ["scontrol", "show", "config"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (subprocess.SubprocessError, OSError):
        return ""
    found = re.search(r"^ClusterName\s*=\s*(\S+)", answer.stdout, re.MULTILINE)
    return found[1] if found else ""


def living(batch: Batch, there: dict[str, tuple[str, str]]) -> dict[int, str]:
    """index of a job -> its state, of the jobs of a batch that Slurm has; finds their ids where the
    head died before it wrote them down."""
    if batch.ids is None:
        ours = {int(i.partition("_")[2] or 0): i for i, (name, _) in there.items()
                if name == batch.name}  # fmt: skip
        if ours:
            first = next(iter(ours.values())).partition("_")
            many = len(batch.jobs) > 1
            batch.ids = [f"{first[0]}_{n}" if many else first[0] for n in range(len(batch.jobs))]
    ids = enumerate(batch.ids or [])
    return {number: there[one][1] for number, one in ids if one in there}


# -- the head --------------------------------------------------------------------------------------
def run_on_slurm(
    plan: Plan,
    store: Store,
    *,
    slurm: list[str] = (),
    workers: int | None = None,
    device: str | None = None,
    compile: str = "auto",
    budget_seconds: float | None = None,
    checkpoint_seconds: float = 15,
    title: str = "",
) -> Outcome:
    """Train the missing cells as jobs of Slurm, and wait for them, with progress and time left.

    slurm: "key=value" of `Options`; the others as those of `run_plan`. Killed, the jobs go on, and
    the same command watches them again.
    Raises: UserError where Slurm refuses, and at the end where cells failed.
    """
    options = options_of(list(slurm))
    if budget_seconds is not None:
        raise UserError(
            f"--budget-seconds (={math.ceil(budget_seconds)}) is for this machine: with "
            "--executor slurm say --slurm time=MINUTES."
        )
    if parallel.processes() > 1:
        raise UserError("--executor slurm submits jobs itself: run it without torchrun.")
    if importlib.util.find_spec("submitit") is None:
        raise UserError("--executor slurm needs submitit: pip install 'replib[slurm]'.")
    gpus = options.gpus if options.gpus is not None else int(device != "cpu")
    options = options.model_copy(update={"gpus": gpus, "workers": workers or options.workers})
    missing = plan.missing(store)
    present = len(plan.cells) - len(missing)
    if not missing:
        return Outcome(0, present, 0)
    check_writable(store)
    of_jobs = {
        "workers": options.workers if gpus else options.workers or options.cpus,
        "device": "cuda" if gpus else "cpu",
        "compile": compile,
        "checkpoint_seconds": checkpoint_seconds,
        "title": title,
    }
    head = Head(plan, store, options, of_jobs, {planned.key: planned for planned in missing})
    head.submit()
    failed = head.watch(title)
    if failed:
        raise NotTrained(failed, len(missing))
    return Outcome(len(missing), present, 0)


@dataclass
class Head:
    """The process that submits and watches."""

    plan: Plan
    store: Store
    options: Options
    of_jobs: dict  # options of `run_plan` in a job
    left: dict[str, Planned]  # cells that are still to be trained
    gone: dict[str, float] = field(default_factory=dict)  # key -> when it was in no job any more
    refused: dict[str, str] = field(default_factory=dict)  # key -> why it is in none
    cluster: str = field(default_factory=cluster_name)

    @property
    def folder(self) -> Path:
        return self.store.runs / "slurm"

    # -- submitting ----------------------------------------------------------------------------
    def submit(self) -> None:
        """Submit the cells that are in no job; one head at a time.

        Raises: UserError where Slurm does not answer; Refused where it has no job of these cells.
        """
        claim = self.alone()
        ids: dict[str, str] = {}  # key -> id of the job that it is in
        try:
            ids |= self.known(self.answer())
            missing = [planned for key, planned in self.left.items() if key not in ids]
            costs = {planned.key: cost_of(planned, self.plan.cells) for planned in missing}
            first, turn = urgency(missing, costs), self.plan.turn
            order = sorted(missing, key=lambda p: (turn.get(p.key, 0), -first[p.key]))
            waiting = {planned.key: planned for planned in order}
            while waiting:
                groups: dict[frozenset[str], list[str]] = {}  # by the jobs that come before
                for key, planned in waiting.items():
                    parents = planned.parents.values()
                    if not any(parent in waiting for parent in parents):
                        before = frozenset(ids[parent] for parent in parents if parent in ids)
                        groups.setdefault(before, []).append(key)
                for before, keys in groups.items():
                    number = math.ceil(len(keys) / self.options.cells)
                    jobs = [keys[start::number] for start in range(number)]
                    for start in range(0, number, ARRAY):
                        if claim.overtaken:
                            raise UserError(
                                "another command submits these cells by now, since this one was "
                                "stopped for long: run the same command again to watch them."
                            )
                        ids |= ids_of(self.submit_array(jobs[start : start + ARRAY], before))
                waiting = {key: planned for key, planned in waiting.items() if key not in ids}
        except Refused as error:
            jobs = {ids[key] for key in self.left if key in ids}
            if not jobs:
                raise
            why = f"it is in no job: {error.why}"
            self.refused = {k: f"cell {k[:16]}: {why}" for k in self.left if k not in ids}
            print(
                f"replib: {len(jobs)} jobs were taken, {error.jobs} refused ({error.why}): "
                f"{len(self.refused)} cells are in none; run the same command again later.",
                file=sys.stderr,
                flush=True,
            )
        finally:
            claim.release(finished=True)

    def alone(self) -> Claim:
        """The right to submit, as soon as no other head has it."""
        claims = Claims()
        while (claim := claims.take(self.folder)) is None:
            time.sleep(1)
        return claim

    def answer(self) -> dict[str, tuple[str, str]]:
        """`queue`, as soon as Slurm answers. Raises: UserError where it does not for long."""
        for tries in range(1, TRIES + 1):
            try:
                return queue()
            except NoAnswer as error:
                said = str(error)
            if tries == TOLD:
                print(f"replib: {UNANSWERED} ({said}).", file=sys.stderr, flush=True)
            time.sleep(POLL)
        raise UserError(
            f"Slurm does not answer ({said}): nothing was submitted; run the same command again "
            "when squeue works here."
        )

    def batches(self) -> list[Batch]:
        """What was written down of this user's jobs on this cluster: the queue shows no others."""
        found = []
        for batch in Batch.all(self.folder):
            here = not self.cluster or batch.cluster in ("", self.cluster)
            if here and batch.user in (None, os.getuid()):
                found.append(batch)
        return found

    def alive(self, batch: Batch, there: dict[str, tuple[str, str]]) -> dict[int, str]:
        """`living`; jobs of this table of which no head knew get what they are to do."""
        known, found = batch.ids is not None, living(batch, there)
        ours = all(key in self.plan.cells for keys in batch.jobs for key in keys)
        if ours and not known and batch.ids is not None:
            self.hand_over(batch)
            batch.write(self.folder)
        return found

    def known(self, there: dict[str, tuple[str, str]]) -> dict[str, str]:
        """key -> id of the job that it is in; batches of which Slurm knows no job any more are
        forgotten."""
        found = {}
        for batch in self.batches():
            alive = self.alive(batch, there)
            for number in range(len(batch.jobs)):
                if number not in alive:  # what it said is of a try that is over
                    self.error_of(batch, number).unlink(missing_ok=True)
            if alive:
                found |= {key: batch.ids[n] for n in alive for key in batch.jobs[n]}
            else:
                batch.path(self.folder).unlink(missing_ok=True)
        return found

    def submit_array(self, jobs: list[list[str]], after: frozenset[str]) -> Batch:
        """Submit these jobs, to be started when those of the ids `after` have ended.

        Raises: Refused.
        """
        import submitit

        name, user = f"replib-{secrets.token_hex(4)}", os.getuid()
        batch = Batch(name, jobs, user=user, cluster=self.cluster)
        batch.write(self.folder)
        try:
            made = submitit.SlurmExecutor(self.folder / "log", max_num_timeout=REQUEUES)
            made.update_parameters(**self.parameters(batch.name, after))
            with made.batch():
                submitted = [made.submit(job) for job in self.jobs_of(batch)]
            batch.ids = [str(job.job_id) for job in submitted]
        except (RuntimeError, OSError) as error:  # submitit's are of the first kind
            why = complaint(str(error))
            if not self.taken(batch, late="timed out" in why.lower()):
                if isinstance(error, OSError):
                    raise
                raise Refused(why, len(jobs)) from None
        batch.write(self.folder)
        return batch

    def taken(self, batch: Batch, late: bool) -> bool:
        """Whether Slurm has the jobs of a batch though sbatch failed: its answer may be lost.

        late: they may appear later. Unless they surely do not, what was written down of them stays,
        for the next command to ask again.
        """
        surely = False
        for tries in range(LOOKS if late else 1):
            time.sleep(POLL if tries else 0)
            with contextlib.suppress(NoAnswer):
                if self.alive(batch, queue()):
                    return True
                surely = not late
        if surely:
            batch.path(self.folder).unlink(missing_ok=True)
        return False

    def hand_over(self, batch: Batch) -> None:
        """Leave for the jobs of a batch what they are to do, for which they wait a minute: submitit
        does so after sbatch has answered, and did not come to it."""
        from submitit.core.utils import DelayedSubmission, JobPaths

        for job, one in zip(self.jobs_of(batch), batch.ids, strict=True):
            path = JobPaths(self.folder / "log", one).submitted_pickle
            if path.exists():
                continue
            asked = DelayedSubmission(job)
            asked.set_timeout(self.options.time, REQUEUES)
            path.parent.mkdir(parents=True, exist_ok=True)
            beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
            asked.dump(beside)
            beside.replace(path)

    def jobs_of(self, batch: Batch) -> list[Job]:
        """What the jobs of a batch do."""
        root, sources = self.store.runs.parents[1], tuple(own.sources())
        return [
            Job(
                root,
                self.error_of(batch, number),
                self.plan.of(keys),
                self.of_jobs,
                sources,
                commit(CODE),
            )
            for number, keys in enumerate(batch.jobs)
        ]

    def parameters(self, name: str, after: frozenset[str]) -> dict:
        """What submitit asks sbatch for."""
        asked = self.options
        flags = {"requeue": True} | asked.sbatch
        out = {
            "job_name": name,
            "time": asked.time,
            "nodes": 1,
            "ntasks_per_node": 1,
            "cpus_per_task": asked.cpus,
            "array_parallelism": asked.parallel,
            "signal_delay_s": WARNING,
            "additional_parameters": flags,
        }
        if asked.gpus:
            out["gpus_per_node"] = asked.gpus
        if asked.mem is not None:
            out["mem"] = f"{math.ceil(1024 * asked.mem)}M"
        if asked.setup is not None:
            out["setup"] = [asked.setup]
        if after:
            out["dependency"] = "afterany:" + ":".join(sorted(after))
        names = "partition", "account", "qos", "constraint"
        return out | {n: v for n in names if (v := getattr(asked, n)) is not None}

    def error_of(self, batch: Batch, number: int) -> Path:
        """Where a job says why it failed."""
        return self.folder / "log" / f"{batch.name}-{number}.error"

    # -- watching ------------------------------------------------------------------------------
    def watch(self, title: str) -> dict[str, str]:
        """Wait until every cell is finished, or in no job; key -> why, for the latter."""
        total = sum(planned.epochs for planned in self.left.values())
        failed: dict[str, str] = {}
        done, asked, silent = 0, -math.inf, 0
        bar = tqdm(
            total=total,
            desc=f"{title} {len(self.left)} cells on Slurm".strip(),
            unit="epoch",
            file=sys.stdout,
            mininterval=2,
            ncols=100,
            initial=self.epochs(),
        )
        try:
            while True:
                for key in [key for key in self.left if finished_since(key, self.store)]:
                    done += self.left.pop(key).epochs
                    failed.pop(key, None)
                bar.n = done + self.epochs()
                bar.refresh()
                if time.monotonic() - asked > ASK:
                    try:
                        states = self.states(queue())
                        asked, silent = time.monotonic(), 0
                        failed = self.lost(states)
                        said = [f"{n} {s.lower()}" for s, n in Counter(states.values()).items()]
                        bar.set_postfix_str(", ".join(said))
                    except NoAnswer as error:
                        silent += 1
                        if silent == TOLD:
                            bar.write(f"replib: {UNANSWERED} ({error}).", file=sys.stderr)
                if self.left.keys() <= failed.keys():
                    return failed
                time.sleep(POLL)
        except KeyboardInterrupt:
            names = {batch.name for batch in self.batches()}
            bar.write(
                f"The jobs go on. scancel --name {','.join(sorted(names))} ends them.",
                file=sys.stderr,
            )
            raise
        finally:
            bar.close()

    def epochs(self) -> int:
        """Epochs that are finished of the cells that are not."""
        return sum(progress(self.store.folder(key)) for key in self.left)

    def states(self, there: dict[str, tuple[str, str]]) -> dict[str, str]:
        """key -> state of its job, of the cells that are left and in one."""
        found = {}
        for batch in self.batches():
            for number, state in self.alive(batch, there).items():
                found |= {key: state for key in batch.jobs[number] if key in self.left}
        return found

    def lost(self, states: dict[str, str]) -> dict[str, str]:
        """key -> why, of the cells whose job has ended without them."""
        out, now = {}, time.monotonic()
        for key in self.left:
            if key in states:
                self.gone.pop(key, None)
                continue
            why, log = self.said(key)
            why = self.refused.get(key, why)
            if why or now - self.gone.setdefault(key, now) > SETTLE:
                out[key] = why or f"cell {key[:16]}: its job ended without a result (see {log})."
        return out

    def said(self, key: str) -> tuple[str | None, Path]:
        """(what the job of a cell says of its failure, where its log is)."""
        log = self.folder / "log"
        for batch in self.batches():
            for number, keys in enumerate(batch.jobs):
                if key in keys:
                    job = batch.ids[number] if batch.ids else "*"
                    log = self.folder / "log" / f"{job}_0_log.err"
                    with contextlib.suppress(OSError):
                        lines = self.error_of(batch, number).read_text().splitlines()
                        own_line = (one for one in lines if one.startswith(f"cell {key[:16]}"))
                        return next(own_line, (lines or [None])[0]), log
        return None, log


def ids_of(batch: Batch) -> dict[str, str]:
    """key -> id of the job that it is in."""
    return {key: one for keys, one in zip(batch.jobs, batch.ids, strict=True) for key in keys}
