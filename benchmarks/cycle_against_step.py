"""What merging and restoring a whole network costs, against one training step.

Run: python benchmarks/cycle_against_step.py [--body cifar_repvgg_a1] [--batch 128]
Prints medians and their ratio, measured in turn in one process.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F

from replib.methods.cycle import Cycle
from replib.models import build


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--body", default="cifar_repvgg_a1")
    arguments.add_argument("--block", default="repvgg")
    arguments.add_argument("--batch", type=int, default=128)
    arguments.add_argument("--rounds", type=int, default=7)
    options = arguments.parse_args()
    torch.manual_seed(0)
    model = build(options.body, options.block, classes=10, in_channels=3)
    model = model.to(memory_format=torch.channels_last).train()
    x = torch.randn(options.batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    y = torch.randint(0, 10, (options.batch,))
    cycle = Cycle(model, warmup=5)
    optimizer = torch.optim.SGD(cycle.parameter_groups(2e-4), lr=0.01)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    times: dict[str, list[float]] = {"training step": [], "merge, redraw, restore": []}
    for _ in range(options.rounds + 1):
        for name, action in zip(times, (step, cycle.start_cycle), strict=True):
            start = time.perf_counter()
            action()
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values[1:]) for name, values in times.items()}
    for name, seconds in medians.items():
        print(f"{name:<24} {1e3 * seconds:8.1f} ms (median of {options.rounds})")
    step_time, cycle_time = medians.values()
    print(f"{'ratio':<24} {cycle_time / step_time:8.3f} of a step at batch {options.batch}")


if __name__ == "__main__":
    main()
