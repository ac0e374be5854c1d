"""RepMLP: Ding et al., "RepMLPNet", CVPR 2022, section 3: a fully connected layer with locality.

It is no convolution: it is gated, and its size is that of the map. It uses the identities only.
"""

from __future__ import annotations

from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from replib import kernels
from replib.blocks.block import Geometry
from replib.branches import Chain, Norm
from replib.kernels import Kernel


class DenseMaps(nn.Conv2d):
    """One fully connected layer per set: (M, S p, 1, 1) -> (M, S p, 1, 1), weight (S p, p, 1, 1).

    A 1x1 convolution in S groups, in all but its evaluation: one product of matrices per set takes
    a ninth of the time of so many groups.
    """

    def __init__(self, sets: int, pixels: int, bias: bool):
        super().__init__(sets * pixels, sets * pixels, 1, groups=sets, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.weight.shape[1]
        weight = self.weight.view(self.groups, pixels, pixels).transpose(1, 2)
        out = x.reshape(-1, self.groups, pixels).transpose(0, 1)
        if self.bias is None:
            out = out @ weight
        else:  # in one call, which autocast knows: a sum would be as wide as the bias
            out = torch.baddbmm(self.bias.view(self.groups, 1, pixels), out, weight)
        return out.transpose(0, 1).reshape(x.shape)


class RepMLP(nn.Module):
    """Windows of h x w pixels, one dense map per set of channels, beside small convolutions.

    Shapes: (N, C, a h, b w) -> the same. Channel q S + s uses the dense map of set s of S.
    sizes: kernels of the convolutions beside the dense map.
    gated: whether the output is weighted by a small network of the channels' means (3.2).
    bias, norm: whether the dense map has a bias, and a norm behind it.
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
        *,
        gated: bool = True,
        bias: bool = False,
        norm: bool = True,
    ):
        super().__init__()
        if channels % sets:
            raise ValueError(f"channels (={channels}) must be divisible by sets (={sets}).")
        self.channels, self.h, self.w, self.sets = channels, h, w, sets
        self.official_order, self.gated = official_order, gated
        if gated:
            self.reduce = nn.Conv2d(channels, channels // 4, 1)
            self.expand = nn.Conv2d(channels // 4, channels, 1)
        self.dense = DenseMaps(sets, h * w, bias)
        self.norm = Norm(sets, 2) if norm else nn.Identity()
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
        a, b, q = height // self.h, width // self.w, c // self.sets
        windows = x.view(n, c, a, self.h, b, self.w).permute(0, 2, 4, 1, 3, 5)
        out = self.window_map(windows.reshape(-1, self.sets, self.h, self.w))
        if self.official_order:
            out = out.reshape(n, a, b, c, self.h, self.w)  # released: set and window change places
            out = out.reshape(-1, a, b, self.sets, self.h, self.w).permute(0, 3, 1, 4, 2, 5)
        else:
            out = out.view(n, a, b, q, self.sets, self.h, self.w).permute(0, 3, 4, 1, 5, 2, 6)
        out = out.reshape(x.shape)
        if not self.gated:
            return out
        return out * self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True)))).sigmoid()

    def window_map(self, x: Tensor) -> Tensor:
        """The affine part: (M, sets, h, w) -> the same."""
        out = self.norm(self.dense(x.reshape(x.shape[0], -1, 1, 1)).view(x.shape))
        # Maps of several channels side by side: convolutions of few channels are slow.
        beside = gcd(len(x), self.channels // self.sets) if self.local else 1
        for chain, k in self.local_sizes():
            conv, norm = chain
            weight = conv.weight.repeat(beside, 1, 1, 1)
            maps = x.reshape(-1, beside * self.sets, self.h, self.w)
            found = F.conv2d(maps, weight, padding=k // 2, groups=beside * self.sets)
            out = out + norm(found.reshape(x.shape))
        return out

    def local_sizes(self):
        return ((chain, int(k)) for k, chain in self.local.items())

    def merged(self) -> Kernel:
        """The eval-mode dense map with the convolutions in it; weight (S h w, h w, 1, 1).

        A convolution is read off its answers to the unit images ("locality injection", 3.3).
        Folded in float64, in the dtype of the module.
        """
        first, *others = self.parts().values()
        return sum(others, first).to(self.dense.weight.dtype)

    def parts(self) -> dict[str, Kernel]:
        """What the dense map and every convolution contribute to `merged`; float64, they add up."""
        pixels = self.h * self.w
        weight, bias = self.dense.weight.double(), self.dense.bias
        bias = weight.new_zeros(len(weight)) if bias is None else bias.double()
        dense = Kernel(weight, bias, self.sets)
        if isinstance(self.norm, Norm):
            factor, shift = (v.repeat_interleave(pixels) for v in self.norm.affine())
            dense = kernels.scaled(dense, factor, shift)
        images = torch.eye(pixels).to(weight).view(pixels, 1, self.h, self.w)
        images = images.expand(-1, self.sets, -1, -1)
        found = {"dense": dense}
        for chain, k in self.local_sizes():
            kernel = chain.kernel()
            linear = Kernel(kernel.weight, torch.zeros_like(kernel.bias), self.sets)
            answers = kernels.convolve(images, linear, (k // 2, k // 2))
            answers = answers.reshape(pixels, -1).t().reshape(weight.shape)
            bias = kernel.bias.repeat_interleave(pixels)
            found[f"{k}x{k}"] = Kernel(answers, bias, self.sets)
        return found

    @torch.no_grad()
    def deploy(self) -> RepMLP:
        """A new block that computes the same in eval mode, with the dense map alone."""
        kernel, shape = self.merged(), (self.channels, self.h, self.w, self.sets)
        with torch.random.fork_rng(devices=[]):  # its initialisation is overwritten at once
            plain = {"gated": self.gated, "bias": True, "norm": False}
            made = RepMLP(*shape, (), self.official_order, **plain).to(kernel.weight)
        if self.gated:
            made.reduce.load_state_dict(self.reduce.state_dict())
            made.expand.load_state_dict(self.expand.state_dict())
        made.dense.weight.copy_(kernel.weight)
        made.dense.bias.copy_(kernel.bias)
        return made.train(self.training)
