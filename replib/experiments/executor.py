"""Cells in parallel on this machine: worker processes of one thread each."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
import traceback
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import torch
from tqdm import tqdm

from replib.errors import UserError
from replib.experiments.cells import Plan, Planned, run_cell
from replib.experiments.store import Store
from replib.training.checkpoint import write_bytes
from replib.training.loop import OutOfTime

_ticks = None  # set in each worker by its initializer


@dataclass(frozen=True)
class Outcome:
    """What a run of a table did."""

    trained: int
    present: int
    out_of_time: int  # cells that were not finished; what they had is checkpointed


def start_worker(ticks, threads: int) -> None:
    """In a new worker: one thread, deterministic, and gone as soon as its parent is."""
    global _ticks
    _ticks = ticks
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    parent = multiprocessing.parent_process()

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def work(
    planned: Planned,
    cells: dict[str, Planned],
    store: Store,
    device: str,
    deadline: float | None,
    checkpoint_seconds: float,
) -> bool:
    """In a worker: one cell. True when it was finished, False when time ran out."""
    try:
        run_cell(
            planned,
            cells,
            store,
            device=device,
            deadline=deadline,
            checkpoint_seconds=checkpoint_seconds,
            tick=lambda: _ticks.put(1),
            say=_ticks.put,
        )
        return True
    except OutOfTime:
        return False
    except (UserError, OSError):
        raise
    except Exception as error:  # a fault of ours: one line for the user, the rest in a file
        log = store.folder(planned.key) / "error.txt"
        write_bytes(log, traceback.format_exc().encode())
        said = (str(error).splitlines() or ["no message"])[0]
        raise UserError(
            f"cell {planned.key[:16]} ({', '.join(planned.rows)}, seed {planned.cell.seed}) failed "
            f"with {type(error).__name__}: {said} (see {log})."
        ) from None


def device_here(wanted: str | None) -> str:
    """The device that is wanted; by default a GPU where there is one.

    Raises: UserError for a GPU where there is none.
    """
    here = torch.cuda.is_available()
    if wanted == "cuda" and not here:
        raise UserError("device (=cuda) is not on this machine: leave --device out, or say cpu.")
    return wanted or ("cuda" if here else "cpu")


def run_plan(
    plan: Plan,
    store: Store,
    *,
    workers: int | None = None,
    device: str | None = None,
    budget_seconds: float | None = None,
    checkpoint_seconds: float = 15,
    title: str = "",
) -> Outcome:
    """Train the missing cells, parents before children, with progress and time left.

    It can be killed at any moment: finished cells stay, started ones go on from their checkpoint.
    Raises: UserError where results cannot be written, or a worker died.
    """
    device = device_here(device)
    missing = plan.missing(store)
    present = len(plan.cells) - len(missing)
    if not missing:
        return Outcome(0, present, 0)
    try:
        store.runs.mkdir(parents=True, exist_ok=True)
        probe = store.runs / f".writable.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"{store.runs} cannot be written ({error.strerror}): make room, or change its "
            "permissions."
        ) from None
    workers = min(workers or os.cpu_count() or 1, len(missing))
    deadline = None if budget_seconds is None else time.monotonic() + budget_seconds
    spawn = multiprocessing.get_context("spawn")
    waiting = {planned.key: planned for planned in missing}
    running: dict[Future, Planned] = {}
    trained = stopped = 0
    ticks = spawn.SimpleQueue()  # no process of its own, that would outlive a killed parent
    pool = ProcessPoolExecutor(workers, spawn, start_worker, (ticks, 1))
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
        while waiting or running:
            late = deadline is not None and time.monotonic() > deadline
            for key, planned in list(waiting.items()):
                # Submitted only when a worker is free, so that a budget can stop the rest.
                blocked = any(
                    parent in waiting or parent in {p.key for p in running.values()}
                    for parent in planned.parents.values()
                )
                if late or blocked or len(running) >= workers:
                    continue
                family = {k: plan.cells[k] for k in (key, *planned.parents.values())}
                options = (store, device, deadline, checkpoint_seconds)
                running[pool.submit(work, planned, family, *options)] = planned
                del waiting[key]
            if not running:
                break
            done, _ = wait(running, timeout=0.3, return_when=FIRST_COMPLETED)
            drain(ticks, bar)
            for future in done:
                finished = future.result()
                running.pop(future)
                trained += finished
                stopped += not finished
        drain(ticks, bar)
    except BrokenProcessPool:
        raise UserError(
            "a worker process died (out of memory?): finished cells are kept; run the same "
            "command again, perhaps with --workers 1."
        ) from None
    except OSError as error:
        raise UserError(
            f"{getattr(error, 'filename', None) or store.runs} cannot be written "
            f"({error.strerror or error}): make room, or change its permissions; finished cells "
            "are kept."
        ) from None
    finally:
        bar.close()
        for process in list((pool._processes or {}).values()):
            process.terminate()  # nothing is lost: see the docstring
        pool.shutdown(wait=True, cancel_futures=True)
    return Outcome(trained, present, stopped + len(waiting))


def drain(ticks, bar: tqdm) -> None:
    """Show what workers sent: an epoch that is finished, or a word for the user."""
    while not ticks.empty():
        sent = ticks.get()
        if isinstance(sent, str):
            bar.write(sent, file=sys.stderr)
        else:
            bar.update(sent)
