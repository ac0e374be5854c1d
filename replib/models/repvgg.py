"""RepVGG and RepOpt-VGG: plain stacks of 3x3 layers in five stages.

Sources: Ding et al., "RepVGG: Making VGG-style ConvNets Great Again", CVPR 2021, table 2;
Ding et al., "Re-parameterizing Your Optimizers rather than Architectures", ICLR 2023, section 4;
RepVGGplus is that of the released code.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import count

from torch import Tensor, nn

from replib.models.layers import Block, Residual, layer, pooled, sequence, supported

A, B, D = (2, 4, 14, 1), (4, 6, 16, 1), (8, 14, 24, 1)  # layers per stage after the first
SIZES = {  # depths, factors on the widths 64, 128, 256, 512
    "a0": (A, (0.75, 0.75, 0.75, 2.5)),
    "a1": (A, (1, 1, 1, 2.5)),
    "a2": (A, (1.5, 1.5, 1.5, 2.75)),
    "b0": (B, (1, 1, 1, 2.5)),
    "b1": (B, (2, 2, 2, 4)),
    "b2": (B, (2.5, 2.5, 2.5, 5)),
    "b3": (B, (3, 3, 3, 5)),
    "l1": (D, (2, 2, 2, 4)),
    "l2": (D, (2.5, 2.5, 2.5, 5)),
}
REPVGG = {  # size, groups of every second layer, squeeze-excite
    **{name: (name, 1, None) for name in ("a0", "a1", "a2", "b0", "b1", "b2", "b3")},
    **{f"{b}g{g}": (b, g, None) for b in ("b1", "b2", "b3") for g in (2, 4)},
    "d2se": ("l2", 1, 16),
}
REPOPT_VGG = ("b1", "b2", "l1", "l2")


def widths(size: str, width: float = 1.0) -> list[int]:
    """The five widths; the first stage is never wider than 64. `width` multiplies them all."""
    factors = SIZES[size][1]
    wide = [int(base * f) for base, f in zip((64, 128, 256, 512), factors, strict=True)]
    return [int(width * channels) for channels in (min(64, wide[0]), *wide)]


def stage(
    block: Block,
    channels: int,
    width: int,
    depth: int,
    indices: Iterable[int],
    *,
    stride: int = 2,
    groups: int = 1,
    **options,
) -> nn.Sequential:
    """`depth` layers, the first strided; layers of even index have `groups`.

    indices: where each layer stands in the network, the very first layer being 0.
    """
    made = nn.Sequential()
    for i, index in zip(range(depth), indices, strict=False):
        own = supported(block, initial=math.sqrt(2 / i) if i else 1.0)  # RepOpt-VGG's scales
        made.append(
            layer(
                block,
                width if i else channels,
                width,
                3,
                1 if i else stride,
                groups=1 if index % 2 else groups,
                **own,
                **options,
            )
        )
    return made


def repvgg(
    name: str, *, classes: int, block: Block = "repvgg", in_channels: int = 3, width: float = 1.0
) -> nn.Module:
    """RepVGG a0 to b3, b1g2 to b3g4, d2se: (N, in_channels, H, W) -> (N, classes)."""
    size, groups, se = REPVGG[name]
    return plain_stages(size, block, classes, in_channels, width, groups=groups, se=se)


def repopt_vgg(
    name: str,
    *,
    classes: int,
    block: Block = "convbn",
    in_channels: int = 3,
    width: float = 1.0,
    strides: Sequence[int] = (2, 2, 2, 2, 2),
) -> nn.Module:
    """RepOpt-VGG b1 b2 l1 l2: (N, in_channels, H, W) -> (N, classes).

    block "convbn" is the network that is trained with RepOptimizers, "csla" that of the search
    for their scales, which start at sqrt(2 / i) in layer i of a stage.
    strides: of the first layer and of the first ones of the four stages (table 6 of the paper).
    Raises: ValueError for strides that are not five integers of at least 1.
    """
    if len(strides) != 5 or any(not isinstance(s, int) or s < 1 for s in strides):
        raise ValueError(f"strides (={list(strides)}) must be five integers of at least 1.")
    return plain_stages(name, block, classes, in_channels, width, strides)


class ReLUBranches(nn.Module):
    """RepVGG's branches, each with an activation of its own: no longer one convolution.

    (N, I, H, W) -> (N, O, H / stride, W / stride). Source: Ding et al., RepVGG, table 7.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        sizes = {"dense": 3, "1x1": 1}
        self.branches = nn.ModuleDict(
            {
                name: layer("convbn", in_channels, out_channels, size, stride)
                for name, size in sizes.items()
            }
        )
        if in_channels == out_channels and stride == 1:
            self.branches["identity"] = sequence(norm=nn.BatchNorm2d(in_channels), act=nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        out = self.branches["dense"](x) + self.branches["1x1"](x)
        return out + self.branches["identity"](x) if "identity" in self.branches else out


def repvgg_with_relus(
    size: str, *, classes: int, in_channels: int = 3, width: float = 1.0
) -> nn.Module:
    """A key of `SIZES` in which every branch has an activation: (N, in_channels, H, W) -> (N,
    classes). What can be merged is every branch by itself."""
    channels = widths(size, width)
    before = [in_channels, *channels]
    stages = {f"stage{i}": nn.Sequential() for i in range(5)}
    for i, (stage, depth) in enumerate(zip(stages.values(), (1, *SIZES[size][0]), strict=True)):
        for j in range(depth):
            shape = (channels[i] if j else before[i], channels[i], 1 if j else 2)
            stage.append(ReLUBranches(*shape))
    return sequence(**stages, **pooled(channels[-1], classes))


def residual_repvgg(
    size: str, *, classes: int, block: Block = "convbn", in_channels: int = 3, width: float = 1.0
) -> nn.Module:
    """The layers of a key of `SIZES` in residuals of two, as in ResNet-18: (N, in_channels, H, W)
    -> (N, classes).

    The first and the last layer stand alone. Source: Ding et al., RepVGG, table 7 ("residual
    reorg").
    """
    channels = widths(size, width)
    stages: dict[str, nn.Module] = {"stage0": layer(block, in_channels, channels[0], 3, 2)}
    for i, depth in enumerate(SIZES[size][0][:-1]):
        stage = stages[f"stage{i + 1}"] = nn.Sequential()
        for j in range(depth // 2):
            before, wide, stride = channels[i + (j > 0)], channels[i + 1], 1 if j else 2
            convs = sequence(
                conv1=layer(block, before, wide, 3, stride),
                conv2=layer(block, wide, wide, 3, activation=None),
            )
            shortcut = None if j else layer("convbn", before, wide, 1, stride, activation=None)
            stage.append(Residual(convs, shortcut, nn.ReLU))
    stages["stage4"] = layer(block, channels[-2], channels[-1], 3, 2)
    return sequence(**stages, **pooled(channels[-1], classes))


def plain_stages(
    size: str,
    block: Block,
    classes: int,
    in_channels: int,
    width: float = 1.0,
    strides: Sequence[int] = (2, 2, 2, 2, 2),
    **options,
) -> nn.Module:
    """One layer, four stages, a linear classifier."""
    channels, indices = widths(size, width), count(1)
    options_of_first = {key: value for key, value in options.items() if key != "groups"}
    stages: dict[str, nn.Module] = {
        "stage0": layer(block, in_channels, channels[0], 3, strides[0], **options_of_first)
    }
    for i, depth in enumerate(SIZES[size][0]):
        arguments = (block, channels[i], channels[i + 1], depth, indices)
        stages[f"stage{i + 1}"] = stage(*arguments, stride=strides[i + 1], **options)
    return sequence(**stages, **pooled(channels[-1], classes))


class RepVGGPlus(nn.Module):
    """RepVGGplus-L2pse: squeeze-excite after the activation, classifiers beside three stages.

    (N, in_channels, H, W) -> (N, classes) in eval mode; in train mode a dict of four such
    outputs, "main" and one per name of `auxiliary` (weighted 0.1 in the released loss).
    auxiliary=False: without the classifiers beside, as in released deployed files.
    """

    AUXILIARY = ("stage1", "stage2", "stage3_first")

    def __init__(
        self, *, classes: int, block: Block = "repvgg", in_channels: int = 3, auxiliary: bool = True
    ):
        super().__init__()
        first, *wide = widths("l2")
        indices, halves = count(1), SIZES["l2"][0][2] // 2
        d1, d2, _, d4 = SIZES["l2"][0]
        self.stage0 = layer(block, in_channels, first, 3, 2, post_se=4)
        self.stages = nn.ModuleDict()
        for name, before, width, depth, stride in (
            ("stage1", first, wide[0], d1, 2),
            ("stage2", wide[0], wide[1], d2, 2),
            ("stage3_first", wide[1], wide[2], halves, 2),
            ("stage3_second", wide[2], wide[2], halves, 1),
            ("stage4", wide[2], wide[3], d4, 2),
        ):
            arguments = (block, before, width, depth, indices)
            self.stages[name] = stage(*arguments, stride=stride, post_se=4)
        self.auxiliary = nn.ModuleDict()
        for name, width in zip(self.AUXILIARY, wide, strict=False) if auxiliary else ():
            beside = layer("convbn", width, width, 3, 2)
            self.auxiliary[name] = sequence(conv=beside, **pooled(width, classes))
        self.head = sequence(**pooled(wide[3], classes))

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        x, beside = self.stage0(x), {}
        for name, stage in self.stages.items():
            x = stage(x)
            if self.training and name in self.auxiliary:
                beside[name] = self.auxiliary[name](x)
        main = self.head(x)
        return {"main": main, **beside} if beside else main
