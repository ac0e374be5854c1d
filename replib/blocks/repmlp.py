"""RepMLP: Ding et al., "RepMLPNet", CVPR 2022, section 3: a fully connected layer with locality.

It is no convolution: it is gated, and its size is that of the map. It uses the identities only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from replib import kernels
from replib.blocks.block import Geometry
from replib.branches import Chain, Norm
from replib.kernels import Kernel


class RepMLP(nn.Module):
    """Windows of h x w pixels, one dense map per set of channels, beside small convolutions.

    Shapes: (N, C, a h, b w) -> the same. Channel q S + s uses the dense map of set s of S.
    sizes: kernels of the convolutions beside the dense map.
    official_order: with several windows and S < C the released code mixes the windows of
    different channels on the way back; True does so too, to compute what its files compute.
    Raises: ValueError if `sets` does not divide the channels, or h and w do not divide the map.
    """

    def __init__(
        self,
        channels: int,
        h: int,
        w: int,
        sets: int = 1,
        sizes: tuple[int, ...] = (1, 3),
        official_order: bool = False,
    ):
        super().__init__()
        if channels % sets:
            raise ValueError(f"channels (={channels}) must be divisible by sets (={sets}).")
        self.channels, self.h, self.w, self.sets = channels, h, w, sets
        self.official_order = official_order
        self.reduce = nn.Conv2d(channels, channels // 4, 1)
        self.expand = nn.Conv2d(channels // 4, channels, 1)
        self.dense = nn.Conv2d(sets * h * w, sets * h * w, 1, groups=sets, bias=False)
        self.norm = Norm(sets, 2)
        self.local = nn.ModuleDict()
        for k in sizes:
            shape, space = (sets, sets, (k, k)), ((1, 1), (k // 2, k // 2), (1, 1))
            conv = Geometry(*shape, *space, groups=sets, dims=2).conv()
            self.local[str(k)] = Chain(conv, Norm(sets, 2))

    def forward(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        # The deployed form is traced, where sizes have no values: there, `view` refuses.
        if self.local and (height % self.h or width % self.w):
            raise ValueError(
                f"the map ({height} x {width}) must be a multiple of h x w ({self.h} x {self.w})."
            )
        gate = self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True)))).sigmoid()
        a, b, q = height // self.h, width // self.w, c // self.sets
        windows = x.view(n, c, a, self.h, b, self.w).permute(0, 2, 4, 1, 3, 5)
        out = self.window_map(windows.reshape(-1, self.sets, self.h, self.w))
        if self.official_order:
            out = out.reshape(n, a, b, c, self.h, self.w)  # released: set and window change places
            out = out.reshape(-1, a, b, self.sets, self.h, self.w).permute(0, 3, 1, 4, 2, 5)
        else:
            out = out.view(n, a, b, q, self.sets, self.h, self.w).permute(0, 3, 4, 1, 5, 2, 6)
        return out.reshape(x.shape) * gate

    def window_map(self, x: Tensor) -> Tensor:
        """The affine part: (M, sets, h, w) -> the same."""
        flat = self.dense(x.reshape(x.shape[0], -1, 1, 1)).view(x.shape)
        one = (1, 1)
        padded = ((chain, (k // 2, k // 2)) for chain, k in self.local_sizes())
        return sum((chain.run(x, padding, one) for chain, padding in padded), self.norm(flat))

    def local_sizes(self):
        return ((chain, int(k)) for k, chain in self.local.items())

    def merged(self) -> Kernel:
        """The eval-mode dense map with the convolutions in it; weight (S h w, h w, 1, 1).

        A convolution is read off its answers to the unit images ("locality injection", 3.3).
        Folded in float64, in the dtype of the module.
        """
        dtype, pixels = self.dense.weight.dtype, self.h * self.w
        weight, bias = self.dense.weight.double(), self.dense.bias
        bias = weight.new_zeros(len(weight)) if bias is None else bias.double()
        total = Kernel(weight, bias, self.sets)
        if isinstance(self.norm, Norm):  # it is an identity in the deployed form
            factor, shift = (v.repeat_interleave(pixels) for v in self.norm.affine())
            total = kernels.scaled(total, factor, shift)
        images = torch.eye(pixels).to(total.weight).view(pixels, 1, self.h, self.w)
        images = images.expand(-1, self.sets, -1, -1)
        for chain, k in self.local_sizes():
            kernel = chain.kernel()
            bias = kernel.bias.repeat_interleave(pixels)
            linear = Kernel(kernel.weight, torch.zeros_like(kernel.bias), self.sets)
            answers = kernels.convolve(images, linear, (k // 2, k // 2))
            weight = answers.reshape(pixels, -1).t().reshape(total.weight.shape)
            total = total + Kernel(weight, bias, self.sets)
        return total.to(dtype)

    @torch.no_grad()
    def deploy(self) -> RepMLP:
        """A new block that computes the same in eval mode, with the dense map alone."""
        kernel, shape = self.merged(), (self.channels, self.h, self.w, self.sets)
        with torch.random.fork_rng(devices=[]):  # its initialisation is overwritten at once
            made = RepMLP(*shape, (), self.official_order).to(kernel.weight)
        made.norm, made.dense.bias = nn.Identity(), nn.Parameter(kernel.bias)
        made.reduce.load_state_dict(self.reduce.state_dict())
        made.expand.load_state_dict(self.expand.state_dict())
        made.dense.weight.copy_(kernel.weight)
        return made.train(self.training)
