"""Gradient multipliers: one kernel trained as if it were a block with constant scales.

W = s_conv conv + s_1x1 pointwise + the identity's own scale. A step of SGD moves a leaf by s times
the gradient of W, which W feels s times: in all, the gradient times the sum of s^2. A step of Adam
has only the sign of s left: the sum of |s|. The scale of the identity is a leaf itself: 1.

Source: Ding et al., "Re-parameterizing Your Optimizers", ICLR 2023, section 3.2. Their released
AdamW multiplies by s, which is right for positive scales only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import sympy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from replib.analysis.derivations import Derivation
from replib.analysis.symbolic import Symbolic, with_symbols
from replib.blocks import BLOCKS, RepBlock
from replib.branches import Convolution, Scale
from replib.methods.repoptimizers import OPTIMIZERS, multiplier, scales_of
from replib.networks import outermost_blocks


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
    factor = multiplier(block, power).weight
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
    factor, single = (
        multiplier(block, power).weight.detach(),
        block.branches_kernel().weight.detach(),
    )
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


class Two(nn.Module):
    """Two layers made by `layer`, each with a norm and a ReLU, and a classifier: (N, 3, H, W) ->
    (N, 5)."""

    def __init__(self, layer: Callable[..., nn.Module], channels: int = 6):
        super().__init__()
        self.first, self.second = layer(3, channels, stride=2), layer(channels, channels)
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(2))
        self.head = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms[0](self.first(x)).relu()
        x = self.norms[1](self.second(x)).relu()
        return self.head(x.mean((2, 3)))


@torch.no_grad()
def of_blocks(family: str, options: Mapping[str, object], seed: int) -> Two:
    """Of blocks of a family, in float64; their scales are between 0.3 and 1.3, half negative."""
    generator = torch.Generator().manual_seed(seed)

    def layer(*shape: int, stride: int = 1) -> RepBlock:
        block = BLOCKS[family](*shape, stride=stride, **options)
        block.post_norm = None  # the network's own follows
        return block

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Two(layer).double()
    for scale in scales_of(network).values():
        size, sign = torch.rand(2, *scale.shape, generator=generator, dtype=torch.float64)
        scale.copy_((size + 0.3) * (2 * sign.round() - 1))
    return network


@torch.no_grad()
def of_single_kernels(blocks: Two) -> Two:
    """The network of plain convolutions that computes what one of blocks does."""
    network = Two(lambda i, o, stride=1: nn.Conv2d(i, o, 3, stride, padding=1, bias=False)).double()
    for name in ("norms", "head"):
        getattr(network, name).load_state_dict(getattr(blocks, name).state_dict())
    for path, block in outermost_blocks(blocks).items():
        kernel = block.in_own_form(block.branches_kernel())
        network.get_submodule(path).weight.copy_(kernel.weight)
    return network


@torch.no_grad()
def kernels_apart(blocks: Two, single: Two) -> float:
    """The largest difference of their kernels, relative to the largest number of the kernel."""
    pairs = [
        (block.in_own_form(block.branches_kernel()).weight, single.get_submodule(path).weight)
        for path, block in outermost_blocks(blocks).items()
    ]
    return max(((a - b).abs().max() / a.abs().max()).item() for a, b in pairs)


def side_by_side(
    optimizer: str = "sgd",
    family: str = "csla",
    options: Mapping[str, object] | None = None,
    *,
    steps: int = 50,
    seed: int = 0,
    signed: bool = False,
    **settings,
) -> list[float]:
    """How far a network of blocks and one of single kernels are apart, step by step.

    The blocks are trained by torch's optimizer, their scales standing still but for those of
    identities; the kernels by the RepOptimizer of the same settings. All parameters are decayed
    alike; every step sees 16 images of fresh noise, whose loss is summed, so that no gradient
    vanishes; float64. signed: of `RepAdamW`.
    """
    blocks = of_blocks(family, options or {}, seed)
    single, constants = of_single_kernels(blocks), set()
    for block in outermost_blocks(blocks).values():
        for branch in block.branches.values():
            parts = [*branch.modules()]
            if any(isinstance(part, Convolution) for part in parts):
                constants |= {part.parameter for part in parts if isinstance(part, Scale)}
    free = [parameter for parameter in blocks.parameters() if parameter not in constants]
    plain = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[optimizer](free, **settings)
    own = {"signed": True} if signed else {}
    multiplied = OPTIMIZERS[optimizer](single, blocks, **settings, **own)
    generator, apart = torch.Generator().manual_seed(seed), []
    labels = torch.arange(16) % 5
    for _ in range(steps):
        images = torch.randn(16, 3, 9, 9, generator=generator, dtype=torch.float64)
        for network, moving in ((blocks, plain), (single, multiplied)):
            moving.zero_grad()
            F.cross_entropy(network(images), labels, reduction="sum").backward()
            moving.step()
        apart.append(kernels_apart(blocks, single))
    return apart
