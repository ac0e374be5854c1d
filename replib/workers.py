"""Processes that work for this one: it alone answers Ctrl-C, and they are gone as soon as it is."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager


@contextmanager
def unreached_by_interrupts() -> Iterator[None]:
    """Processes started meanwhile never see Ctrl-C, which a terminal sends to all of a group.

    From their first instant, for a mask of signals is inherited: one that is still importing would
    print a traceback. This process itself may hear of one only when this is over.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def follow_parent() -> None:
    """End with the process that started this one, however it ends."""
    parent = multiprocessing.parent_process()

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def keep_no_semaphore() -> None:
    """In a worker that shows progress: the lock that tqdm makes would outlive it, when killed."""
    from tqdm import tqdm  # not on every machine that measures

    tqdm.set_lock(threading.RLock())


def begin(initializer, arguments: tuple) -> None:
    """In a new worker."""
    follow_parent()
    if initializer is not None:
        initializer(*arguments)


class Workers(ProcessPoolExecutor):
    """A pool of such processes. With `with` they end, whatever they are doing."""

    def __init__(self, most: int, method: str, initializer=None, arguments: tuple = ()):
        """method: "spawn" or "fork". initializer: called with the arguments in each."""
        context = multiprocessing.get_context(method)
        super().__init__(most, context, begin, (initializer, arguments))

    def submit(self, *call, **named) -> Future:
        with unreached_by_interrupts():
            return super().submit(*call, **named)

    def end(self) -> None:
        """Kill them, whatever they are doing."""
        for process in list((self._processes or {}).values()):
            process.kill()
        self.shutdown(wait=True, cancel_futures=True)

    def __exit__(self, *_) -> None:
        self.end()
