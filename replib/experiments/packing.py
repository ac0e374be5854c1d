"""How many cells share one GPU: decided by what is measured while they run.

A small network leaves most of a GPU idle, so several cells at once finish sooner, until they wait
for each other. Nothing here touches a device: rates, memory and times are handed in. (Under
NVIDIA's MPS, where its daemon runs, kernels of different processes run side by side; without it
they take turns, and what is gained is the time between them. The measurement sees either.)
"""

from __future__ import annotations

from dataclasses import dataclass, field

GAIN = 1.1  # what twice as many cells must bring together
TICKS = 3  # epochs of every cell, of which the last two are measured
MEMORY = 0.9  # of the GPU's memory may be used


def next_number(rates: dict[int, float], most: int) -> int:
    """How many cells to run at once, from the summed rates measured with fewer or as many.

    One first, then twice as many as long as that raised the rate by `GAIN`, at most `most`; where
    it did not, the number before. A number whose rate is known is final.
    """
    number, before = 1, 0
    while number in rates:
        if before and rates[number] < GAIN * rates[before]:
            return before
        if number >= most:
            return number
        number, before = min(2 * number, most), number
    return min(number, max(most, 1))


@dataclass
class Packing:
    """Measures the rate of the cells that run, and says how many there should be.

    most: never more, for want of cores or cells; memory lowers it.
    """

    most: int
    wanted: int = 1
    rates: dict[int, float] = field(default_factory=dict)
    running: frozenset[str] = frozenset()
    seen: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    def tick(self, running: frozenset[str], key: str, work: float, now: float) -> None:
        """A cell finished an epoch, `work` FLOPs, at `now` seconds, while `running` ran.

        Counted once every one of them has ticked with the same others beside it: before, some are
        still starting, or being compiled.
        """
        if running != self.running:
            self.running, self.seen = running, {}
        if len(running) != self.wanted or self.wanted in self.rates:
            return
        self.seen.setdefault(key, []).append((now, work))
        if self.seen.keys() < running:
            return
        begin = max(ticks[0][0] for ticks in self.seen.values())
        counted = [[t for t in ticks if t[0] >= begin] for ticks in self.seen.values()]
        if min(map(len, counted)) < TICKS:
            return
        self.rates[self.wanted] = sum(
            sum(work for _, work in ticks[1:]) / (ticks[-1][0] - ticks[0][0]) for ticks in counted
        )
        self.wanted = next_number(self.rates, self.most)

    def memory(self, running: int, free: int, total: int) -> None:
        """What is free of the GPU's memory, in bytes, while `running` cells are at work."""
        each = (total - free) / max(running, 1)
        self.most = max(1, min(self.most, int(MEMORY * total / max(each, 1))))
        self.wanted = min(self.wanted, self.most)

    def out_of_memory(self, running: int) -> None:
        """A cell found no memory beside the others."""
        self.most = self.wanted = max(1, running - 1)
