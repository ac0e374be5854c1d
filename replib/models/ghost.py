"""RepOpt-GhostNet: RepGhostNet whose cheap depthwise layers are trained by RepOptimizers.

Sources: Chen et al., "RepGhost: A Hardware-Efficient Ghost Module via Re-parameterization", 2022,
table 1; Ding et al., "Re-parameterizing Your Optimizers", ICLR 2023, appendix D.
"""

from __future__ import annotations

import math

from torch import nn

from replib.models.layers import Block, Residual, SqueezeExcite, layer, sequence, supported

GHOST = (  # kernel size, width between, width, squeeze-excite, stride
    (3, 8, 16, False, 1),
    (3, 24, 24, False, 2),
    (3, 36, 24, False, 1),
    (5, 36, 40, True, 2),
    (5, 60, 40, True, 1),
    (3, 120, 80, False, 2),
    (3, 100, 80, False, 1),
    (3, 120, 80, False, 1),
    (3, 120, 80, False, 1),
    (3, 240, 112, True, 1),
    (3, 336, 112, True, 1),
    (5, 336, 160, True, 2),
    (5, 480, 160, False, 1),
    (5, 480, 160, True, 1),
    (5, 480, 160, False, 1),
    (5, 480, 160, True, 1),
)


def multiple_of_4(width: float) -> int:
    """The nearest multiple of 4, never below 4 or below 90 % of the width."""
    near = max(4, int(width + 2) // 4 * 4)
    return near + 4 if near < 0.9 * width else near


def ghost(
    block: Block, channels: int, width: int, index: int, activation: type | None
) -> nn.Module:
    """1x1 layer, then a depthwise block with an identity beside it; (N, C, H, W) -> (N, O, H, W).

    index: its place in the stage, from 1; scales of the search start at sqrt(2 / (index + 1)).
    """
    scales = supported(block, pointwise=False, initial=math.sqrt(2 / (index + 1)))
    return sequence(
        primary=layer("convbn", channels, width, 1, activation=activation),
        cheap=layer(block, width, width, 3, groups=width, activation=activation, **scales),
    )


def repopt_ghostnet(
    width: float, *, classes: int, block: Block = "convbn", in_channels: int = 3
) -> nn.Module:
    """RepOpt-GhostNet, `width` 0.5 in the paper: (N, in_channels, H, W) -> (N, classes).

    block "convbn" is the network that is trained with RepOptimizers, "csla" that of the search.
    """
    channels, blocks, index = multiple_of_4(16 * width), nn.Sequential(), 0
    stem = layer("convbn", in_channels, channels, 3, 2)
    for size, between, out, excited, stride in GHOST:
        inner, out = multiple_of_4(between * width), multiple_of_4(out * width)
        same = stride == 1 and channels == out
        index = index + 1 if same else 1
        parts = {"ghost1": ghost(block, channels, inner, 2 * index - 1, nn.ReLU)}
        if stride > 1:
            shape = (inner, inner, size, stride)
            parts["depthwise"] = layer("convbn", *shape, groups=inner, activation=None)
        if excited:
            parts["se"] = SqueezeExcite(inner, multiple_of_4(inner / 4), nn.Hardsigmoid)
        parts["ghost2"] = ghost(block, inner, out, 2 * index, None)
        shortcut = sequence(
            depthwise=layer(
                "convbn", channels, channels, size, stride, groups=channels, activation=None
            ),
            pointwise=layer("convbn", channels, out, 1, activation=None),
        )
        blocks.append(Residual(sequence(**parts), None if same else shortcut))
        channels = out
    last = multiple_of_4(2 * GHOST[-1][1] * width)
    return sequence(
        stem=stem,
        blocks=blocks,
        last=layer("convbn", channels, last, 1),
        pool=nn.AdaptiveAvgPool2d(1),
        head=nn.Conv2d(last, 1280, 1),
        act=nn.ReLU(),
        flatten=nn.Flatten(),
        dropout=nn.Dropout(0.2),
        classifier=nn.Linear(1280, classes),
    )
