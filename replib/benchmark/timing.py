"""Times of several things measured side by side, in turn, in one process."""

from __future__ import annotations

import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

MIN_ROUNDS = 3  # fewer have no spread
ROUND_SECONDS = 0.03  # what takes less is repeated within a round, and the mean is taken
SHORT, MORE = 6.0, 6  # seconds; within them there are up to so many times the rounds
MIB = 2**20
Action = Callable[[], object]


@contextmanager
def quiet() -> Iterator[None]:
    """No garbage collection in between."""
    gc.collect()
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def synchronise(device: str) -> None:
    """Wait for a GPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def seconds_of(action: Action, device: str, repeats: int = 1) -> float:
    """Seconds of one `action()`, the mean of `repeats`; on a GPU by its own events."""
    if torch.device(device).type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(repeats):
            action()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / repeats
    begin = time.perf_counter()
    for _ in range(repeats):
        action()
    return (time.perf_counter() - begin) / repeats


def alternate(
    actions: dict[str, Action], *, device: str, rounds: int, deadline: float = math.inf
) -> dict[str, list[float]]:
    """{name: seconds in every round}: each round runs every action, each time in another order.

    A first round warms up and is not counted. Where all is over within `SHORT` seconds there are
    up to `MORE` times as many rounds. After `deadline`, on the clock of time.monotonic(), no round
    begins but the first `MIN_ROUNDS`.
    """
    found: dict[str, list[float]] = {name: [] for name in actions}
    names = list(actions)
    with quiet():
        # The first call allocates and chooses algorithms; the second tells how long one takes.
        for action in actions.values():
            seconds_of(action, device)
        once = {name: seconds_of(action, device) for name, action in actions.items()}
        repeats = {n: max(1, math.ceil(ROUND_SECONDS / max(t, 1e-7))) for n, t in once.items()}
        if max(once.values()) * len(actions) > 3:  # seconds: the second call was a round
            for name, seconds in once.items():
                found[name].append(seconds)
        begin = time.monotonic()
        while (done := len(found[names[0]])) < MORE * rounds:
            now = time.monotonic()
            if done >= rounds and now - begin > SHORT:
                break
            if done >= MIN_ROUNDS and now > deadline:
                break
            turn = done % len(names)
            for name in names[turn:] + names[:turn]:
                found[name].append(seconds_of(actions[name], device, repeats[name]))
    return found


# -- summaries ------------------------------------------------------------------------------------
def rounded(value: float) -> float | None:
    """Four significant digits; None for what JSON has no word for."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


def spread(values: Sequence[float], factor: float = 1.0) -> dict:
    """{"median", "low", "high", "rounds"}: low and high are the quartiles."""
    low, middle, high = (
        statistics.quantiles(values, n=4, method="inclusive")
        if len(values) > 1
        else (values[0],) * 3
    )
    numbers = {"median": middle, "low": low, "high": high}
    return {k: rounded(v * factor) for k, v in numbers.items()} | {"rounds": len(values)}


def quotients(of: Sequence[float], over: Sequence[float]) -> dict:
    """The spread of of / over, round by round: what slows both in a round cancels."""
    return spread([a / b for a, b in zip(of, over, strict=True)])


def slope(xs: Sequence[float], rounds: Sequence[Sequence[float]]) -> dict:
    """The spread of the slope of log y over log x by least squares, round by round."""
    logs = [math.log(x) for x in xs]
    centre = statistics.fmean(logs)
    weights = [x - centre for x in logs]
    norm = sum(w * w for w in weights)
    return spread(
        [sum(w * math.log(y) for w, y in zip(weights, ys, strict=True)) / norm for ys in rounds]
    )


# -- where the time goes --------------------------------------------------------------------------
def profile(action: Action, device: str, rows: int = 10) -> list[dict]:
    """The operators that take most of the time of one `action()`: torch.profiler's self time."""
    from torch.profiler import ProfilerActivity

    on_gpu = torch.device(device).type == "cuda"
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with torch.profiler.profile(activities=kinds) as profiler:
        action()
        if on_gpu:
            torch.cuda.synchronize()
    name = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda e: getattr(e, name), reverse=True)
    total = sum(getattr(event, name) for event in events) or 1
    return [
        {
            "operator": event.key[:60],
            "calls": event.count,
            "milliseconds": rounded(getattr(event, name) / 1000),
            "share": rounded(getattr(event, name) / total),
        }
        for event in events[:rows]
    ]


# -- what else the machine does -------------------------------------------------------------------
def busy_seconds() -> float | None:
    """Processor seconds that the whole machine has worked since it started; None if unknown."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    except OSError:
        return None
    user, nice, system, _, _, interrupt, soft, steal = map(int, fields)
    return (user + nice + system + interrupt + soft + steal) / os.sysconf("SC_CLK_TCK")


def own_seconds() -> float:
    """Processor seconds of this process and of its children that have ended."""
    return sum(os.times()[:4])
