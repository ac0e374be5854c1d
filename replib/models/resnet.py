"""ResNets whose every convolution is a block of a named family.

Topology of He et al., CVPR 2016, table 1, with the stride on the 3x3 convolution; ResNeXt of Xie
et al., CVPR 2017, table 1. Which convolutions are re-parameterized is the rule of the DBB, OREPA
and RepAn codes: with OREPA all, otherwise those larger than 1x1 and smaller than 7x7.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from replib.models.layers import Block, Residual, family, layer, pooled, sequence

RESNETS = {  # bottleneck, layers per stage, groups of the 3x3 convolutions
    "resnet18": (False, (2, 2, 2, 2), 1),
    "resnet34": (False, (3, 4, 6, 3), 1),
    "resnet50": (True, (3, 4, 6, 3), 1),
    "resnet101": (True, (3, 4, 23, 3), 1),
    "resnet152": (True, (3, 8, 36, 3), 1),
    "resnext50_32x4d": (True, (3, 4, 6, 3), 32),
    "resnext101_32x4d": (True, (3, 4, 23, 3), 32),
}
OREPA = {1: "orepa_1x1", 7: "orepa_stem"}  # the rest of the family


def of_size(block: Block, kernel_size: int) -> Block:
    """The family that stands for `block` at this kernel size."""
    made = family(block)
    if made.name == "orepa" and kernel_size in OREPA:
        # What is left out are branches of the 3x3 block.
        options = {key: value for key, value in made.options.items() if key != "without"}
        return replace(made, name=OREPA[kernel_size], options=options)
    if made.name == "orepa":
        return made
    return made if 1 < kernel_size < 7 else "convbn"


def residual(
    block: Block, channels: int, planes: int, stride: int, bottleneck: bool, groups: int
) -> tuple[nn.Module, int]:
    """One residual of the network, and how many channels it gives."""
    one, three, plain = of_size(block, 1), of_size(block, 3), {"activation": None}
    if bottleneck:
        out = 4 * planes
        inner = planes if groups == 1 else groups * (planes * 4 // 64)
        convs = sequence(
            conv1=layer(one, channels, inner, 1),
            conv2=layer(three, inner, inner, 3, stride, groups=groups),
            conv3=layer(one, inner, out, 1, **plain),
        )
    else:
        out = planes
        convs = sequence(
            conv1=layer(three, channels, planes, 3, stride),
            conv2=layer(three, planes, planes, 3, **plain),
        )
    shortcut = None
    if stride > 1 or channels != out:
        # OREPA's basic blocks have plain shortcuts.
        shortcut = layer(one if bottleneck else "convbn", channels, out, 1, stride, **plain)
    return Residual(convs, shortcut, nn.ReLU), out


def resnet(
    name: str,
    *,
    classes: int,
    block: Block = "convbn",
    in_channels: int = 3,
    width: float = 1,
    small_images: bool = False,
) -> nn.Module:
    """A key of `RESNETS`: (N, in_channels, H, W) -> (N, classes).

    width multiplies all widths (2 with resnet18 is WideResNet-18x2). small_images: RepAn's stem
    for 32x32, a plain 3x3 convolution that is never re-parameterized, in place of the strided
    7x7 and the max-pooling.
    """
    bottleneck, depths, groups = RESNETS[name]
    channels = int(64 * width)
    if small_images:
        stem = layer(None, in_channels, channels, 3)
    else:
        conv = layer(of_size(block, 7), in_channels, channels, 7, 2)
        stem = sequence(conv1=conv, maxpool=nn.MaxPool2d(3, 2, 1))
    stages: dict[str, nn.Module] = {"stage0": stem}
    for i, depth in enumerate(depths):
        stage = stages[f"stage{i + 1}"] = nn.Sequential()
        for j in range(depth):
            stride = 2 if i and not j else 1
            planes = int(64 * width) * 2**i
            made, channels = residual(block, channels, planes, stride, bottleneck, groups)
            stage.append(made)
    return sequence(**stages, **pooled(channels, classes))
