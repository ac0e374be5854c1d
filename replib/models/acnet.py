"""The networks for CIFAR that ACNet is shown on, of 32x32 images.

Cifar-quick (Snoek et al., "Practical Bayesian Optimization", 2012, as in Caffe, with norms), a
ResNet-56 with convolutional shortcuts, WideResNet-16-8 (Zagoruyko and Komodakis, BMVC 2016, table
1) and DenseNet-40 with growth 12 (Huang et al., CVPR 2017, section 4.2). The first three as Ding et
al. train them (ACNet, ICCV 2019, table 1, released code), where only DenseNet-40 is missing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from replib.models.layers import Block, Residual, family, layer, pooled, sequence


def cifar_quick(
    *, classes: int, block: Block = "convbn", in_channels: int = 3, width: float = 1.0
) -> nn.Module:
    """Three 5x5 layers and two linear ones: (N, in_channels, 32, 32) -> (N, classes).

    Other sides from 15 pixels on work too: the last map is stretched to its 3x3.
    """
    one, two, hidden = (int(channels * width) for channels in (32, 64, 64))
    return sequence(
        conv1=layer(block, in_channels, one, 5),
        pool1=nn.MaxPool2d(3, 2),
        conv2=layer(block, one, one, 5),
        pool2=nn.AvgPool2d(3, 2),
        conv3=layer(block, one, two, 5),
        pool3=nn.AvgPool2d(3, 2),
        fit=nn.Upsample(3),
        flatten=nn.Flatten(),
        fc1=nn.Linear(9 * two, hidden),
        act=nn.ReLU(),
        fc2=nn.Linear(hidden, classes),
    )


def projected_resnet(
    n: int, *, classes: int, block: Block = "convbn", in_channels: int = 3, width: float = 1.0
) -> nn.Module:
    """The CIFAR ResNet of 6 n + 2 layers whose shortcuts are 1x1 convolutions where shapes change:
    (N, in_channels, H, W) -> (N, classes). ResRep prunes those of 56 and 110 layers."""
    channels = int(16 * width)
    stages: dict[str, nn.Module] = {"conv1": layer(block, in_channels, channels, 3)}
    for s, base in enumerate((16, 32, 64)):
        wide, stage = int(base * width), nn.Sequential()
        for i in range(n):
            stride = 2 if s and not i else 1
            convs = sequence(
                conv1=layer(block, channels, wide, 3, stride),
                conv2=layer(block, wide, wide, 3, activation=None),
            )
            changes = stride > 1 or channels != wide
            shortcut = layer("convbn", channels, wide, 1, stride, activation=None)
            stage.append(Residual(convs, shortcut if changes else None, nn.ReLU))
            channels = wide
        stages[f"stage{s + 1}"] = stage
    return sequence(**stages, **pooled(channels, classes))


def before(block: Block, channels: int, out_channels: int, size: int, stride: int = 1) -> nn.Module:
    """Norm, ReLU, then the block: (N, I, H, W) -> (N, O, H / stride, W / stride).

    A plain convolution has no norm of its own behind it, the blocks have theirs.
    """
    bare = {"norms": "none"} if family(block).name == "convbn" else {}
    conv = layer(block, channels, out_channels, size, stride, activation=None, **bare)
    return sequence(norm=nn.BatchNorm2d(channels), act=nn.ReLU(), conv=conv)


def wide_resnet16(
    factor: int, *, classes: int, block: Block = "convbn", in_channels: int = 3, width: float = 1.0
) -> nn.Module:
    """WideResNet of 16 layers, `factor` times as wide: (N, in_channels, H, W) -> (N, classes).

    As in ACNet's code no activation follows the last norm.
    """
    channels = int(16 * width)
    parts: dict[str, nn.Module] = {
        "conv1": nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
    }
    for s, base in enumerate((16, 32, 64)):
        wide, stage = int(base * factor * width), nn.Sequential()
        for i in range(2):
            stride = 2 if s and not i else 1
            convs = sequence(
                conv1=before(block, channels, wide, 3, stride), conv2=before(block, wide, wide, 3)
            )
            shortcut = None if i else before("convbn", channels, wide, 1, stride)
            stage.append(Residual(convs, shortcut))
            channels = wide
        parts[f"stage{s + 1}"] = stage
    return sequence(**parts, norm=nn.BatchNorm2d(channels), **pooled(channels, classes))


class Appended(nn.Module):
    """The input, and behind it the channels that a layer makes of it: (N, C, H, W) -> (N, C + K,
    H, W)."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.layer(x)], 1)


def densenet40(
    *, classes: int, block: Block = "convbn", in_channels: int = 3, width: float = 1.0
) -> nn.Module:
    """Three stages of 12 layers, each of which adds 12 channels: (N, in_channels, H, W) -> (N,
    classes)."""
    channels, growth = int(16 * width), max(1, int(12 * width))
    parts: dict[str, nn.Module] = {
        "conv1": nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
    }
    for s in range(3):
        if s:
            shrink = before("convbn", channels, channels, 1)
            parts[f"transition{s}"] = sequence(layer=shrink, pool=nn.AvgPool2d(2))
        stage = parts[f"stage{s + 1}"] = nn.Sequential()
        for _ in range(12):
            stage.append(Appended(before(block, channels, growth, 3)))
            channels += growth
    return sequence(
        **parts, norm=nn.BatchNorm2d(channels), act=nn.ReLU(), **pooled(channels, classes)
    )
