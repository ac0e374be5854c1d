"""The one training loop: phases of epochs, each with a fresh optimizer and a fresh cosine.

A plain run is one phase. A cycle is several: at the start of each, the method restructures the
network. Everything random is drawn from (seed, purpose, phase, epoch), so a run that is killed and
resumed at an epoch computes what the undisturbed run computes, bit for bit on the same CPU.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from replib.fusing import deployed_copy
from replib.training.data import Dataset, augmented, derive

VERSION = 1  # raise when the numbers of a training run change
EVALUATION_BATCH = 1000
PROBE_IMAGES = 256  # un-augmented training images on which a function jump is measured


class OutOfTime(Exception):
    """The time budget is spent; a checkpoint was written."""


@dataclass(frozen=True)
class Recipe:
    """One phase's optimisation: SGD, cosine to 0 stepped per epoch, optional global clipping."""

    phases: int
    epochs: int
    batch_size: int
    learning_rate: float
    momentum: float
    nesterov: bool
    weight_decay: float
    clip_norm: float | None
    clip: str  # "all", or "decayed": the group with weight decay only, as RepAn's cycles
    crop_padding: int
    flip: bool
    next_start: str  # the next phase goes on from the "best" or the "last" epoch
    select: str  # "validation" or "test"
    reseed_each_phase: bool  # every phase sees the same order, as RepAn's released code


@dataclass
class Task:
    """What is trained, on what, and how the method takes part."""

    model: nn.Module
    data: Dataset
    train: Tensor  # indices of training images
    validation: Tensor
    recipe: Recipe
    groups: Callable[[], list[dict]]  # parameter groups for a new optimizer
    loss: Callable[[Tensor, Tensor, Tensor], Tensor]  # (logits, labels, inputs) -> scalar
    seed: int
    method: object | None = None  # start_cycle, epoch, after_backward, state_dict: see Cycle
    device: str = "cpu"


@dataclass
class Progress:
    """All that a resumed run needs, besides the model."""

    phase: int = 0
    epoch: int = 0  # of this phase: the next one to run
    history: list[dict] = field(default_factory=list)
    restarts: list[dict] = field(default_factory=list)
    best: dict | None = None  # {"score", "index", "weights"} over the whole run
    phase_best: dict | None = None


def cosine(epoch: int, epochs: int, base: float) -> float:
    """base / 2 (1 + cos(pi epoch / epochs)): base at 0, 0 at the end (Loshchilov, 2017)."""
    return base / 2 * (1 + math.cos(math.pi * epoch / epochs))


@torch.no_grad()
def accuracy(model: nn.Module, data: Dataset, images: Tensor, labels: Tensor, device: str) -> float:
    """The fraction of images whose largest logit is their label; model in eval mode."""
    right = 0
    for x, y in zip(images.split(EVALUATION_BATCH), labels.split(EVALUATION_BATCH), strict=True):
        x = data.normalised(x, device).contiguous(memory_format=torch.channels_last)
        right += (model(x).argmax(1).cpu() == y).sum().item()
    return right / len(labels)


def relative_jump(before: Tensor, after: Tensor) -> float:
    """max |after - before| / max |before|, of logits."""
    return float(f"{((after - before).abs().max() / before.abs().max()).item():.4g}")


def fit(
    task: Task,
    *,
    resume: dict | None = None,
    checkpoint: Callable[[dict], None] | None = None,
    checkpoint_seconds: float = 15,
    deadline: float | None = None,
    tick: Callable[[], None] = lambda: None,
) -> Progress:
    """Train; returns the history and the selected weights.

    resume: what `checkpoint` was given by a run that was stopped.
    deadline: `time.monotonic()` after which the run checkpoints and raises OutOfTime.
    tick: called after every epoch.
    """
    model = task.model.to(task.device, memory_format=torch.channels_last)
    recipe = task.recipe
    progress, optimizer = Progress(), None
    train_images = task.data.train_images[task.train].to(task.device)
    train_labels = task.data.train_labels[task.train].to(task.device)
    probe = task.data.normalised(train_images[:PROBE_IMAGES], task.device)
    if resume is not None:
        progress = Progress(**resume["progress"])
        model.load_state_dict(resume["model"])
        if task.method is not None:
            task.method.load_state_dict(resume["method"])
        optimizer = make_optimizer(task)
        optimizer.load_state_dict(resume["optimizer"])
    written = time.monotonic()
    while progress.phase < recipe.phases:
        if optimizer is None:
            start_phase(task, progress, probe)
            optimizer = make_optimizer(task)
        while progress.epoch < recipe.epochs:
            if task.method is not None:
                task.method.epoch(progress.epoch)
            rate = cosine(progress.epoch, recipe.epochs, recipe.learning_rate)
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss = train_epoch(task, optimizer, train_images, train_labels, progress)
            record(task, progress, rate, loss)
            progress.epoch += 1
            tick()
            late = deadline is not None and time.monotonic() > deadline
            due = time.monotonic() - written > checkpoint_seconds
            if checkpoint is not None and (late or due):
                checkpoint(
                    {
                        "progress": vars(progress),
                        "model": model.state_dict(),
                        "method": task.method.state_dict() if task.method is not None else {},
                        "optimizer": optimizer.state_dict(),
                    }
                )
                written = time.monotonic()
            if late:
                raise OutOfTime
        progress.phase, progress.epoch, optimizer = progress.phase + 1, 0, None
    return progress


