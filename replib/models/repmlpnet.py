"""RepMLPNet: dense maps over windows with convolutions beside them, and feed-forward layers.

Source: Ding et al., "RepMLPNet: Hierarchical Vision MLP with Re-parameterized Locality", CVPR 2022,
section 3.4 and table 2.
"""

from __future__ import annotations

from torch import nn

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


def unit(channels: int, window: int, sets: int) -> nn.Module:
    """A dense map and a feed-forward layer, each beside its input: (N, C, H, W) -> the same."""
    dense = sequence(norm=nn.BatchNorm2d(channels), repmlp=RepMLP(channels, window, window, sets))
    forward = sequence(
        norm=nn.BatchNorm2d(channels),
        fc1=layer("convbn", channels, 4 * channels, 1, activation=nn.GELU),
        fc2=layer("convbn", 4 * channels, channels, 1, activation=None),
    )
    return sequence(mix=Residual(dense), ffn=Residual(forward))


def repmlpnet(name: str, *, classes: int, in_channels: int = 3) -> nn.Module:
    """RepMLPNet t224 to l256: (N, in_channels, H, W) -> (N, classes).

    H and W are those of the name, or multiples of them.
    """
    width, depths, window, sets = REPMLPNET[name]
    parts: dict[str, nn.Module] = {
        "conv_embedding": layer("convbn", in_channels, width, 4, 4, padding=0)
    }
    for i, depth in enumerate(depths):
        channels = width * 2**i
        parts[f"stage{i}"] = nn.Sequential(
            *(unit(channels, window // 2**i, sets[i]) for _ in range(depth))
        )
        if i < len(depths) - 1:
            parts[f"embed{i}"] = layer("convbn", channels, 2 * channels, 2, 2, padding=0)
    norm = nn.BatchNorm2d(channels)
    return sequence(**parts, head_norm=norm, **pooled(channels, classes, "head"))
