"""Cells in parallel on this machine: worker processes of one thread each, or sharing a GPU.

Started by torchrun, all its processes train one cell after the other together.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import platform
import secrets
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from replib import parallel
from replib.blocks import own
from replib.errors import UserError
from replib.experiments.cells import Plan, Planned, cost_of, run_cell
from replib.experiments.claims import BEAT, Claim, Claims, Held, Overtaken, slurm_job
from replib.experiments.packing import Packing
from replib.experiments.store import Store
from replib.training.checkpoint import write_bytes
from replib.training.loader import cores
from replib.training.loop import OutOfTime
from replib.training.step import chosen
from replib.workers import Workers, keep_no_semaphore

GRACE = 10  # seconds after the end of a budget in which cells write their checkpoints
EXECUTORS = ("local", "slurm")
ASK = 2  # seconds between two looks at a cell that another process trains
UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS}
_ticks = None  # set in each worker by its initializer


@dataclass(frozen=True)
class Outcome:
    """What a run of a table did."""

    trained: int
    present: int
    out_of_time: int  # cells that were not finished; what they had is checkpointed


class NotTrained(UserError):
    """Cells that failed, and those that wait for them; the others have been trained.

    failed: key -> why, the first one no cell that waits; of: how many were to be trained.
    """

    def __init__(self, failed: dict[str, str], of: int, late: int = 0):
        self.failed, why = failed, next(iter(failed.values()))
        more = f", {late} not finished in the time given" if late else ""
        super().__init__(
            f"{len(failed)} of {of} cells were not trained{more}; {why}" if of > 1 else why
        )


def settle(threads: int) -> None:
    """So many threads in this process, deterministic."""
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads such memory
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def start_worker(ticks, threads: int, sources: list[own.Source]) -> None:
    """In a new worker: one thread, deterministic.

    sources: the files of the parent's own families of blocks, as it has read them.

    One thread also where cores are left over: more would change the order of sums, and so bits.
    """
    global _ticks
    _ticks = ticks
    for source in sources:
        own.run(source)
    settle(threads)
    keep_no_semaphore()
    if slurm_job():  # which warns all processes of a job; this one works on until it is killed
        for warning in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(warning, signal.SIG_IGN)


def work(planned: Planned, cells: dict[str, Planned], store: Held, options: dict) -> str:
    """In a worker: one cell, with options of `run_cell`.

    "finished"; "late" where time ran out, "crowded" where the GPU's memory did, "overtaken" where
    another run has taken the cell over: they go on later.
    """
    on_gpu = options["device"].startswith("cuda")

    def tick(resumed: int = 0) -> None:
        memory = torch.cuda.mem_get_info() if on_gpu and not resumed else None
        _ticks.put((planned.key, resumed or 1, time.monotonic(), memory))

    try:
        run_cell(planned, cells, store, tick=tick, say=_ticks.put, **options)
        return "finished"
    except OutOfTime:
        return "late"
    except Overtaken:
        return "overtaken"
    except torch.OutOfMemoryError as error:
        let_go(error)
        return "crowded"
    except (UserError, OSError) as error:
        let_go(error)
        if store.overtaken(planned.key):  # who has may have removed what this one was writing
            return "overtaken"
        raise
    except Exception as error:  # a fault of ours: one line for the user, the rest in a file
        log = store.folder(planned.key) / "error.txt"
        write_bytes(log, traceback.format_exc().encode())
        let_go(error)
        said = (str(error).splitlines() or ["no message"])[0]
        raise UserError(f"it failed with {type(error).__name__}: {said} (see {log}).") from None


def let_go(error: BaseException | None) -> None:
    """Free the tensors of a cell, which the frames of its error hold: this worker goes on."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__
    torch.cuda.empty_cache()


def device_here(wanted: str | None) -> str:
    """The device that is wanted; by default a GPU where there is one.

    Raises: UserError for a GPU where there is none.
    """
    here = torch.cuda.is_available()
    if wanted == "cuda" and not here:
        raise UserError("device (=cuda) is not on this machine: leave --device out, or say cpu.")
    return wanted or ("cuda" if here else "cpu")


def urgency(missing: list[Planned], costs: dict[str, float]) -> dict[str, float]:
    """key -> cost of a cell and of the longest line of cells that wait for it.

    The most urgent first leaves no long tail to one worker (Graham's list scheduling by the
    longest path; SIAM J. Appl. Math. 1969).
    """
    out: dict[str, float] = {}
    for planned in reversed(missing):  # children before parents
        after = [out[p.key] for p in missing if planned.key in p.parents.values()]
        out[planned.key] = costs[planned.key] + max(after, default=0.0)
    return out


