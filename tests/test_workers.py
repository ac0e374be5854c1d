"""Worker processes: what a signal reaches, and what is left of them."""

import os
import signal
import time

import pytest

from replib.workers import Workers

pytestmark = pytest.mark.parametrize("method", ["spawn", "fork"])


def test_an_interrupt_reaches_the_parent_alone(method):
    with Workers(1, method) as pool:
        worker = pool.submit(os.getpid).result()
        os.kill(worker, signal.SIGINT)
        assert pool.submit(os.getpid).result() == worker != os.getpid()
        assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_none_is_left_by_an_error(method):
    with pytest.raises(ZeroDivisionError), Workers(2, method) as pool:
        started = [pool.submit(time.sleep, 600) for _ in range(2)]
        processes = list(pool._processes.values())
        1 / 0  # noqa: B018
    assert len(processes) == 2 and not any(process.is_alive() for process in processes)
    assert all(each.done() for each in started)