def make_optimizer(task: Task) -> torch.optim.SGD:
    """A new SGD over the task's parameter groups."""
    recipe = task.recipe
    return torch.optim.SGD(
        task.groups(),
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
    )


def start_phase(task: Task, progress: Progress, probe: Tensor) -> None:
    """Go on from the selected weights of the phase before, and let the method restructure."""
    model = task.model
    if progress.phase and task.recipe.next_start == "best":
        model.load_state_dict(progress.phase_best["weights"])
    progress.phase_best = None
    if task.method is None:
        return
    with torch.no_grad():
        before = copy.deepcopy(model).eval()(probe), copy.deepcopy(model).train()(probe)
        task.method.start_cycle(probe)
        after = copy.deepcopy(model).eval()(probe), copy.deepcopy(model).train()(probe)
    progress.restarts.append(
        {
            "phase": progress.phase,
            "jump_eval": relative_jump(before[0], after[0]),
            "jump_train": relative_jump(before[1], after[1]),
            "same_class": (before[0].argmax(1) == after[0].argmax(1)).double().mean().item(),
        }
    )


def train_epoch(
    task: Task, optimizer: torch.optim.SGD, images: Tensor, labels: Tensor, progress: Progress
) -> float:
    """One pass over the training images; returns the mean loss."""
    recipe, model = task.recipe, task.model.train()
    phase = 0 if recipe.reseed_each_phase else progress.phase
    generator = torch.Generator().manual_seed(derive(task.seed, "order", phase, progress.epoch))
    order = torch.randperm(len(labels), generator=generator)
    clipped = [
        parameter
        for group in optimizer.param_groups
        for parameter in group["params"]
        if recipe.clip == "all" or group["weight_decay"]
    ]
    total = torch.zeros((), device=task.device)
    for batch in order.split(recipe.batch_size):
        batch = batch.to(task.device)
        x = augmented(images[batch], generator, crop_padding=recipe.crop_padding, flip=recipe.flip)
        x = task.data.normalised(x, task.device).contiguous(memory_format=torch.channels_last)
        y = labels[batch]
        loss = task.loss(model(x), y, x)
        optimizer.zero_grad()
        loss.backward()
        if recipe.clip_norm is not None:
            nn.utils.clip_grad_norm_(clipped, recipe.clip_norm)
        if task.method is not None:
            task.method.after_backward()
        optimizer.step()
        total += loss.detach() * len(batch)
    return total.item() / len(labels)


def record(task: Task, progress: Progress, rate: float, loss: float) -> None:
    """Evaluate, log the epoch, and keep the weights where they are the best so far.

    By validation accuracy, the later of equals: with few images ties are common, and the later
    epoch has the smaller learning rate. By test accuracy, strictly better only, as RepAn.
    """
    data, test_selects = task.data, task.recipe.select == "test"
    deployed = deployed_copy(task.model.eval())  # with the current lambda; several times faster

    def correct(images: Tensor, labels: Tensor) -> float | None:
        return accuracy(deployed, data, images, labels, task.device) if len(labels) else None

    test = correct(data.test_images, data.test_labels)
    held = task.validation
    validation = correct(data.train_images[held], data.train_labels[held])
    progress.history.append(
        {
            "phase": progress.phase,
            "epoch": progress.epoch,
            "learning_rate": float(f"{rate:.6g}"),
            "rate": task.method.rate if task.method is not None else None,
            "train_loss": float(f"{loss:.6g}"),
            "validation_accuracy": validation,
            "test_accuracy": test,
        }
    )
    score = test if test_selects else validation
    for name in ("phase_best", "best"):
        best = getattr(progress, name)
        better = best is None or (score > best["score"] if test_selects else score >= best["score"])
        if better:
            weights = {k: v.detach().cpu().clone() for k, v in task.model.state_dict().items()}
            index = len(progress.history) - 1
            setattr(progress, name, {"score": score, "index": index, "weights": weights})


def training_flops(task: Task) -> tuple[int, int]:
    """(student, teacher) floating-point operations of one training image, forward and backward.

    Counted by torch's FlopCounterMode on one batch: convolutions and matrix products, two per
    multiply-add. Norms and activations are not counted.
    """
    n = min(task.recipe.batch_size, len(task.train))
    x = task.data.normalised(task.data.train_images[task.train[:n]], task.device)
    y = task.data.train_labels[task.train[:n]].to(task.device)
    model = copy.deepcopy(task.model).to(task.device).train()
    with FlopCounterMode(display=False) as student:
        F.cross_entropy(model(x), y).backward()
    logits = model(x).detach().requires_grad_()
    with FlopCounterMode(display=False) as teacher:
        task.loss(logits, y, x)
    return student.get_total_flops() // n, teacher.get_total_flops() // n


@torch.no_grad()
def deployed_report(model: nn.Module, data: Dataset, device: str) -> dict:
    """The fused network: parameters, FLOPs per image, test accuracy, and the error of fusing."""
    model = model.to(device).eval()
    fused = deployed_copy(model)
    x = data.normalised(data.test_images[:EVALUATION_BATCH], device)
    with FlopCounterMode(display=False) as counter:
        fused(x[:1])
    return {
        "test_accuracy": accuracy(fused, data, data.test_images, data.test_labels, device),
        "parameters": sum(parameter.numel() for parameter in fused.parameters()),
        "flops": counter.get_total_flops(),
        "fusing_error": relative_jump(model(x), fused(x)),
    }
