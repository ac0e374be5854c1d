"""A cycle watched: the loss, lambda, and how fast every convolution turns, epoch by epoch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from replib.analysis.scale_invariance import (
    Watch,
    filters,
    normalised_convolutions,
    root_mean_square,
)
from replib.methods.cycle import Cycle, decay_groups
from replib.networks import outermost_blocks
from replib.training.optimisation import cosine

Schedule = Callable[[int, int, float], float]


@dataclass
class History:
    """What was seen; each a list of records, for pandas.DataFrame."""

    epochs: list[dict] = field(default_factory=list)  # epoch, cycle, learning_rate, rate, loss
    filters: list[dict] = field(default_factory=list)  # epoch, cycle, role and a row of `Watch`
    restarts: list[dict] = field(default_factory=list)  # epoch, mode, before, after: mean losses


def constant(epoch: int, epochs: int, base: float) -> float:
    """A learning rate that stays."""
    return base


def train(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    learning_rate: float,
    weight_decay: float,
    batch_size: int,
    seed: int,
    schedule: Schedule = cosine,
    label_noise: float = 0.0,
    cycle: Cycle | None = None,
    cycles: int = 1,
) -> History:
    """Train in place by plain SGD, `epochs` in each of `cycles`; every cycle begins anew.

    images: (N, C, H, W), normalised; labels: (N,). Convolution kernels decay, nothing else does.
    label_noise: the share of labels that every batch replaces by those of other images, so that
    the gradient never comes to an end.
    Without momentum, so that what is known of plain SGD can be compared with what happens.
    """
    cycle = cycle or Cycle(model, warmup=1, restructure="none")  # one that changes nothing
    history, watch, roles = History(), Watch(model), roles_of(model)
    generator = torch.Generator().manual_seed(seed)
    groups = decay_groups(model, weight_decay)
    for turn in range(cycles):
        before = mean_losses(model, images, labels)
        cycle.start_cycle(images)
        after = mean_losses(model, images, labels)
        for mode in before:
            row = {"epoch": turn * epochs, "mode": mode}
            history.restarts.append(row | {"before": before[mode], "after": after[mode]})
        optimizer = torch.optim.SGD(groups, lr=learning_rate)
        for epoch in range(epochs):
            cycle.epoch(epoch)
            rate = schedule(epoch, epochs, learning_rate)
            for group in optimizer.param_groups:
                group["lr"] = rate
            total, model = 0.0, model.train()
            for batch in torch.randperm(len(labels), generator=generator).split(batch_size):
                told = noisy(labels, batch, label_noise, generator)
                loss = F.cross_entropy(model(images[batch]), told)
                optimizer.zero_grad()
                loss.backward()
                cycle.after_backward()
                watch.step(optimizer)
                total += loss.item() * len(batch)
            at = {"epoch": turn * epochs + epoch, "cycle": turn}
            row = at | {"learning_rate": rate, "loss": total / len(labels)}
            history.epochs.append(row | {"rate": cycle.rate})
            history.filters += [
                at | {"role": roles[row["convolution"]]} | row for row in watch.rows()
            ]
    return history


def roles_of(model: nn.Module) -> dict[str, str]:
    """By name: main or side for the normalised convolutions of blocks, plain for the others."""
    roles = {name: "plain" for name in normalised_convolutions(model)}
    for block_name, block in outermost_blocks(model).items():
        main = set(block.main_branch.modules())
        for name, module in block.named_modules(prefix=block_name):
            if name in roles:
                roles[name] = "main" if module in main else "side"
    return roles


def noisy(labels: Tensor, batch: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """The labels of a batch, some of them replaced by labels of random images."""
    other = labels[torch.randint(len(labels), (len(batch),), generator=generator)]
    return torch.where(torch.rand(len(batch), generator=generator) < share, other, labels[batch])


@torch.no_grad()
def mean_losses(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, float]:
    """{"eval", "train"}: the cross-entropy in both modes; the model is left as it is."""
    modes = {"eval": copy.deepcopy(model).eval(), "train": copy.deepcopy(model).train()}
    return {m: F.cross_entropy(one(images), labels).item() for m, one in modes.items()}


def restored(model: nn.Module, norm: str, images: Tensor, seed: int = 0) -> nn.Module:
    """A copy after one merge, redraw and restore; `norm`: what becomes of the main norms.

    norm: of `replib.branches.NORM_AT_RESTORE`. "match" measures on the images and keeps the
    function, with lambda 0; the others are the released code's way, with lambda 1.
    """
    changed = copy.deepcopy(model)
    how = {"fidelity": "preserving", "rate_schedule": "ramp"} if norm == "match" else {}
    Cycle(changed, warmup=1, norm=norm, seed=seed, **how).start_cycle(images)
    return changed


def length_changes(
    before: nn.Module, after: nn.Module, images: Tensor, labels: Tensor, learning_rate: float
) -> list[dict]:
    """What a restore did to every normalised convolution, at one learning rate.

    A row: {block, convolution, role, before, after, factor, angle_before, angle_after}: root mean
    square lengths |w|, the median over filters of the ratio of effective learning rates
    |w before|^2 / |w after|^2, and by how much (in radians) the next step of SGD on this batch
    would turn a filter. role: "main" for the branch that took the kernel, else "side".
    """
    angles = [next_angles(model, images, labels, learning_rate) for model in (before, after)]
    old, new, rows = normalised_convolutions(before), normalised_convolutions(after), []
    for name, role in roles_of(before).items():
        block, _, convolution = name.partition(".branches.")
        lengths = [filters(model[name]).norm(dim=1) for model in (old, new)]
        row = {"block": block, "convolution": convolution, "role": role}
        row |= {
            "before": root_mean_square(lengths[0].tolist()),
            "after": root_mean_square(lengths[1].tolist()),
        }
        row["factor"] = (lengths[0] / lengths[1]).square().median().item()
        rows.append(row | {"angle_before": angles[0][name], "angle_after": angles[1][name]})
    return rows


def next_angles(
    model: nn.Module, images: Tensor, labels: Tensor, learning_rate: float
) -> dict[str, float]:
    """By what angle one step of SGD on a batch would turn the filters; the model stays as it is."""
    model = copy.deepcopy(model).train()
    watch = Watch(model)
    F.cross_entropy(model(images), labels).backward()
    watch.step(torch.optim.SGD(model.parameters(), lr=learning_rate))
    return {row["convolution"]: row["angle"] for row in watch.rows()}