def check_writable(store: Store) -> None:
    """Raises: UserError where results cannot be written."""
    name = f".writable.{platform.node()}.{secrets.token_hex(4)}"  # of all that share the folder
    try:
        store.runs.mkdir(parents=True, exist_ok=True)
        probe = store.runs / name
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{trouble(error, store.runs)}.") from None


def trouble(error: OSError, folder: Path) -> str:
    """What is wrong with a file, and the remedy where it is known; folder: named where the error
    names none."""
    said = error.strerror or str(error) or type(error).__name__
    if error.errno in UNWRITABLE:
        where = error.filename or folder
        return f"{where} cannot be written ({said}): make room, or change its permissions"
    return f"{error.filename}: {said}" if error.filename else said


def named(planned: Planned) -> str:
    """A cell as it is told to the user."""
    return f"cell {planned.key[:16]} ({', '.join((*planned.rows, f'seed {planned.cell.seed}'))})"


def lost_with(key: str, missing: list[Planned], waiting: dict[str, Planned]) -> list[str]:
    """The cells that wait for this one, parents first."""
    lost = {key}
    for planned in missing:
        if planned.key in waiting and lost & set(planned.parents.values()):
            lost.add(planned.key)
    return [planned.key for planned in missing if planned.key in lost - {key}]


