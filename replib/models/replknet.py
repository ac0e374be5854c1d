"""RepLKNet: large depthwise kernels between pointwise layers.

Source: Ding et al., "Scaling Up Your Kernels to 31x31", CVPR 2022, section 4 and table 5.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from replib.models.layers import Block, Residual, layer, pooled, sequence, supported

REPLKNET = {  # kernel sizes, width, widening of the large-kernel blocks, small kernel
    "31b": ((31, 29, 27, 13), 128, 1, 5),
    "31l": ((31, 29, 27, 13), 192, 1, 5),
    "xl": ((27, 27, 27, 13), 256, 1.5, None),
}
DEPTHS = (2, 2, 18, 2)


def large_kernel_block(
    block: Block, channels: int, wide: int, kernel_size: int, small: int | None, drop: float
) -> Residual:
    """Norm, 1x1, large depthwise kernel, 1x1 beside the input: (N, C, H, W) -> (N, C, H, W)."""
    options = {"groups": wide, **supported(block, small=small)}
    residual = sequence(
        prelkb_bn=nn.BatchNorm2d(channels),
        pw1=layer("convbn", channels, wide, 1),
        large_kernel=layer(block, wide, wide, kernel_size, **options),
        pw2=layer("convbn", wide, channels, 1, activation=None),
    )
    return Residual(residual, drop=drop)


def feed_forward(channels: int, drop: float) -> Residual:
    """Norm and two 1x1 layers, four times as wide between: (N, C, H, W) -> (N, C, H, W)."""
    residual = sequence(
        preffn_bn=nn.BatchNorm2d(channels),
        pw1=layer("convbn", channels, 4 * channels, 1, activation=nn.GELU),
        pw2=layer("convbn", 4 * channels, channels, 1, activation=None),
    )
    return Residual(residual, drop=drop)


def replknet(
    name: str,
    *,
    classes: int,
    block: Block = "replk",
    in_channels: int = 3,
    width: float = 1.0,
    drop: float = 0.5,
    sizes: Sequence[int] | None = None,
    depths: Sequence[int] = DEPTHS,
) -> nn.Module:
    """RepLKNet 31b, 31l, xl: (N, in_channels, H, W) -> (N, classes).

    width multiplies all widths. drop: the share of residuals left out in training at the last
    layer, growing linearly from 0 at the first (0.5: 31b on ImageNet-1K). sizes, depths: of the
    large kernels and of the stages, one number per stage; by default those of the name.
    block: the family of the large kernels, "convbn" for no small kernel beside them.
    Raises: ValueError for another number of stages, or even kernels.
    """
    own_sizes, base, widening, small = REPLKNET[name]
    sizes, first = own_sizes if sizes is None else sizes, int(width * base)
    for what, given in (("sizes", sizes), ("depths", depths)):
        if len(given) != len(DEPTHS):
            raise ValueError(f"{what} (={list(given)}) must be {len(DEPTHS)} numbers.")
    if even := [size for size in sizes if size % 2 == 0]:
        raise ValueError(f"sizes (={list(sizes)}) must be odd: {even[0]} has no centre.")

    def down(channels: int) -> nn.Module:
        return layer("convbn", channels, channels, 3, 2, groups=channels)

    parts: dict[str, nn.Module] = {
        "stem": nn.Sequential(
            layer("convbn", in_channels, first, 3, 2),
            layer("convbn", first, first, 3, groups=first),
            layer("convbn", first, first, 1),
            down(first),
        )
    }
    done, layers = 0, sum(depths)
    for i, (size, depth) in enumerate(zip(sizes, depths, strict=True)):
        channels, stage = first * 2**i, nn.Sequential()
        for _ in range(depth):
            rate, wide = drop * done / max(layers - 1, 1), int(channels * widening)
            stage.append(large_kernel_block(block, channels, wide, size, small, rate))
            stage.append(feed_forward(channels, rate))
            done += 1
        parts[f"stage{i}"] = stage
        if i < len(sizes) - 1:
            wider = layer("convbn", channels, 2 * channels, 1)
            parts[f"transition{i}"] = nn.Sequential(wider, down(2 * channels))
    return sequence(**parts, norm=nn.BatchNorm2d(channels), **pooled(channels, classes, "head"))
