"""The compactor of ResRep: a square matrix on the channels behind a layer, the identity at first.

    y = Q layer(x)        one row of Q per channel of the layer; a zero row removes its channel

Source: Ding et al., "ResRep: Lossless CNN Pruning via Decoupling Remembering and Forgetting", ICCV
2021, section 3.2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from replib.kernels import CONVOLUTION

FORMS = {
    "matrix": "a 1x1 convolution, as in the paper",
    "vector": "a factor per channel (table 3 of the paper, vector re-parameterization)",
}


class Compacted(nn.Module):
    """A layer (N, C, *space) -> (N, O, *space') and its compactor: it begins as the layer alone.

    weight: (O, O), or (O,) of the form "vector".
    """

    def __init__(self, layer: nn.Module, channels: int, dims: int, form: str = "matrix"):
        super().__init__()
        self.layer, self.dims = layer, dims
        like = next(layer.parameters())
        options = {"dtype": like.dtype, "device": like.device}
        start = torch.eye(channels, **options)
        if form == "vector":
            start = torch.ones(channels, **options)
        self.weight = nn.Parameter(start)
        self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        y, spatial = self.layer(x), (1,) * self.dims
        if self.weight.dim() == 1:
            return y * self.weight.view(-1, *spatial)
        return CONVOLUTION[self.dims](y, self.weight.view(*self.weight.shape, *spatial))

    def matrix(self) -> Tensor:
        """Q, whatever the form: (O, O)."""
        return self.weight if self.weight.dim() == 2 else self.weight.diag()
