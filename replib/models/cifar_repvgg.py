"""Stage-wise plain bodies for small images, as in RepAn's CIFAR networks.

The layout (depths, base widths 16, 16, 32, 64, 64, strides 1, 1, 2, 2, 1) is that of RepAn's
released code; it is a narrow relative of RepVGG (Ding et al., CVPR 2021, section 3.4).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from replib.models.layers import Block, family, supported

DEPTHS = {"a": (1, 2, 4, 14, 1), "b": (1, 4, 6, 16, 1)}
WIDTH_FACTORS = {  # the first four stages, the last stage
    "a0": (0.75, 2.5),
    "a1": (1, 2.5),
    "a2": (1.5, 2.75),
    "b0": (1, 2.5),
    "b1": (2, 4),
    "b2": (2.5, 5),
    "b3": (3, 5),
}


class ReLUBlock(nn.Module):
    """A block followed by its activation: (N, I, H, W) -> (N, O, H / stride, W / stride)."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.block(x))


class StageNet(nn.Module):
    """Stages of one kind of block, global average pooling, one linear classifier.

    Shapes: (N, in_channels, H, W) -> (N, classes). The first block of a stage has the stage's
    stride and, where its family has that option, no identity branch (RepAn's rule).
    """

    def __init__(
        self,
        depths: Sequence[int],
        widths: Sequence[int],
        strides: Sequence[int],
        *,
        classes: int,
        block: Block = "repvgg",
        in_channels: int = 3,
    ):
        super().__init__()
        make = family(block)
        self.stages = nn.ModuleList()
        channels = in_channels
        for depth, width, stride in zip(depths, widths, strides, strict=True):
            stage = nn.Sequential()
            for i in range(depth):
                first = i == 0
                options = supported(block, identity=False) if first else {}
                made = make(channels, width, 3, stride=stride if first else 1, **options)
                stage.append(ReLUBlock(made))
                channels = width
            self.stages.append(stage)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return self.fc(x.mean((2, 3)))


def cifar_repvgg(
    name: str, width: float = 1.0, *, classes: int, block: Block = "repvgg", in_channels: int = 3
) -> StageNet:
    """RepAn's CIFAR body: name a0 to b3, for 32x32 images; `width` scales every stage (ours)."""
    first, last = WIDTH_FACTORS[name]
    factors = (first,) * 4 + (last,)
    widths = [int(base * f) for base, f in zip((16, 16, 32, 64, 64), factors, strict=True)]
    widths[0] = int(min(16, 16 * first))
    widths = [int(width * channels) for channels in widths]
    return StageNet(
        DEPTHS[name[0]],
        widths,
        (1, 1, 2, 2, 1),
        classes=classes,
        block=block,
        in_channels=in_channels,
    )


def digits_net(
    width: int, *, classes: int, block: Block = "repvgg", in_channels: int = 1
) -> StageNet:
    """The same layout shrunk to 8x8 images: three stages of one, two and one blocks."""
    return StageNet(
        (1, 2, 1),
        (width, 2 * width, 4 * width),
        (1, 2, 2),
        classes=classes,
        block=block,
        in_channels=in_channels,
    )
