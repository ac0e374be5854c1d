"""Who trains a cell: one claim at a time, over all machines that share the store's file system.

    reports/runs/KEY/claim.0, claim.1, ...     the last one counts

A claim is a file that is created exclusively (O_EXCL, atomic on NFS too; no file locks, which many
cluster file systems lack). It is never taken away from its holder: who finds it abandoned creates
the next number, which only one can do, and a holder that wakes up sees that it has been overtaken,
and writes nothing more (`Held`).
A holder writes a new beat into its file every few seconds. Whether it lives is judged by the
observer's own clock, by how long the beat has not changed while it could look, so clocks may differ
and a file system may be away from both; a process of the same machine and user, or of the same
Slurm job before it was requeued, is asked for directly.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from replib import parallel
from replib.errors import UserError
from replib.experiments.store import Store
from replib.training.checkpoint import write_bytes

BEAT = 10  # seconds between two beats
STALE = 120  # seconds without a new beat, after which a holder elsewhere counts as dead
BLIND = 30  # seconds without a look, after which they are counted anew: it may not have been able


def machine() -> str:
    """This machine since it was started; a container that numbers its processes itself is one."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # no Linux
        return os.uname().nodename if hasattr(os, "uname") else ""


def born(pid: int) -> str | None:
    """When a process of this machine began, in ticks since its start; None: it is gone, or another
    user's, which /proc may hide (hidepid)."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if after_name[0] in "ZX" else after_name[19]
    except (OSError, IndexError):
        if Path("/proc/self/stat").exists():
            return None
    try:
        os.kill(pid, 0)
        return "alive"
    except OSError:
        return None


def slurm_job() -> list[str]:
    """[id of the Slurm job that this process is of, how often it was requeued]; [] outside."""
    job = os.environ.get("SLURM_JOB_ID")
    return [job, os.environ.get("SLURM_RESTART_COUNT", "0")] if job else []


def last(folder: Path) -> tuple[int, dict | None]:
    """(number, content) of the claim that counts; (-1, None) where there is none.

    A file that is not whole yet has the content {}.
    """
    try:
        names = [entry.name for entry in os.scandir(folder)]
    except FileNotFoundError:
        return -1, None
    numbers = [int(n[6:]) for n in names if n.startswith("claim.") and n[6:].isdigit()]
    if not numbers:
        return -1, None
    try:
        content = json.loads((folder / f"claim.{max(numbers)}").read_bytes())
        return max(numbers), content if isinstance(content, dict) else {}
    except FileNotFoundError:  # its cell has been finished just now
        return -1, None
    except (OSError, ValueError):
        return max(numbers), {}


class Claim:
    """A claim that this process holds, from `Claims.take`, and shows in its file until it is given
    back: who it is, that it lives, and how many `epochs` of the cell are finished."""

    def __init__(self, folder: Path, number: int):
        self.folder, self.number = folder, number
        self.epochs, self.before, self.beats = 0, 0, 0
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.beating, daemon=True)

    @property
    def path(self) -> Path:
        return self.folder / f"claim.{self.number}"

    @property
    def overtaken(self) -> bool:
        """Whether another process has taken over what this claim is on, and perhaps finished it."""
        return last(self.folder)[0] != self.number

    def content(self, **more) -> bytes:
        """What the file says."""
        pid, uid = os.getpid(), os.getuid()
        who = {"machine": machine(), "uid": uid, "pid": pid, "born": born(pid), "job": slurm_job()}
        epochs = max(self.epochs, self.before)  # it goes on where the holder before it was
        return json.dumps(who | {"beat": self.beats, "epochs": epochs} | more).encode()

    def beating(self) -> None:
        """A new beat now and then, until it is over or another process has overtaken this one."""
        while not self.over.wait(BEAT):
            with contextlib.suppress(OSError):  # of a full disk, or one that is away, cells tell
                if self.overtaken:
                    return
                self.beats += 1
                write_bytes(self.path, self.content())

    def release(self, finished: bool = False) -> None:
        """Give it back. Of a finished cell nothing is left to claim: its files are removed, also
        what killed holders were writing. Where this one has been overtaken it leaves all there."""
        self.over.set()
        self.thread.join()
        with contextlib.suppress(OSError):  # then it is found abandoned, as of one that has died
            if self.overtaken:
                return
            if not finished:
                write_bytes(self.path, self.content(released=True))
                return
            for path in (*self.folder.glob(".*.part"), *self.folder.glob("claim.*")):
                path.unlink(missing_ok=True)


class Overtaken(Exception):
    """Another process has taken over the cell that this one trains."""


class Held(Store):
    """A store into which the holder of a claim writes only as long as nobody has overtaken it.

    number: of the claim; where several processes train together, the first one's counts.
    Raises: Overtaken, in all of them, in place of writing weights or evidence of the cell.
    """

    def __init__(self, store: Store, number: int):
        self.runs, self.published, self.number = store.runs, store.published, number

    def overtaken(self, key: str) -> bool:
        """Whether another process has claimed a cell since, and perhaps finished it."""
        return last(self.folder(key))[0] != self.number

    def check(self, key: str) -> None:
        """Raises: Overtaken."""
        first = parallel.place() == 0
        (overtaken,) = parallel.of_the_first([first and self.overtaken(key)])
        if overtaken:
            raise Overtaken

    def load(self, key: str, name: str) -> tuple[dict | None, str | None]:
        """As that of any store. Raises: UserError, in all processes that train together, where they
        do not see the same checkpoint: they would train different networks."""
        state, problem = super().load(key, name)
        if name == "checkpoint" and parallel.processes() > 1:
            progress = (state or {}).get("progress", {})
            at = [progress.get(place) for place in ("phase", "epoch", "batch")]
            if any(another != at for another in parallel.of_all(at)):
                raise UserError(
                    f"the processes see different checkpoints of cell {key[:16]} in "
                    f"{self.folder(key)}: run the same command again in a minute."
                )
        return state, problem

    def save(self, key: str, name: str, state: dict) -> None:
        if name == "checkpoint" and parallel.processes() > 1:  # by the first one alone: no `check`
            if not self.overtaken(key):
                super().save(key, name, state)
            return
        self.check(key)
        super().save(key, name, state)

    def write(self, key: str, result: dict, context: dict) -> None:
        self.check(key)
        super().write(key, result, context)


class Claims:
    """What this process has seen of other's claims, and when.

    clock: seconds that never go back; another one is for tests.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        self.seen: dict[Path, tuple[tuple, float, float]] = {}  # beat, since when, the last look

    def take(self, folder: Path) -> Claim | None:
        """A claim on what this folder is of; None where a process that lives, or may live, has it.

        One elsewhere that has died is found dead by who asks again and again for `STALE` seconds.
        """
        number, content = last(folder)
        if number >= 0 and not self.abandoned(folder, number, content):
            return None
        claim = Claim(folder, number + 1)
        claim.before = (content or {}).get("epochs", 0)
        folder.mkdir(parents=True, exist_ok=True)
        said = claim.content()
        try:
            file = claim.path.open("xb")
        except FileExistsError:
            return None
        try:
            with file:
                file.write(said)
        except BaseException:  # a full disk, say: nobody is to wait for what says nothing
            claim.path.unlink(missing_ok=True)
            raise
        if last(folder)[0] != claim.number:
            return None  # another one, that listed the folder later, was quicker by a number
        self.seen.pop(folder, None)
        now = claim.path.stat().st_mtime  # by the clock of the file system
        for half in folder.glob(".*.part"):  # what a holder that was killed was writing
            with contextlib.suppress(FileNotFoundError):
                if now - half.stat().st_mtime > STALE:  # another one may be writing still
                    half.unlink()
        claim.thread.start()
        return claim

    def look(self, folder: Path) -> bool:
        """Whether a claim on what this folder is of would be given, as far as this one has seen."""
        number, content = last(folder)
        return number < 0 or self.abandoned(folder, number, content)

    def abandoned(self, folder: Path, number: int, content: dict) -> bool:
        """Whether nobody holds this claim any more."""
        if content.get("released"):
            return True
        job = slurm_job()
        if job and content.get("job", [])[:1] == job[:1] and content["job"] != job:
            return True  # this very job, before it was requeued
        if (content.get("machine"), content.get("uid")) == (machine(), os.getuid()):
            return born(int(content["pid"])) != content["born"]
        beat, now = (number, content.get("beat"), content.get("pid")), self.clock()
        before, since, looked = self.seen.get(folder, (None, now, now))
        if before != beat or now - looked > BLIND:  # what kept this one from looking may have kept
            since = now  # the holder from writing
        self.seen[folder] = beat, since, now
        return now - since > STALE


def progress(folder: Path) -> int:
    """The epochs that the holder of a claim has finished; 0 where there is none."""
    return (last(folder)[1] or {}).get("epochs", 0)
