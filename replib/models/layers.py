"""Layers that bodies put around blocks."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class SqueezeExcite(nn.Module):
    """Channels weighted by a small network of their means: (N, C, H, W) -> (N, C, H, W).

    Source: Hu et al., "Squeeze-and-Excitation Networks", CVPR 2018, section 3.
    """

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.reduce = nn.Conv2d(channels, hidden, 1)
        self.expand = nn.Conv2d(hidden, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        means = x.mean((2, 3), keepdim=True)
        return x * self.expand(F.relu(self.reduce(means))).sigmoid()
