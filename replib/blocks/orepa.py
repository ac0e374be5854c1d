"""OREPA: Hu et al., "Online Convolutional Re-parameterization", CVPR 2022, section 3.

All branches are linear, without norms: a trainable scale per channel stands in for each, the
branches are squeezed into one kernel in every step, and one norm follows.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

import torch

from replib.blocks.block import OFF_CENTRE, Geometry, RepBlock
from replib.branches import Chain, Filter, Piece, Sum

EXPANSION = 8  # depthwise filters per input channel in the separable branch
KAIMING, LECUN = math.sqrt(6), math.sqrt(3)  # uniform bounds of variance 2 and 1 over the fan-in


def frequency_prior(g: Geometry) -> Filter:
    """Fixed cosines: output channels are shared out over the axes, a frequency for each.

    Channel o varies as cos(pi (h + 1/2) (o + 1) / k) along the first axis for o < O / dims, with
    o counted from the start of its share. The period is the kernel size (official: always 3).
    """
    share, waves = g.out_channels / g.dims, [[] for _ in range(g.dims)]
    for o in range(g.out_channels):
        axis = int(o / share)
        k, frequency = g.kernel_size[axis], o + 1 - axis * share
        waves[axis].append([math.cos(math.pi * (h + 0.5) * frequency / k) for h in range(k)])
    shares = [
        torch.tensor(wave).view(-1, *(k if a == axis else 1 for a in range(g.dims)))
        for axis, (wave, k) in enumerate(zip(waves, g.kernel_size, strict=True))
    ]
    return Filter(torch.cat([wave.expand(-1, *g.kernel_size) for wave in shares]), g.dilation)


def linear_branches(g: Geometry, gain: float = KAIMING, pointwise: bool = True) -> dict[str, Piece]:
    """OREPA's branches, each with its scale; pointwise=False leaves the 1x1 out (OREPA-VGG)."""
    inner = g.in_channels * (1 if g.groups <= 4 else 2)
    wide = g.in_channels * EXPANSION
    separable = (
        g.conv(out_channels=wide, groups=g.in_channels, gain=gain),
        g.conv(1, in_channels=wide, gain=gain),
    )
    branches = {
        "origin": Chain(g.conv(gain=gain), g.scale(0.25)),
        "avg": Chain(g.conv(1, gain=gain), g.average_pool(), g.scale(0.25)),
        "prior": Chain(g.conv(1, gain=gain), frequency_prior(g), g.scale(0.0)),
        "1x1_kxk": Chain(
            g.conv(1, out_channels=inner, offset=True),
            g.conv(in_channels=inner, gain=gain),
            g.scale(0.5),
        ),
        "1x1": Chain(g.conv(1, gain=gain), g.scale(1.0)),
        "separable": Chain(*separable, g.scale(0.5)),
    }
    return branches if pointwise else {k: v for k, v in branches.items() if k != "1x1"}


class OREPA(RepBlock):
    """k x k, average, frequency prior, 1x1 then k x k, 1x1, depthwise-separable."""

    main_name = "origin"
    post_normed = squeezable = True
    cannot = OFF_CENTRE

    def declare(self, g: Geometry) -> dict[str, Piece]:
        return linear_branches(g)


class OREPA1x1(RepBlock):
    """A 1x1 convolution and a product of two, one of which starts as the identity."""

    main_name = "origin"
    post_normed = squeezable = True
    default_kernel_size = 1
    cannot: ClassVar = dict.fromkeys(
        ("larger kernel", "dilation", "even kernel", "rectangular kernel"),
        "it is OREPA's 1x1 convolution; use orepa",
    )

    def declare(self, g: Geometry) -> dict[str, Piece]:
        widens = g.out_channels > g.in_channels
        inner = min(g.in_channels, g.out_channels)
        first = g.conv(out_channels=inner, gain=LECUN, identity=widens)
        second = g.conv(in_channels=inner, gain=LECUN, identity=not widens)
        origin = Chain(g.conv(gain=LECUN), g.scale(1.0))
        return {"origin": origin, "product": Chain(first, second, g.scale(0.5))}


class OREPAStem(RepBlock):
    """A large kernel as a chain of 3x3 OREPA layers; a factorised kernel cannot be inverted."""

    main_name = "layers"
    post_normed = squeezable = True
    default_kernel_size = 7
    cannot: ClassVar = {"even kernel": "layers of 3 pixels make odd sizes only"}

    def layer(self, g: Geometry) -> Piece:
        return Sum(linear_branches(g), "origin", squeezed=True)

    def declare(self, g: Geometry) -> dict[str, Piece]:
        depth = max(1, max(k // 2 for k in g.kernel_size))
        layers = []
        for i in range(depth):
            size = tuple(3 if i < k // 2 else 1 for k in g.kernel_size)
            channels = g.out_channels if i else g.in_channels
            layers.append(self.layer(replace(g, in_channels=channels, kernel_size=size)))
        return {"layers": Chain(*layers)}


class OREPAStemBase(OREPAStem):
    """The same chain of plain 3x3 convolutions."""

    def layer(self, g: Geometry) -> Piece:
        return g.conv()


class OREPARepVGG(RepBlock):
    """RepVGG whose k x k branch is made online, by OREPA's branches without the 1x1."""

    main_name = "dense"
    cannot = OFF_CENTRE

    def declare(self, g: Geometry) -> dict[str, Piece]:
        dense = Sum(linear_branches(g, LECUN, pointwise=False), "origin", squeezed=True)
        branches = {"dense": Chain(dense, g.norm()), "1x1": Chain(g.conv(1), g.norm())}
        return branches | ({"identity": g.norm()} if g.keeps_shape else {})
