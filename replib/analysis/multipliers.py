"""Gradient multipliers: one kernel trained as if it were a block with constant scales.

W = s_conv conv + s_1x1 pointwise + the identity's own scale. A step of SGD moves a leaf by s times
the gradient of W, which W feels s times: in all, the gradient times the sum of s^2. A step of Adam
has only the sign of s left: the sum of |s|. The scale of the identity is a leaf itself: 1.

Source: Ding et al., "Re-parameterizing Your Optimizers", ICLR 2023, section 3.2. Their released
AdamW multiplies by s, which is right for positive scales only.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
import torch.nn.functional as F
from torch import nn

from replib import kernels
from replib.analysis.derivations import Derivation
from replib.analysis.symbolic import Symbolic, with_symbols
from replib.blocks import BLOCKS, RepBlock
from replib.kernels import Kernel

POWERS = {  # what a multiplier makes of a scale
    "square": lambda s: s * s,
    "absolute": lambda s: s.abs(),
    "signed": lambda s: s,
}


def multiplier(block: RepBlock, power: str) -> Any:
    """What the gradient of the block's kernel is multiplied by, (O, I, *k).

    block: a `CSLA` with constant scales; of numbers or of symbols. power: a key of `POWERS`, or
    "none" for 1 everywhere.
    """
    if power == "none":
        return torch.full_like(block.branches_kernel().weight, 1.0)
    total = kernels.identity(block.in_channels, block.dims)
    for name in ("conv", "1x1"):
        conv, scale = block.branches[name]
        ones = Kernel(torch.full_like(conv.weight, 1.0), torch.zeros_like(scale.weight))
        total = total + kernels.scaled(ones, POWERS[power](scale.weight))
    return total.weight


def trained_leaves(block: RepBlock) -> dict[str, nn.Parameter]:
    """The parameters of the branches that an optimizer moves."""
    named = block.branches.named_parameters()
    return {name: parameter for name, parameter in named if parameter.requires_grad}


def one_step(optimizer: str = "sgd", power: str = "square") -> Derivation:
    """One step of the branches, each leaf on its own, against one step of the single kernel.

    optimizer: "sgd" moves along the gradient g; "adamw" along the sign of it, as the first step of
    Adam does. Both decay all leaves by delta; eta is the learning rate.
    """
    plain = BLOCKS["csla"](2, 2, 3, dims=1, trainable_scales=False)
    block, _ = with_symbols(plain)
    block.set_rate(1)
    leaves = dict(block.branches.named_parameters())
    weight = block.branches_kernel().weight
    gradient = Symbolic.named("g", *weight.shape)
    rate, decay = sympy.symbols("eta delta", positive=True)

    def direction(slope):
        return slope if optimizer == "sgd" else slope.each(sympy.sign)

    after = {}
    for name in trained_leaves(plain):
        leaf = leaves[name]
        slope = leaf.each(lambda e: sum((gradient * weight.each(lambda w: w.diff(e))).values.flat))
        moved = leaf - (direction(slope) + leaf * decay) * rate
        after |= zip(leaf.values.flat, moved.values.flat, strict=True)
    branches = weight.each(lambda w: w.subs(after, simultaneous=True))
    factor = multiplier(block, power)
    single = weight - (factor * direction(gradient) + weight * decay) * rate
    read_off = (weight - branches - weight * decay * rate) / (direction(gradient) * rate)
    return Derivation(
        f"{optimizer}, {power} multiplier",
        {"multiplier": (read_off.simplified(), factor), "W after the step": (branches, single)},
        ("the branches, each leaf by itself", "one kernel, gradient times multiplier"),
    )


@torch.enable_grad()
def distances(optimizer: str, power: str, steps: int, seed: int, channels: int = 4) -> list[float]:
    """How far a block and its single kernel drift apart, as a part of the kernel's size, per step.

    Both imitate a random 3x3 convolution of noise, with weight decay, in float64; some scales
    are negative.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    block = BLOCKS["csla"](channels, channels, trainable_scales=False).double()
    with torch.no_grad():
        for parameter in block.branches.parameters():
            parameter.copy_(random(*parameter.shape) / 3 + 0.2)
    image, goal = random(4, channels, 8, 8), random(channels, channels, 3, 3)
    factor, single = multiplier(block, power).detach(), block.branches_kernel().weight.detach()
    leaves, rate, decay = [*trained_leaves(block).values()], 2e-2, 1e-2
    kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[optimizer]
    options = {"momentum": 0.9, "nesterov": True} if optimizer == "sgd" else {}
    single.requires_grad_()
    both = [kind(p, lr=rate, weight_decay=decay, **options) for p in (leaves, [single])]
    apart = []
    for _ in range(steps):
        for weight, moving in zip((block.branches_kernel().weight, single), both, strict=True):
            moving.zero_grad()
            F.conv2d(image, weight - goal, padding=1).square().mean().backward()
        with torch.no_grad():
            single.grad *= factor
            before = single * (1 - rate * decay)
            for moving in both:
                moving.step()
            if optimizer == "adamw":  # what it divides by has taken the factor out again
                single.copy_(before + factor * (single - before))
            whole = block.branches_kernel().weight
            apart.append(((whole - single).norm() / whole.norm()).item())
    return apart
