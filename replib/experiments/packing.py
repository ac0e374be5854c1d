"""How many cells share one GPU: decided by what is measured while they run.

A small network leaves most of a GPU idle, so several cells at once finish sooner, until they wait
for each other. Nothing here touches a device: rates, memory and times are handed in. (Under
NVIDIA's MPS, where its daemon runs, kernels of different processes run side by side; without it
they take turns, and what is gained is the time between them. The measurement sees either.)
"""

from __future__ import annotations

from dataclasses import dataclass, field

GAIN = 1.1  # what twice as many cells must bring together
EPOCHS = 3  # that are measured, for each cell
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
class Measured:
    """Epochs that some number of cells finished side by side."""

    epochs: int = 0
    work: float = 0.0
    seconds: float = 0.0


@dataclass
class Packing:
    """Measures the rate of the cells that run, and says how many there should be.

    most: never more, for want of cores or cells; memory lowers it.
    """

    most: int
    wanted: int = 1
    rates: dict[int, float] = field(default_factory=dict)
    measured: dict[int, Measured] = field(default_factory=dict)
    running: frozenset[str] = frozenset()
    last: dict[str, float | None] = field(default_factory=dict)  # key -> when an epoch ended

    def tick(self, running: frozenset[str], key: str, work: float, now: float) -> None:
        """A cell finished an epoch, `work` FLOPs, at `now` seconds, while `running` ran.

        An epoch counts that began when every one of them had finished one beside the same others:
        before, some are still starting, or being compiled.
        """
        if running != self.running:
            self.running, self.last = running, {}
        number = len(running)
        if number != self.wanted or number in self.rates:
            return
        together = self.last.keys() >= running
        before, self.last[key] = self.last.get(key), now
        if not together:
            if self.last.keys() >= running:
                self.last = dict.fromkeys(running, None) | {key: now}
            return
        if before is None:
            return
        found = self.measured.setdefault(number, Measured())
        found.epochs += 1
        found.work += work
        found.seconds += now - before
        if found.epochs >= EPOCHS * number:
            self.rates[number] = number * found.work / found.seconds
            self.wanted = next_number(self.rates, self.most)

    def memory(self, running: int, free: int, total: int) -> None:
        """What is free of the GPU's memory, in bytes, while `running` cells are at work."""
        each = (total - free) / max(running, 1)
        self.most = max(1, min(self.most, int(MEMORY * total / max(each, 1))))
        self.wanted = min(self.wanted, self.most)

    def out_of_memory(self, running: int) -> None:
        """A cell found no memory beside the others."""
        self.most = self.wanted = max(1, running - 1)
