"""The cycle of RepAn (Recursive-Rep): merge, redraw, restore, train on.

A trained multi-branch network is merged, its side branches are drawn anew, the merged kernel is
written back into the main branch, and training goes on with a fresh optimizer and a fresh cosine.
The deployed network never changes its size.

Source: Fei et al., "RepAn: Enhanced Annealing through Re-parameterization", CVPR 2024, and its
released code, whose semantics are `fidelity="official"`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from replib import parallel
from replib.blocks import RepBlock
from replib.branches import Norm
from replib.kernels import Kernel, convolve
from replib.methods.calibration import (
    NORMS,
    calibrate,
    in_full_precision,
    normalised_by_batch,
)
from replib.networks import outermost_blocks
from replib.training.optimisation import parameter_groups

VERSION = 1  # raise when the numbers of a cycle change

RATE_SCHEDULES: dict[str, Callable[[int, int], float]] = {
    # As released: the first epoch runs at full rate, since the ramp is set at its end.
    "official": lambda epoch, warmup: 1.0 if epoch == 0 else min((epoch + 1) / warmup, 1.0),
    "ramp": lambda epoch, warmup: min(epoch / warmup, 1.0),
    "constant": lambda epoch, warmup: 1.0,
}
RESTRUCTURE = {
    "cycle": "merge, redraw the side branches, restore the main branch",
    "redraw": "only redraw the side branches; the main branch keeps what it has",
    "none": "change nothing: the same code is then plain warm restarts, the control",
}
FREEZE = {
    "none": "the main branch trains from the start of a cycle",
    "skip": "during the warm-up its gradients are None: skipped, weight decay included (torch 2)",
    "zero": "during the warm-up its gradients are 0: weight decay still acts (torch 1.9)",
}


def decay_groups(model: nn.Module, weight_decay: float, decay: str = "weights") -> list[dict]:
    """Two groups for an optimizer: with weight decay, and without.

    decay: of replib.training.optimisation.DECAY; "weights", RepAn's cycles, decays convolution
    kernels only.
    """
    return parameter_groups(model, weight_decay, decay)


class Cycle:
    """The cycle over every block of a model, for one's own training loop.

        cycle = Cycle(model, warmup=5)
        for _ in range(cycles):
            cycle.start_cycle(images)
            optimizer = torch.optim.SGD(cycle.parameter_groups(2e-4), lr=0.75)
            for epoch in range(epochs):
                cycle.epoch(epoch)
                for x, y in batches:
                    optimizer.zero_grad()
                    loss(model(x), y).backward()
                    cycle.after_backward()
                    optimizer.step()

    warmup: epochs over which lambda ramps and the main branch may be frozen (W).
    fidelity: "official" to the letter of the released code: the merge takes lambda as 1, stale
    statistics stay, the main branch takes the whole kernel although the new side branches come on
    top. "preserving" keeps the function: it merges with the true lambda, measures the statistics
    of the new branches and subtracts them from the main branch.
    rate_schedule, restructure, freeze: keys of `RATE_SCHEDULES`, `RESTRUCTURE`, `FREEZE`.
    norm: what happens to the main norm (`replib.branches.NORM_AT_RESTORE`); by default the
    family's for official, "match" for preserving ("unit" without images).
    rule: how side branches are drawn (`replib.branches.RULES`); reseed: every cycle draws the
    same numbers, as the released code does.
    blocks: only these, by name or by pattern ("stages.1.*"); the others train on as they are.
    calibrate: after the restore, running statistics are measured anew on the images; at rate 1
    the released code leaves those of the branches that were there before.
    Blocks without side branches, or that cannot be inverted, or that were not chosen, are kept
    and listed in `kept` with the reason.
    Raises: ValueError for other values, and for a name or pattern that no block has.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        warmup: int,
        fidelity: str = "official",
        rate_schedule: str | None = None,
        restructure: str = "cycle",
        freeze: str = "none",
        norm: str | None = None,
        rule: str = "repan",
        reseed: bool = False,
        seed: int = 0,
        blocks: Sequence[str] | None = None,
        calibrate: bool = False,
    ):
        for name, value, known in (
            ("fidelity", fidelity, ("official", "preserving")),
            ("rate_schedule", rate_schedule or "official", RATE_SCHEDULES),
            ("restructure", restructure, RESTRUCTURE),
            ("freeze", freeze, FREEZE),
        ):
            if value not in known:
                raise ValueError(f"{name} (={value!r}) must be one of {', '.join(known)}.")
        if warmup < 1:
            raise ValueError(f"warmup (={warmup}) must be at least 1 epoch.")
        default = "official" if fidelity == "official" else "constant"
        self.rate_at = RATE_SCHEDULES[rate_schedule or default]
        self.model, self.warmup, self.fidelity = model, warmup, fidelity
        self.restructure, self.freeze, self.norm, self.rule = restructure, freeze, norm, rule
        self.reseed, self.seed, self.calibrate = reseed, seed, calibrate
        self.cycle, self.current_epoch = -1, 0
        self.blocks: dict[str, RepBlock] = {}
        self.kept: dict[str, str] = {}
        found = outermost_blocks(model)
        for pattern in blocks or ():
            if not any(fnmatchcase(name, pattern) for name in found):
                raise ValueError(
                    f"blocks (={pattern!r}) names no block of this network; its blocks are "
                    f"{', '.join(found) or 'none'}."
                )
        for name, block in found.items():
            if not block.invertible:
                self.kept[name] = "cannot be inverted"
            elif not block.side_branches:
                self.kept[name] = "has no side branches"
            elif blocks and not any(fnmatchcase(name, pattern) for pattern in blocks):
                self.kept[name] = "was not chosen"
            else:
                self.blocks[name] = block

    def start_cycle(self, images: Tensor | None = None) -> None:
        """Merge, redraw, restore. images (N, C, H, W): those that statistics are measured on, by
        "preserving", by norm="match" and by `calibrate`.

        The model's train or eval mode is left as it was. Of several processes all call it, and go
        on with the network of the first one.
        Raises: ValueError where images are needed and not given.
        """
        with in_full_precision(self.model):
            self.cycle += 1
            turn = 0 if self.reseed else self.cycle
            generator = torch.Generator().manual_seed(self.seed + 1_000_003 * turn)
            if self.restructure == "redraw":
                for block in self.blocks.values():
                    block.redraw(self.rule, generator)
            elif self.restructure == "cycle":
                measured = self.fidelity == "preserving" or self.norm == "match"
                if measured and images is not None:
                    self.restore_in_one_pass(images, generator)
                elif self.norm == "match":
                    raise ValueError("norm (='match') needs start_cycle(images).")
                else:
                    for block in self.blocks.values():
                        self.restore(block, generator)
            self.epoch(0)
            if self.calibrate and self.restructure != "none":
                if images is None:
                    raise ValueError("calibrate (=True) needs start_cycle(images).")
                calibrate(self.model, [images])
            parallel.agree(self.model)

    @torch.no_grad()
    def restore(
        self, block: RepBlock, generator: torch.Generator, inputs: Tensor | None = None
    ) -> None:
        """Merge, redraw and restore one block, whose inputs (N, I, H, W) are these."""
        if self.fidelity == "official" and self.norm != "match":
            kernel = block.merged(rate=1.0)
            block.redraw(self.rule, generator)
            block.restore(kernel, "official", self.norm)
            return
        preserving, geometry = self.fidelity == "preserving", block.geometry
        kernel = block.merged(rate=None if preserving else 1.0)
        block.redraw(self.rule, generator)
        if preserving and inputs is not None:
            measure_side_branches(block, inputs)
        elif preserving:
            for branch in block.side_branches.values():
                reset_statistics(branch)
        block.set_rate(self.rate_at(0, self.warmup))

        def statistics(bare: Kernel) -> tuple[Tensor, Tensor]:
            y = convolve(inputs, bare.to(inputs.dtype), geometry.padding, geometry.stride)
            axes = (0, *range(2, y.dim()))
            return y.mean(axes), y.var(axes, correction=0)

        norm = self.norm or ("unit" if inputs is None else "match")
        block.restore(kernel, self.fidelity, norm, statistics)

    @torch.no_grad()
    def restore_in_one_pass(self, images: Tensor, generator: torch.Generator) -> None:
        """One pass over `images`: each block is restored when its own input arrives.

        The blocks before it are restored already; preserving, it sees the input that it had
        before, official, the one that it has when training goes on.
        """
        waiting = set(self.blocks.values())

        def restore(block: RepBlock, inputs: tuple[Tensor, ...]) -> None:
            if block in waiting:  # a block used twice is restored at its first use
                waiting.remove(block)
                self.restore(block, generator, inputs[0])

        # What official adds on top has statistics of its own only in train mode: evaluated, the
        # maps would grow from block to block. Preserving measures them as it goes.
        official = self.fidelity == "official"
        norms = [m for m in self.model.modules() if official and isinstance(m, NORMS)]
        hooks = [block.register_forward_pre_hook(restore) for block in waiting]
        try:
            with normalised_by_batch(self.model, norms, 0.0):
                self.model(images)
        finally:
            for hook in hooks:
                hook.remove()

    def epoch(self, epoch: int) -> None:
        """Say that epoch `epoch` (from 0) of the cycle begins: sets lambda."""
        self.current_epoch = epoch
        for block in self.blocks.values():
            block.set_rate(self.rate_at(epoch, self.warmup))

    @property
    def rate(self) -> float:
        """The lambda of the current epoch."""
        return self.rate_at(self.current_epoch, self.warmup)

    @property
    def holds(self) -> bool:
        """Whether `after_backward` holds the main branch still in this epoch."""
        return self.freeze != "none" and self.current_epoch < self.warmup

    def after_backward(self) -> None:
        """Call after backward (and clipping), before the step: holds the main branch still."""
        if not self.holds:
            return
        for block in self.blocks.values():
            for parameter in block.main_branch.parameters():
                if self.freeze == "skip":
                    parameter.grad = None
                elif parameter.grad is not None:
                    parameter.grad.zero_()

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """Groups for the optimizer: convolution kernels decay, norms and classifier do not."""
        return decay_groups(self.model, weight_decay)

    def state_dict(self) -> dict:
        """What a resumed loop needs: the number of the cycle and of its epoch."""
        return {"cycle": self.cycle, "epoch": self.current_epoch}

    def load_state_dict(self, state: dict) -> None:
        self.cycle = state["cycle"]
        self.epoch(state["epoch"])


def reset_statistics(piece: nn.Module) -> None:
    """Running statistics of all norms back to mean 0, variance 1."""
    for module in piece.modules():
        if isinstance(module, Norm):
            module.norm.reset_running_stats()


@torch.no_grad()
def measure_side_branches(block: RepBlock, x: Tensor) -> None:
    """Set the running statistics of the side branches to those of the batch x.

    The variance is the biased one, which train mode normalises with: on x both modes then agree.
    """

    def measure(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        axes = (0, *range(2, inputs[0].dim()))
        norm.reset_running_stats()
        norm.running_mean.copy_(inputs[0].mean(axes))
        norm.running_var.copy_(inputs[0].var(axes, correction=0))

    hooks = [
        module.norm.register_forward_pre_hook(measure)
        for branch in block.side_branches.values()
        for module in branch.modules()
        if isinstance(module, Norm)
    ]
    try:
        block(x)  # in eval mode: each norm uses what was just measured
    finally:
        for hook in hooks:
            hook.remove()
