"""How long known work takes on several devices: each piece on one of them, some after others."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """Something that one device does in a row, after some other work."""

    seconds: float
    after: tuple[str, ...] = ()  # names of work; of others than are asked about: done before


def lines(work: Mapping[str, Work]) -> dict[str, float]:
    """name -> seconds of a piece and of the longest line of work that waits for it."""
    out: dict[str, float] = {}
    following: dict[str, list[str]] = {name: [] for name in work}
    for name, one in work.items():
        for before in one.after:
            if before in work:
                following[before].append(name)

    def visit(name: str) -> float:
        if name not in out:
            out[name] = work[name].seconds + max(map(visit, following[name]), default=0.0)
        return out[name]

    for name in work:
        visit(name)
    return out


def longest_line(work: Mapping[str, Work]) -> float:
    """Seconds that no number of devices can be below."""
    return max(lines(work).values(), default=0.0)


def finished(work: Mapping[str, Work], devices: int) -> float:
    """Seconds until all is done where each device takes, when it is free, what the longest line
    waits for (Graham's list scheduling; SIAM J. Appl. Math. 1969)."""
    urgency = lines(work)
    left = {name: {before for before in one.after if before in work} for name, one in work.items()}
    ready = [(-urgency[name], name) for name in work if not left[name]]
    heapq.heapify(ready)
    running: list[tuple[float, str]] = []
    now = 0.0
    while ready or running:
        while ready and len(running) < devices:
            _, name = heapq.heappop(ready)
            heapq.heappush(running, (now + work[name].seconds, name))
        now, ended = heapq.heappop(running)
        for name, waits in left.items():
            if ended in waits:
                waits.remove(ended)
                if not waits:
                    heapq.heappush(ready, (-urgency[name], name))
    return now


def enough(work: Mapping[str, Work]) -> int:
    """The least number of devices, of 1, 2, 4, ..., beyond which twice as many save less than a
    hundredth of the time."""
    devices = 1
    while finished(work, 2 * devices) < 0.99 * finished(work, devices):
        devices *= 2
    return devices
