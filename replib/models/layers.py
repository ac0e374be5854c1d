"""The few pieces that bodies are declared from: a layer, a residual, squeeze-excite, a head."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from replib.blocks import BLOCKS, RepBlock


@dataclass(frozen=True)
class Family:
    """A family of blocks by its name, and options of its own for every block of a network.

    A family that stands in for it at other kernel sizes takes those of them that it has.
    plain_sizes: kernel sizes at which a plain convolution stands in for it.
    """

    name: str
    options: Mapping[str, object] = field(default_factory=dict)
    plain_sizes: Collection[int] = ()

    def __call__(self, *shape: int, **options) -> RepBlock:
        """One block; the options here are stronger than those that the body gives."""
        if shape[2] in self.plain_sizes:
            own = BLOCKS[self.name].options()
            geometry = {name: value for name, value in options.items() if name not in own}
            return BLOCKS["convbn"](*shape, **geometry)
        return BLOCKS[self.name](*shape, **options | supported(self, **self.options))


Block = str | Family  # what a body's argument `block` may be


def family(block: Block) -> Family:
    """The family that a body's `block` names."""
    return block if isinstance(block, Family) else Family(block)


class SqueezeExcite(nn.Module):
    """Channels weighted by a small network of their means: (N, C, H, W) -> (N, C, H, W).

    Source: Hu et al., "Squeeze-and-Excitation Networks", CVPR 2018, section 3.
    """

    def __init__(self, channels: int, hidden: int, gate: type[nn.Module] = nn.Sigmoid):
        super().__init__()
        self.reduce = nn.Conv2d(channels, hidden, 1)
        self.expand = nn.Conv2d(hidden, channels, 1)
        self.gate = gate()

    def forward(self, x: Tensor) -> Tensor:
        means = x.mean((2, 3), keepdim=True)
        return x * self.gate(self.expand(F.relu(self.reduce(means))))


class Residual(nn.Module):
    """activation(residual(x) + shortcut(x)): (N, I, H, W) -> (N, O, H', W').

    Without a shortcut the input itself is added. drop: the share of images whose residual is
    left out in training, the others' being scaled up (Huang et al., "Deep Networks with
    Stochastic Depth", ECCV 2016, section 3).
    """

    def __init__(
        self,
        residual: nn.Module,
        shortcut: nn.Module | None = None,
        activation: type[nn.Module] = nn.Identity,
        drop: float = 0.0,
    ):
        super().__init__()
        self.residual, self.shortcut, self.drop = residual, shortcut, drop
        self.activation = activation()

    def forward(self, x: Tensor) -> Tensor:
        out = self.residual(x)
        if self.training and self.drop:
            kept = torch.rand(len(x), 1, 1, 1, device=x.device) >= self.drop
            out = out * (kept / (1 - self.drop)).to(out.dtype)
        return self.activation(out + (x if self.shortcut is None else self.shortcut(x)))


def sequence(**layers: nn.Module) -> nn.Sequential:
    """Named layers one after the other."""
    return nn.Sequential(OrderedDict(layers))


def supported(block: Block, **options) -> dict:
    """Those of the options that the family has."""
    known = BLOCKS[family(block).name].options()
    return {name: value for name, value in options.items() if name in known}


def layer(
    block: Block | None,
    in_channels: int,
    out_channels: int,
    kernel_size: int = 3,
    stride: int = 1,
    *,
    activation: type[nn.Module] | None = nn.ReLU,
    se: int | None = None,
    post_se: int | None = None,
    groups: int = 1,
    padding: int | None = None,
    **options,
) -> nn.Sequential:
    """A block of a family and its activation: (N, I, H, W) -> (N, O, H / stride, ...).

    block None: a plain convolution and its norm instead, as two layers `conv` and `norm`.
    se, post_se: squeeze-excite by that factor before or after the activation.
    options: those of the family, and the arguments of every block.
    """
    padding = kernel_size // 2 if padding is None else padding
    parts: dict[str, nn.Module] = {}
    if block is None:
        shape = (in_channels, out_channels, kernel_size, stride, padding)
        parts["conv"] = nn.Conv2d(*shape, groups=groups, bias=False)
        parts["norm"] = nn.BatchNorm2d(out_channels)
    else:
        shape = (in_channels, out_channels, kernel_size, stride, padding)
        parts["block"] = family(block)(*shape, groups=groups, **options)
    if se is not None:
        parts["se"] = SqueezeExcite(out_channels, out_channels // se)
    if activation is not None:
        parts["act"] = activation()
    if post_se is not None:
        parts["post_se"] = SqueezeExcite(out_channels, out_channels // post_se)
    return sequence(**parts)


def pooled(channels: int, classes: int, name: str = "linear") -> Mapping[str, nn.Module]:
    """Global average pooling and a linear classifier, by name: (N, C, H, W) -> (N, classes)."""
    return {
        "pool": nn.AdaptiveAvgPool2d(1),
        "flatten": nn.Flatten(),
        name: nn.Linear(channels, classes),
    }


@torch.no_grad()
def drawn_by_fan_out(model: nn.Module) -> nn.Module:
    """The model, its plain convolutions and linear layers drawn anew (DyRep's CIFAR networks).

    Convolutions are normal with variance 2 / (kernel size O), linear weights uniform in
    +-1 / sqrt(O), biases 0.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
        elif isinstance(module, nn.Linear):
            nn.init.uniform_(module.weight, -1, 1).mul_(1 / math.sqrt(module.out_features))
            nn.init.zeros_(module.bias)
    return model
