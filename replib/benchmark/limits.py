"""The share of what the machine can do that training steps reach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from replib.benchmark.agreement import Unequal
from replib.benchmark.setting import Setting, Subject, images, timed
from replib.benchmark.steps import in_mib, running
from replib.benchmark.subjects import LeftOut, Way
from replib.benchmark.timing import Action, profile, rounded, spread
from replib.training.step import PRECISIONS


def machine_rates(setting: Setting, precision: str = "float32") -> tuple[dict[str, Action], dict]:
    """(actions, {action: (what, amount)}): bytes moved, or floating-point operations done."""
    tier, device = setting.tier, setting.device
    count, n, dtype = int(tier.gigabytes * 1e9 / 4), tier.matrix, PRECISIONS[precision]
    a, b, c = (torch.ones(count, device=device) for _ in range(3))
    left, right = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    side, channels = (8, 16) if tier.name == "quick" else (56, 128)
    batch = 64 if setting.on_gpu else 4
    x = torch.randn(batch, channels, side, side, device=device, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype)
    weight = weight.contiguous(memory_format=torch.channels_last)
    operations = 2 * batch * channels * channels * 9 * side * side
    actions = {
        "copy": lambda: b.copy_(a),
        "triad": lambda: torch.add(a, b, alpha=3.0, out=c),
        "matrix product": lambda: left @ right,
        "convolution": lambda: F.conv2d(x, weight, padding=1),
    }
    amounts = {
        "copy": ("bytes", 8 * count),
        "triad": ("bytes", 12 * count),
        "matrix product": ("operations", 2 * n**3),
        "convolution": ("operations", operations),
    }
    return actions, amounts


def machine(setting: Setting) -> dict:
    """How fast memory is copied, and matrices and images are multiplied, here."""
    actions, amounts = machine_rates(setting)
    times = timed(setting, actions)
    numbers = {}
    for name, seconds in times.items():
        what, amount = amounts[name]
        unit = "GB/s" if what == "bytes" else "GFLOP/s"
        numbers[f"{name}, {unit}"] = spread([amount / s / 1e9 for s in seconds])
    return {"numbers": numbers}


def least_bytes(saved: int, model: nn.Module, inputs: Sequence[Tensor]) -> int:
    """Bytes that a step must move at least once.

    What is saved is written and read; a parameter is read forward and backward, its gradient
    written and read, itself and its momentum read and written; inputs are read.
    """
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    given = sum(t.numel() * t.element_size() for t in inputs)
    return 2 * saved + 8 * parameters + given


def share(setting: Setting, subjects: Mapping[str, Subject], ways: Sequence[Way]) -> dict:
    """The share of the machine's measured rates that training steps reach.

    The limit is the larger of the two times that bytes and operations need at these rates.
    """
    out: dict = {"numbers": {}, "ways": [], "left_out": {}}
    precision = ways[0].precision
    actions, amounts = machine_rates(setting, precision)
    runs, needs = {}, {}
    for way in ways:
        subject = subjects[way.network]
        x, labels = images(setting, subject.batch, subject.channels, subject.size)
        try:
            run = running(way, subject.make().to(setting.device), x, labels, setting.device)
        except LeftOut as reason:
            out["left_out"][way.name] = str(reason)
            continue
        if not run().isfinite():
            raise Unequal(f"{way.name}: the loss is not finite")
        with FlopCounterMode(display=False) as counter:
            run.step.update(run.step.eager, run.x, run.labels)
        moved = least_bytes(run.saved(), run.model, (run.x, run.labels))
        runs[way.name], needs[way.name] = run, (moved, counter.get_total_flops())
    times = timed(setting, actions | runs)
    rates = {"bytes": [], "operations": []}
    for name in actions:
        what, amount = amounts[name]
        rates[what].append([amount / seconds for seconds in times[name]])
    best = {what: [max(r) for r in zip(*found, strict=True)] for what, found in rates.items()}
    for name in runs:
        moved, operations = needs[name]
        seconds = times[name]
        by_bytes = [moved / r / s for r, s in zip(best["bytes"], seconds, strict=True)]
        by_work = [operations / r / s for r, s in zip(best["operations"], seconds, strict=True)]
        line = {"way": name, "milliseconds": spread(seconds, 1000)}
        line |= {"least_mib": in_mib(moved), "gflop": rounded(operations / 1e9)}
        out["ways"].append(line)
        out["numbers"] |= {
            f"{name}: share of the memory bandwidth, %": spread(by_bytes, 100),
            f"{name}: share of the arithmetic rate, %": spread(by_work, 100),
            f"{name}: share of the limit, %": spread(
                [max(pair) for pair in zip(by_bytes, by_work, strict=True)], 100
            ),
        }
    out["numbers"]["memory bandwidth, GB/s"] = spread(best["bytes"], 1e-9)
    out["numbers"]["arithmetic rate, GFLOP/s"] = spread(best["operations"], 1e-9)
    out["profiles"] = {
        name: profile(run, setting.device) for name, run in runs.items() if name in setting.profiled
    }
    return out
