"""Several cells at once: throughput of training steps over the number of processes."""

from __future__ import annotations

import math
import multiprocessing
import os
from dataclasses import replace
from functools import partial

import torch

from replib.benchmark.agreement import Unequal, agreement, difference
from replib.benchmark.setting import Setting, Subject, images
from replib.benchmark.steps import running
from replib.benchmark.subjects import Way
from replib.benchmark.timing import alternate, quotients, spread, synchronise
from replib.training.step import PRECISIONS
from replib.workers import follow_parent, unreached_by_interrupts


def worker(pipe, subject: Subject, way: Way, setting: Setting) -> None:
    """In a process of its own: (steps, threads) in, the last loss out."""
    follow_parent()
    torch.set_num_threads(1)
    x, labels = images(setting, subject.batch, subject.channels, subject.size)
    run = running(way, subject.make().to(setting.device), x, labels, setting.device)
    while (order := pipe.recv()) is not None:
        count, threads = order
        if not setting.on_gpu:
            torch.set_num_threads(threads)
        for _ in range(count):
            loss = run()
        synchronise(setting.device)
        pipe.send(loss.item())


def packed(setting: Setting, subject: Subject, way: Way, steps_each: int) -> dict:
    """Training steps per second of several processes at once; on a processor, of one thread."""
    context = multiprocessing.get_context("spawn")
    pairs = [context.Pipe() for _ in range(max(setting.tier.workers))]
    plain = replace(setting, deadline=math.inf, profiled=frozenset())
    workers = [
        context.Process(target=worker, args=(end, subject, way, plain), daemon=True)
        for _, end in pairs
    ]
    pipes = [pipe for pipe, _ in pairs]
    losses: dict[int, float] = {}

    def together(count: int, threads: int = 1) -> None:
        for pipe in pipes[:count]:
            pipe.send((steps_each, threads))
        for index, pipe in enumerate(pipes[:count]):
            losses.setdefault(index, pipe.recv())

    try:
        with unreached_by_interrupts():
            for process in workers:
                process.start()
        together(len(pipes))  # all are there
        one, *others = setting.tier.workers
        actions = {named(one): partial(together, one)}
        actions |= {named(count): partial(together, count) for count in others}
        cores = os.cpu_count() or 1
        if not setting.on_gpu and cores > 1:
            actions[f"1 process, {cores} threads"] = partial(together, 1, cores)
        options = {"device": "cpu", "rounds": setting.tier.rounds, "deadline": setting.deadline}
        times = alternate(actions, **options)
    finally:
        for process in workers:
            process.kill()
            process.join()
    worst = max(abs(loss - losses[0]) / abs(losses[0]) for loss in losses.values())
    eps = torch.finfo(PRECISIONS[way.precision]).eps
    same = {"way": "all processes"} | agreement({"outputs": worst}, {"outputs": 0.0}, eps)
    if not same["equal"]:
        raise Unequal(difference(same))
    counts = {name: steps_each * int(name.split()[0]) for name in times}
    rates = {n: [counts[n] / s for s in seconds] for n, seconds in times.items()}
    base = rates[named(one)]
    return {
        "numbers": {f"{n}, steps per second": spread(r) for n, r in rates.items()},
        "ratios": [
            {"of": n, "over": named(one), "what": "throughput"} | quotients(r, base)
            for n, r in rates.items()
            if n != named(one)
        ],
        "agreement": [same],
    }


def named(count: int) -> str:
    return f"{count} process" + ("es" if count > 1 else "")
