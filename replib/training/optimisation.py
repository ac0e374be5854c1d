"""What a training recipe says of optimisation: the learning rate, what decays, the average.

The recipes of the released codes, as keys of a cell (replib.experiments.params); a rule of `DECAY`
is the code's own grouping by parameter names, said by the kind of a module and its place in the
tree, so that it holds for any network.

    RepAn's cycle          rate_per="epoch", decay="weights"; on CIFAR ResNets
                           "weights_and_plain_norms"; without a cycle "all"
    RepVGG, RepOptimizers  rate_per="step", late_steps=1, decay="matrices_and_identity"; with a
                           warm-up warmup_epochs=5
    ACNet                  rate_per="step", decay="all", bias_rate=2
    DBB                    rate_per="step", decay="not_depthwise", bias_rate=2, drop_last
    OREPA                  rate_per="step", decay="not_norms", bias_rate=2, warmup_steps=5,
                           warmup_counts=False
    DyRep                  rate_per="step", minimum_rate=1e-6, decay="all" on CIFAR, "matrices" on
                           ImageNet; its strong recipe warmup_epochs=5, warmup_per="epoch",
                           warmup_rate=1e-6, warmup_counts=False
    RepLKNet               optimizer="adamw", rate_per="step", warmup_epochs=10, minimum_rate=1e-6,
                           warmup_counts=False, decay="matrices", ema=0.9999, accumulate=4 (its
                           warm-up reaches the base rate one step earlier than here)
    RepMLP                 optimizer="adamw", rate_per="step", warmup_epochs=10, warmup_rate=5e-7,
                           late_steps=1, decay="matrices_and_identity"
    ResRep's base          schedule="steps", milestones=[120, 180]
    ResRep                 rate_per="step", decay="matrices", bias_rate=2; compactors apart
    PSPNet, DeepLab        schedule="poly", rate_per="step", decay="all"
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from replib.blocks import RepBlock
from replib.branches import Convolution, Norm, Scale, Sum
from replib.errors import UserError

SCHEDULES = {
    "cosine": "falls as a half cosine to `minimum_rate` (Loshchilov and Hutter, 2017)",
    "steps": "is multiplied by `milestone_factor` at every epoch of `milestones`",
    "poly": "falls to 0 as what is left of the phase to the power 0.9 (Chen et al., 2018)",
}
POWER = 0.9  # of "poly"
RATE_PER = ("epoch", "step")


# -- the learning rate -----------------------------------------------------------------------------
def cosine(epoch: int, epochs: int, base: float) -> float:
    """base / 2 (1 + cos(pi epoch / epochs)): base at 0, 0 at the end (Loshchilov, 2017)."""
    return base / 2 * (1 + math.cos(math.pi * epoch / epochs))


@dataclass(frozen=True)
class Schedule:
    """The learning rate over a phase; without arguments, a cosine to 0, stepped per epoch."""

    schedule: str = "cosine"
    """Of `SCHEDULES`."""
    rate_per: str = "epoch"
    """"epoch": the rate stays for an epoch; "step": every step has its own."""
    minimum_rate: float = 0.0
    """What the cosine falls to; it would be reached one step after the last."""
    milestones: tuple[int, ...] = ()
    milestone_factor: float = 0.1
    warmup_epochs: int = 0
    """Length of a linear rise, whose first rate is `warmup_rate` and that would end at the base
    rate; together with `warmup_steps`."""
    warmup_steps: int = 0
    warmup_rate: float = 0.0
    warmup_per: str | None = None
    """"epoch": in the warm-up the rate stays for an epoch; None: as `rate_per` says."""
    warmup_counts: bool = True
    """True: the cosine has run since the first step, so that after the warm-up it is below the
    base rate (timm's, hence RepVGG's); False: it begins after the warm-up, at the base rate."""
    late_steps: int = 0
    """Every step has the rate of so many steps before it, the first ones that of the first: 1
    where the scheduler is called after the step with its number (RepVGG, RepOptimizers, RepMLP)."""

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise UserError(f"schedule (={self.schedule!r}) must be one of {', '.join(SCHEDULES)}.")
        for name, known in (("rate_per", RATE_PER), ("warmup_per", (*RATE_PER, None))):
            if (value := getattr(self, name)) not in known:
                raise UserError(f"{name} (={value!r}) must be one of epoch, step.")
        for name in ("warmup_epochs", "warmup_steps", "late_steps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise UserError(f"{name} (={value!r}) must be a whole number, at least 0.")
        for name in ("minimum_rate", "milestone_factor", "warmup_rate"):
            if not 0 <= (value := getattr(self, name)) < math.inf:
                raise UserError(f"{name} (={value!r}) must be a finite number, at least 0.")
        steps = self.schedule == "steps"
        rising = all(a < b for a, b in zip((0, *self.milestones), self.milestones, strict=False))
        wrong = {
            "must be epochs above 0 in rising order": not rising,
            "must name at least one epoch with schedule=steps": steps and not self.milestones,
            "is for schedule=steps: set that, or leave it out": self.milestones and not steps,
        }
        for what in (what for what, found in wrong.items() if found):
            raise UserError(f"milestones (={list(self.milestones)}) {what}.")
        if self.schedule != "cosine" and self.minimum_rate:
            raise UserError(
                f"minimum_rate (={self.minimum_rate}) is for schedule=cosine: set it to 0."
            )
        warms = self.warmup_epochs or self.warmup_steps
        for name in ("warmup_rate", "warmup_per"):
            if (value := getattr(self, name)) and not warms:
                raise UserError(f"{name} (={value!r}) needs warmup_epochs or warmup_steps above 0.")
        if not self.warmup_counts and not warms:
            raise UserError("warmup_counts (=false) needs warmup_epochs or warmup_steps above 0.")
        if not self.warmup_counts and steps:
            raise UserError("warmup_counts (=false) is for schedule=cosine: milestones are epochs.")
        if self.rate_per == "epoch":
            for name in ("warmup_steps", "late_steps"):
                if value := getattr(self, name):
                    raise UserError(f"{name} (={value}) needs rate_per=step.")
            if self.warmup_per == "step":
                raise UserError("warmup_per (='step') needs rate_per=step.")
        elif self.warmup_per == "epoch" and self.warmup_steps:
            raise UserError(
                f"warmup_steps (={self.warmup_steps}) and warmup_per (='epoch') exclude each other."
            )

    def rate(self, base: float, epoch: int, epochs: int, step: int = 0, steps: int = 1) -> float:
        """The rate of step `step` of `steps` in epoch `epoch` of `epochs`, all counted from 0."""
        unit = steps if self.rate_per == "step" else 1  # of time, in an epoch
        time = epoch * unit + (step if self.rate_per == "step" else 0)
        time, total = max(time - self.late_steps, 0), epochs * unit
        warmup = self.warmup_epochs * unit + self.warmup_steps
        if time < warmup:
            risen = time - time % unit if self.warmup_per == "epoch" else time
            return self.warmup_rate + (base - self.warmup_rate) * risen / warmup
        if self.schedule == "steps":
            passed = sum(milestone * unit <= time for milestone in self.milestones)
            return base * self.milestone_factor**passed
        if not self.warmup_counts:
            time, total = time - warmup, total - warmup
        if self.schedule == "poly":
            return base * (1 - time / total) ** POWER
        return self.minimum_rate + cosine(time, total, base - self.minimum_rate)


# -- parameter groups ------------------------------------------------------------------------------
CONVOLUTIONS = (Convolution, nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)


@dataclass(frozen=True)
class Place:
    """A parameter, and where in the tree it stands."""

    parameter: nn.Parameter
    bias: bool  # of a convolution, a linear layer or a norm
    kernel: bool  # the weight of a convolution
    norm: bool  # slope or shift of a norm
    piece: bool  # of a norm inside a block
    alone: bool  # of a norm or a scale that is a branch by itself: an identity branch
    depthwise: bool  # of a depthwise block, with all that is in it, or convolution


def places(model: nn.Module) -> Iterator[Place]:
    """Every parameter once, module by module."""
    pieces, alone, depthwise = set(), set(), set()
    for module in model.modules():
        if isinstance(module, Norm):
            pieces.add(module.norm)
        if isinstance(module, Sum):
            for branch in module.branches.values():
                alone |= {*branch.modules()} if isinstance(branch, Norm | Scale) else set()
        shape = module.geometry if isinstance(module, RepBlock) else module
        if isinstance(module, RepBlock | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            if shape.groups == shape.in_channels > 1:
                depthwise |= {*module.modules()}
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in seen:
                seen.add(parameter)
                yield Place(
                    parameter,
                    bias=name == "bias",
                    kernel=name == "weight" and isinstance(module, CONVOLUTIONS),
                    norm=isinstance(module, NORMS),
                    piece=module in pieces,
                    alone=module in alone,
                    depthwise=module in depthwise,
                )


def matrix(place: Place) -> bool:
    """Two axes or more, and no bias."""
    return place.parameter.dim() > 1 and not place.bias


DECAY: dict[str, Callable[[Place], bool]] = {
    # everything (ACNet; RepAn without a cycle; DyRep on CIFAR)
    "all": lambda place: True,
    # kernels of convolutions (RepAn's cycles)
    "weights": lambda place: place.kernel,
    # and norms outside of blocks (RepAn's cycles on CIFAR ResNets, where the stem's norm decays)
    "weights_and_plain_norms": lambda place: place.kernel or (place.norm and not place.piece),
    # all but depthwise blocks, their norms included (DBB, in MobileNet)
    "not_depthwise": lambda place: not place.depthwise,
    # what has two axes or more (DyRep on ImageNet, RepLKNet)
    "matrices": matrix,
    # and slopes of identity branches (RepVGG, RepOptimizers, RepMLP)
    "matrices_and_identity": lambda place: matrix(place) or (place.alone and not place.bias),
    # no biases, no norms but slopes of identity branches; scales do decay (OREPA)
    "not_norms": lambda place: not place.bias and (place.alone or not place.norm),
}


def parameter_groups(
    model: nn.Module, weight_decay: float, decay: str = "weights", bias_rate: float = 1.0
) -> list[dict]:
    """Groups for an optimizer: what decays, then what does not; every parameter is in one.

    decay: a rule of `DECAY`. bias_rate: the factor on the learning rate of biases, those of norms
    included (2 in the codes of ACNet, DBB and OREPA); biases then have groups of their own, which
    carry it as "lr_scale", timm's name for it, and replib.training.step.set_rate reads it there.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for place in places(model):
        key = not DECAY[decay](place), place.bias and bias_rate != 1
        groups.setdefault(key, []).append(place.parameter)
    return [
        {"params": parameters, "weight_decay": 0.0 if free else weight_decay}
        | ({"lr_scale": bias_rate} if scaled else {})
        for (free, scaled), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


# -- the average -----------------------------------------------------------------------------------
class Average:
    """The exponential moving average of a network in training, evaluated in its place.

        average = Average(model, decay=0.9999)
        for images, labels in batches:
            step(images, labels)
            average.update()
        accuracy(average.network(), ...)

    It starts as the network is. Parameters and running statistics are averaged; counters, and
    buffers of a single number such as the rate of a block, are set, not learnt: they are those of
    the network. As timm's ModelEma, which RepLKNet uses. torch's AveragedModel would do, but it
    looks at a counter on the device in every step, and so waits for a GPU.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.blend = get_ema_multi_avg_fn(decay)
        self.averages, self.values = [*self.model.parameters()], [*model.parameters()]
        self.settings: list[tuple[Tensor, Tensor]] = []
        for ours, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            if ours.is_floating_point() and ours.dim():
                self.averages.append(ours)
                self.values.append(theirs)
            else:
                self.settings.append((ours, theirs))

    @torch.no_grad()
    def update(self) -> None:
        """Take in the network as it is after a step."""
        self.blend(self.averages, self.values, None)

    @torch.no_grad()
    def network(self) -> nn.Module:
        """The averaged network, in eval mode."""
        for ours, theirs in self.settings:
            ours.copy_(theirs)
        return self.model
