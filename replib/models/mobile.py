"""Stacks of depthwise and pointwise layers: MobileNetV1 and MobileOne.

Sources: Howard et al., "MobileNets", 2017, table 1; Vasu et al., "MobileOne: An Improved One
Millisecond Mobile Backbone", CVPR 2023, tables 2 and 3.
"""

from __future__ import annotations

from torch import nn

from replib.models.layers import Block, layer, pooled, sequence, supported

MOBILENET_V1 = (  # width, stride of the 13 pairs
    (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2),
    *[(512, 1)] * 5,
    (1024, 2), (1024, 1),
)  # fmt: skip
MOBILEONE = {  # factors on the widths 64, 128, 256, 512; branches; pairs with squeeze-excite
    "s0": ((0.75, 1, 1, 2), 4, (0, 0, 0, 0)),
    "s1": ((1.5, 1.5, 2, 2.5), 1, (0, 0, 0, 0)),
    "s2": ((1.5, 2, 2.5, 4), 1, (0, 0, 0, 0)),
    "s3": ((2, 2.5, 3, 4), 1, (0, 0, 0, 0)),
    "s4": ((3, 3.5, 3.5, 4), 1, (0, 0, 5, 1)),  # the last ones of a stage
}
MOBILEONE_DEPTHS = (2, 8, 10, 1)


def mobilenet_v1(
    *, classes: int, block: Block | None = "convbn", in_channels: int = 3, width: float = 1.0
) -> nn.Module:
    """MobileNetV1: (N, in_channels, H, W) -> (N, classes); width is its paper's multiplier.

    Its pointwise layers are never re-parameterized (DBB's rule). block None: plain layers.
    """
    pointwise = None if block is None else "convbn"
    first = channels = int(32 * width)
    pairs = nn.Sequential()
    for base, stride in MOBILENET_V1:
        wide = int(base * width)
        depthwise = layer(block, channels, channels, 3, stride, groups=channels)
        pairs.append(sequence(depthwise=depthwise, pointwise=layer(pointwise, channels, wide, 1)))
        channels = wide
    stem = layer(block, in_channels, first, 3, 2)
    return sequence(conv1=stem, stem=pairs, **pooled(channels, classes))


def mobileone(
    name: str, *, classes: int, block: Block = "mobileone", in_channels: int = 3
) -> nn.Module:
    """MobileOne s0 to s4: (N, in_channels, H, W) -> (N, classes)."""
    factors, branches, excited = MOBILEONE[name]
    channels = min(64, int(64 * factors[0]))
    first, options = supported(block, n=1), supported(block, n=branches)
    stages: dict[str, nn.Module] = {"stage0": layer(block, in_channels, channels, 3, 2, **first)}
    for i, depth in enumerate(MOBILEONE_DEPTHS):
        stage = stages[f"stage{i + 1}"] = nn.Sequential()
        width = int(64 * 2**i * factors[i])
        for j in range(depth):
            own = options | ({"se": 16} if j >= depth - excited[i] else {})
            stride = 1 if j else 2
            stage.append(layer(block, channels, channels, 3, stride, groups=channels, **own))
            stage.append(layer(block, channels, width, 1, **own))
            channels = width
    return sequence(**stages, **pooled(channels, classes))
