"""Networks of dense maps, with convolutions beside them: RepMLPNet and ResMLP.

Sources: Ding et al., "RepMLPNet: Hierarchical Vision MLP with Re-parameterized Locality", CVPR
2022, sections 3 and 4, tables 2 to 4; Touvron et al., "ResMLP: Feedforward networks for image
classification with data-efficient training", TPAMI 2022, section 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from replib.blocks.repmlp import RepMLP
from replib.models.layers import Residual, layer, pooled, sequence

REPMLPNET = {  # width, depths, window of the first stage, sets of channels per stage
    "t224": (64, (2, 2, 6, 2), 56, (1, 4, 16, 128)),
    "t256": (64, (2, 2, 6, 2), 64, (1, 4, 16, 128)),
    "b224": (96, (2, 2, 12, 2), 56, (1, 4, 32, 128)),
    "b256": (96, (2, 2, 12, 2), 64, (1, 4, 32, 128)),
    "d256": (80, (2, 2, 18, 2), 64, (1, 4, 16, 128)),
    "l256": (96, (2, 2, 18, 2), 64, (1, 4, 32, 256)),
}
# Two stages of six (table 4). Its embedding is that of the others; the paper states none.
CIFAR = (128, (6, 6), 8, (8, 32))


def unit(
    channels: int, window: int, sets: int, sizes: Sequence[int] = (1, 3), gated: bool = True
) -> nn.Module:
    """A dense map and a feed-forward layer, each beside its input: (N, C, H, W) -> the same."""
    shape, options = (channels, window, window, sets), {"gated": gated}
    dense = sequence(norm=nn.BatchNorm2d(channels), repmlp=RepMLP(*shape, tuple(sizes), **options))
    forward = sequence(
        norm=nn.BatchNorm2d(channels),
        fc1=layer("convbn", channels, 4 * channels, 1, activation=nn.GELU),
        fc2=layer("convbn", 4 * channels, channels, 1, activation=None),
    )
    return sequence(mix=Residual(dense), ffn=Residual(forward))


def repmlpnet(
    name: str,
    *,
    classes: int,
    in_channels: int = 3,
    width: float = 1.0,
    window: int | None = None,
    sets: Sequence[int] | None = None,
    sizes: Sequence[int] = (1, 3),
    gated: bool = True,
) -> nn.Module:
    """RepMLPNet t224 to l256, or cifar for images of 32x32: (N, in_channels, H, W) -> (N, classes).

    H and W are those of the name, or multiples of them.
    width multiplies all widths. window: the side of the maps of the first stage, a quarter of the
    image's; every further stage has half of it. sets: of channels, one number per stage (the
    paper's S); by default those of the name. sizes: of the convolutions beside every dense map.
    gated: whether channels are weighted by their means (the Global Perceptron).
    Raises: ValueError where windows, sets and widths do not fit.
    """
    base, depths, own_window, own_sets = CIFAR if name == "cifar" else REPMLPNET[name]
    window, sets = window or own_window, own_sets if sets is None else sets
    if len(sets) != len(depths):
        raise ValueError(f"sets (={list(sets)}) must be {len(depths)} numbers, one per stage.")
    if window % 2 ** (len(depths) - 1):
        raise ValueError(
            f"window (={window}) must be divisible by {2 ** (len(depths) - 1)}: each of the "
            f"{len(depths)} stages but the first has half of it."
        )
    first = int(width * base)
    parts: dict[str, nn.Module] = {
        "conv_embedding": layer("convbn", in_channels, first, 4, 4, padding=0)
    }
    for i, depth in enumerate(depths):
        channels = first * 2**i
        shape = (channels, window // 2**i, sets[i], sizes, gated)
        parts[f"stage{i}"] = nn.Sequential(*(unit(*shape) for _ in range(depth)))
        if i < len(depths) - 1:
            parts[f"embed{i}"] = layer("convbn", channels, 2 * channels, 2, 2, padding=0)
    norm = nn.BatchNorm2d(channels)
    return sequence(**parts, head_norm=norm, **pooled(channels, classes, "head"))


class Affine(nn.Module):
    """y = weight x + bias per channel, ResMLP's place of a norm: (N, C, H, W) -> the same.

    initial: the slope at first; bias: False leaves the shift out (LayerScale).
    """

    def __init__(self, channels: int, initial: float = 1.0, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels,), initial))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.view(-1, 1, 1)
        return x * weight if self.bias is None else x * weight + self.bias.view(-1, 1, 1)


def resmlp12(
    *,
    classes: int,
    in_channels: int = 3,
    width: float = 1.0,
    window: int = 8,
    patch: int = 4,
    sizes: Sequence[int] = (),
) -> nn.Module:
    """ResMLP with 12 layers of 384 channels: (N, in_channels, H, W) -> (N, classes).

    window: patches on a side of the image; patch: pixels on a side of a patch; H = W = their
    product. sizes: of convolutions beside every map across patches, which has a norm then too
    (RepMLPNet, table 4); all channels share it and them. For CIFAR: patches of 4 pixels, which are
    ours, as that paper states none. The original: window 14, patch 16. Initialisation is torch's.
    """
    channels = int(width * 384)
    layers = nn.Sequential()
    for _ in range(12):
        options = {"gated": False, "bias": True, "norm": bool(sizes)}
        dense = RepMLP(channels, window, window, 1, tuple(sizes), **options)
        across = sequence(norm=Affine(channels), repmlp=dense, scale=Affine(channels, 0.1, False))
        within = sequence(
            norm=Affine(channels),
            fc1=nn.Conv2d(channels, 4 * channels, 1),
            act=nn.GELU(),
            fc2=nn.Conv2d(4 * channels, channels, 1),
            scale=Affine(channels, 0.1, False),
        )
        layers.append(sequence(mix=Residual(across), ffn=Residual(within)))
    stem = nn.Conv2d(in_channels, channels, patch, patch)
    return sequence(stem=stem, layers=layers, norm=Affine(channels), **pooled(channels, classes))