def run_plan(
    plan: Plan,
    store: Store,
    *,
    workers: int | None = None,
    device: str | None = None,
    compile: str = "auto",
    budget_seconds: float | None = None,
    checkpoint_seconds: float = 15,
    title: str = "",
    executor: str = "local",
    slurm: Sequence[str] = (),
) -> Outcome:
    """Train the missing cells, parents before children, with progress and time left.

    executor: "local", this machine; or "slurm", whose jobs do the same each on its node: all that
    follows holds there too, `replib.experiments.slurm` says what differs, and what `slurm` may be.

    workers: cells at once; by default one for each core, on a GPU as many as make them faster
    (`packing`). compile: of replib.training.step.MODES.
    budget_seconds: new cells are started until it is over, whether or not they can finish; then
    each writes its checkpoint after the step it is at. One that has not, `GRACE` seconds later, is
    stopped, and goes on from the checkpoint before. May be 0 or less: one step of each worker.
    It can be killed at any moment: finished cells stay, started ones go on from their checkpoint.
    Several runs may share a store, on one machine or many: each cell is trained by one of them at
    a time (replib.experiments.claims), and the others wait for it where they need it.
    Where torchrun has started several processes, they train the cells together, one by one.
    Raises: UserError where results cannot be written, or a worker died; NotTrained, at the end,
    where cells failed: those that do not start from them, or learn from them, are trained.
    """
    if executor not in EXECUTORS:
        raise UserError(f"executor (={executor!r}) must be one of {', '.join(EXECUTORS)}.")
    if executor == "slurm":
        from replib.experiments.slurm import run_on_slurm

        options = {"workers": workers, "device": device, "compile": compile, "title": title}
        options |= {"budget_seconds": budget_seconds, "checkpoint_seconds": checkpoint_seconds}
        return run_on_slurm(plan, store, slurm=slurm, **options)
    if slurm:
        raise UserError(f"--slurm {slurm[0]} is for --executor slurm, which is not asked for.")
    started, device = time.monotonic(), device_here(device)
    deadline = None if budget_seconds is None else started + budget_seconds
    missing = agreed(plan, plan.missing(store))
    present = len(plan.cells) - len(missing)
    if not missing:
        return Outcome(0, present, 0)
    chosen(compile, device, flops=0, steps=0)  # refuses what this device does not have
    check_writable(store)
    if parallel.processes() > 1:
        options = {"device": device, "compile": compile, "deadline": deadline}
        options["checkpoint_seconds"] = checkpoint_seconds
        return one_by_one(plan, store, missing, title, options)
    most, costs = min(workers or cores(), len(missing)), {}
    spawn = multiprocessing.get_context("spawn")
    ticks = spawn.SimpleQueue()  # no process of its own, that would outlive a killed parent
    pool = Workers(most, "spawn", start_worker, (ticks, 1, own.sources()))
    packed = device.startswith("cuda") and workers is None and most > 1
    packing = Packing(most) if packed else None
    running: dict[Future, Planned] = {}
    claims, held, asked = Claims(), {}, {}  # key -> our claim; key -> when another's was seen
    failed: dict[str, str] = {}  # key -> why
    trained, stopped, begun = 0, 0, None
    bar = tqdm(
        total=sum(planned.epochs for planned in missing),
        desc=f"{title} {len(missing)} cells".strip(),
        unit="epoch",
        file=sys.stdout,
        mininterval=2,
        dynamic_ncols=False,
        ncols=88,
    )
    try:
        waiting = {planned.key: planned for planned in missing}
        while waiting or running:
            # Every call starts something, so that even the shortest budget gets to the end.
            late = begun is not None and deadline is not None and time.monotonic() > deadline
            if late and time.monotonic() > max(deadline, begun) + GRACE:
                break
            now_running = {planned.key for planned in running.values()}
            for key, planned in list(waiting.items()):
                # Submitted only when a worker is free, so that a budget can stop the rest.
                limit = most if packing is None else packing.wanted
                blocked = any(p in waiting or p in now_running for p in planned.parents.values())
                full = len(running) >= limit
                if late or blocked or (full and key not in asked):
                    continue
                if key in asked and time.monotonic() - asked[key] < (BEAT if full else ASK):
                    continue
                if full:  # so that a holder that has died is found dead by the time of its turn
                    claims.look(store.folder(key))
                    asked[key] = time.monotonic()
                    continue
                claim = claims.take(store.folder(key))
                if claim is None:
                    if not asked:
                        bar.write("Another run trains cells of this table: they are waited for.")
                    asked[key] = time.monotonic()
                    continue
                if finished_since(key, store):
                    claim.release(finished=True)
                    bar.update(planned.epochs)
                    present += 1
                    del waiting[key]
                    continue
                held[key] = claim
                family = {k: plan.cells[k] for k in (key, *planned.parents.values())}
                options = {
                    "device": device,
                    "compile": compile,
                    "flops": costs.get(key),
                    "decoders": max(1, cores() // limit),
                    "deadline": deadline,
                    "checkpoint_seconds": checkpoint_seconds,
                }
                here = Held(store, claim.number)
                running[pool.submit(work, planned, family, here, options)] = planned
                now_running.add(key)
                del waiting[key]
            begun = begun or time.monotonic()
            if most > 1 and not costs:  # counted while the first of the table are trained
                costs = {planned.key: cost_of(planned, plan.cells) for planned in missing}
                first = urgency(missing, costs)
                order = {key: (plan.turn.get(key, 0), -first[key]) for key in waiting}
                waiting = {key: waiting[key] for key in sorted(waiting, key=order.get)}
            if not running:
                if late or not waiting:
                    break
                time.sleep(0.3)  # for another process
                continue
            done, _ = wait(running, timeout=0.3, return_when=FIRST_COMPLETED)
            for key, epochs, now, memory in drain(ticks, bar):
                if key in held:
                    held[key].epochs += epochs
                if packing is not None and key in now_running and memory is not None:
                    packing.memory(len(now_running), *memory)
                    epoch = costs[key] / plan.cells[key].epochs
                    packing.tick(frozenset(now_running), key, epoch, now)
            for future in done:
                why = None
                try:
                    end = future.result()
                except UserError as error:
                    end, why = "failed", str(error)
                except OSError as error:
                    if error.errno in UNWRITABLE:  # which the other cells would find, too
                        raise
                    end, why = "failed", f"{trouble(error, store.runs)}."
                planned = running.pop(future)
                trained += end == "finished"
                claim = held.pop(planned.key)
                claim.release(finished=end == "finished")
                stopped += end == "late"
                if end == "overtaken":  # this one was away for long; the other is waited for
                    bar.write(f"Another run has taken over {named(planned)}.")
                    bar.update(-claim.epochs)
                    waiting[planned.key], asked[planned.key] = planned, time.monotonic()
                if end == "crowded" and packing is not None and len(now_running) > 1:
                    packing.out_of_memory(len(now_running))
                    waiting = {planned.key: planned, **waiting}
                elif end == "crowded":
                    why = "it needs more memory than the GPU has: choose a smaller batch_size, or "
                    why += "fewer --workers."
                if why is not None:
                    failed[planned.key] = f"{named(planned)}: {why}"
                    for key in lost_with(planned.key, missing, waiting):
                        why = f"it waits for {named(planned)}, which failed."
                        failed[key] = f"{named(waiting.pop(key))}: {why}"
                    if waiting or running:
                        bar.write(f"{failed[planned.key]} Other cells are trained all the same.")
        drain(ticks, bar)
    except BrokenProcessPool:
        raise UserError(
            "a worker process died (out of memory?): finished cells are kept; run the same "
            "command again, perhaps with --workers 1."
        ) from None
    except OSError as error:
        raise UserError(f"{trouble(error, store.runs)}; finished cells are kept.") from None
    finally:
        bar.close()
        pool.end()  # nothing is lost: see the docstring
        for claim in held.values():
            claim.release()
    left = stopped + len(running) + len(waiting)
    if failed:
        raise NotTrained(failed, len(missing), left)
    return Outcome(trained, present, left)


def finished_since(key: str, store: Store) -> bool:
    """Whether another process has finished a cell since it was planned."""
    return store.read(key) is not None and store.has_weights(key)


def agreed(plan: Plan, missing: list[Planned]) -> list[Planned]:
    """The missing cells as the first process sees them: another may see files of the store later.

    Raises: UserError, in all processes, where one does not know a cell.
    """
    keys = parallel.of_all([planned.key for planned in missing])[0]
    unknown = [key for key in keys if key not in plan.cells]
    for place, (machine, lacks) in enumerate(parallel.of_all((platform.node(), unknown[:1]))):
        for key in lacks:
            raise UserError(
                f"process {place}, on {machine}, does not know cell {key[:16]}, which process 0 "
                "is to train: give all nodes the same code, parameters and data."
            )
    return [plan.cells[key] for key in keys]


def one_by_one(
    plan: Plan, store: Store, missing: list[Planned], title: str, options: dict
) -> Outcome:
    """The missing cells, each trained by all processes together (replib.parallel)."""
    settle(1)
    present, quiet = len(plan.cells) - len(missing), parallel.place() > 0
    total, claims, trained = sum(planned.epochs for planned in missing), Claims(), 0
    title, left = f"{title} {len(missing)} cells".strip(), list(missing)  # parents come first
    with tqdm(total=total, desc=title, unit="epoch", disable=quiet, file=sys.stdout) as bar:
        say = (lambda text: None) if quiet else bar.write
        while left:
            planned = left[0]
            parallel.wait()  # for files of the first process
            claim, there = claimed_together(planned.key, claims, store)
            if there:
                bar.update(planned.epochs)
                left.pop(0)
                continue
            held = Held(store, -1 if claim is None else claim.number)

            def tick(resumed: int = 0, claim=claim, held=held, key=planned.key) -> None:
                bar.update(resumed or 1)
                if claim is not None:
                    claim.epochs += resumed or 1
                held.check(key)  # all stop together, here

            end = False
            try:
                run_cell(
                    planned,
                    plan.cells,
                    held,
                    tick=tick,
                    say=say,
                    decoders=max(1, cores() // parallel.processes()),
                    **options,
                )
                end, trained = True, trained + 1
                left.pop(0)
            except OutOfTime:
                return Outcome(trained, len(plan.cells) - len(left) - trained, len(left))
            except Overtaken:  # these were away for long; the other is waited for
                say(f"Another run has taken over {named(planned)}.")
                bar.update(0 if claim is None else -claim.epochs)
            finally:
                if claim is not None:
                    claim.release(finished=end)
    parallel.wait()
    return Outcome(trained, present + len(missing) - trained, 0)


def claimed_together(key: str, claims: Claims, store: Store) -> tuple[Claim | None, bool]:
    """(the claim, in the first process; whether another run has finished the cell since)."""
    while True:
        first = parallel.place() == 0
        claim = claims.take(store.folder(key)) if first else None
        there = claim is not None and finished_since(key, store)
        taken, there = parallel.of_the_first([claim is not None, there])
        if there and claim is not None:
            claim.release(finished=True)
        if taken:
            return claim, bool(there)
        time.sleep(ASK)


def drain(ticks, bar: tqdm) -> list[tuple]:
    """Show what workers sent: a word for the user, or an epoch that is finished; returns these."""
    epochs = []
    while not ticks.empty():
        sent = ticks.get()
        if isinstance(sent, str):
            bar.write(sent, file=sys.stderr)
        else:
            bar.update(sent[1])
            epochs.append(sent)
    return epochs
