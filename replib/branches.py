"""The tree of linear pieces from which every block is declared.

    piece = leaf | Chain[piece, ...] | Sum{name: piece}
    leaf  = Convolution | Norm | Scale | Filter | AveragePool

Every operation of the workbench (merge, restore, redraw, export, prove, draw) is written once
over these pieces. A piece owns its size and its dilation; padding and stride belong to the block
and are handed down with `run(x, padding, stride)`, one number per axis.

A leaf knows four things:
    run      what it computes on a feature map
    act      what it makes of the kernel before it (exact in eval mode)
    put/undo how it is inverted: the first piece of a chain `put`s a kernel, the others `undo` it
    redraw   how it is drawn anew

Sources: Ding et al. (RepVGG, CVPR 2021; ACNet, ICCV 2019; DBB, CVPR 2021), Hu et al. (OREPA,
CVPR 2022), Fei et al. (RepAn, CVPR 2024).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import reduce
from itertools import pairwise
from operator import add

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from replib import kernels
from replib.kernels import Kernel

BATCH_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
AVERAGE_POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
MIN_SLOPE = 1e-3  # a smaller slope is replaced before it divides (RepAn's code gives NaN at 0)
RULES = {
    "repan": "weights uniform in +-0.1/sqrt(O), offsets 0; norms slope 1, shift 0, statistics kept",
    "fan_out": "weights normal of variance 2/(kernel size O); norms reset, last slope 0.01 (DyRep)",
    "default": "as constructed: the initialisation of PyTorch or of the family, norms reset",
}
NORM_AT_RESTORE = {
    "keep": "slope and statistics stay (RepAn, CIFAR RepVGG)",
    "unit": "slope 1, statistics stay (RepAn, all other blocks)",
    "reset": "slope 1, statistics (0, 1) (DyRep)",
    "match": "statistics measured, slope their deviation: train mode is preserved too",
}
Sizes = tuple[int, ...]
Statistics = Callable[[Kernel], tuple[Tensor, Tensor]]


class Piece(nn.Module):
    """A linear piece: (N, in_channels, *space) -> (N, out_channels, *space').

    Attributes: in_channels, out_channels, extent (pixels that one output sees, per axis).
    """

    in_channels: int
    out_channels: int
    extent: Sizes
    carries_bias = False  # whether `put` can store a bias in it

    @property
    def dims(self) -> int:
        return len(self.extent)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, (0,) * self.dims, (1,) * self.dims)

    def run(self, x: Tensor, padding: Sizes, stride: Sizes) -> Tensor:
        """Apply to x, zero-padded (cropped where negative) and strided."""
        raise NotImplementedError

    def act(self, kernel: Kernel) -> Kernel:
        """The kernel of `kernel` followed by this piece, in the dtype of `kernel`."""
        return kernels.composed(kernel, self.kernel(kernel.weight.dtype))

    def kernel(self, dtype: torch.dtype = torch.float64) -> Kernel:
        """This piece alone as one kernel; eval mode, differentiable."""
        device = next((t.device for t in [*self.parameters(), *self.buffers()]), None)
        return self.act(kernels.identity(self.in_channels, self.dims, dtype=dtype, device=device))

    @property
    def shifts(self) -> bool:
        """Whether a zero input may become something else: by the structure, whatever the values."""
        return False

    def at_constant(self, value: Tensor | None) -> Tensor | None:
        """What a constant input (per channel; None is 0) becomes; None is 0 again."""
        if value is None and not self.shifts:
            return None
        kernel = self.kernel(torch.float64)
        value = torch.zeros(self.in_channels).to(kernel.bias) if value is None else value.double()
        taps = kernels.regrouped(kernel, 1).weight.sum(tuple(range(2, 2 + self.dims)))
        return taps @ value + kernel.bias

    def put(self, kernel: Kernel, norm: str = "keep", stats: Statistics | None = None) -> None:
        """Become `kernel`, as far as this piece is invertible."""
        raise TypeError(f"{type(self).__name__} cannot take a kernel: it has no free weights.")

    def undo(self, kernel: Kernel, norm: str, stats: Statistics | None, bias_below: bool) -> Kernel:
        """The kernel that must come before this piece, so that both together are `kernel`."""
        raise TypeError(f"{type(self).__name__} cannot be undone.")

    def redraw(self, rule: str, generator: torch.Generator | None = None, last: bool = False):
        """Draw the parameters anew by a rule of `RULES`; `last`: it ends its branch."""

    @property
    def invertible(self) -> bool:
        """Whether `put` can make this piece equal any kernel of its size."""
        return type(self).put is not Piece.put

    @property
    def undoable(self) -> bool:
        """Whether `undo` exists."""
        return type(self).undo is not Piece.undo


def uniform_(tensor: Tensor, bound: float, generator: torch.Generator | None) -> None:
    """Fill with U(-bound, bound), drawn on the generator's own device."""
    device = generator.device if generator is not None else tensor.device
    drawn = torch.empty(tensor.shape, dtype=torch.float32, device=device)
    tensor.copy_(drawn.uniform_(-bound, bound, generator=generator))


def normal_(tensor: Tensor, std: float, generator: torch.Generator | None) -> None:
    """Fill with N(0, std^2), drawn on the generator's own device."""
    device = generator.device if generator is not None else tensor.device
    drawn = torch.empty(tensor.shape, dtype=torch.float32, device=device)
    tensor.copy_(drawn.normal_(0, std, generator=generator))


class Convolution(Piece):
    """A convolution; weight (O, I/groups, *size), optional bias (O,).

    gain: the default initialisation is uniform in +-gain / sqrt(fan-in), PyTorch's with 1.
    identity: the weight starts as the identity (OREPA's pointwise pairs).
    offset: the same, and the stored weight is the difference from the identity, hence 0 (DBB's
    and OREPA's `idconv1`); weight decay then pulls towards the identity.
    Raises: ValueError if groups do not divide the channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        size: Sizes,
        *,
        dilation: Sizes | None = None,
        groups: int = 1,
        bias: bool = False,
        gain: float = 1.0,
        identity: bool = False,
        offset: bool = False,
    ):
        super().__init__()
        if in_channels % groups or out_channels % groups:
            raise ValueError(
                f"in_channels (={in_channels}) and out_channels (={out_channels}) must be "
                f"divisible by groups (={groups})."
            )
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.dilation = tuple(dilation or (1,) * len(size))
        self.extent = tuple(d * (k - 1) + 1 for k, d in zip(size, self.dilation, strict=True))
        self.gain, self.offset, self.starts_as_identity = gain, offset, identity or offset
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels // groups, *size))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.redraw("default")

    @property
    def carries_bias(self) -> bool:
        return self.bias is not None

    @property
    def shifts(self) -> bool:
        return self.bias is not None

    def effective_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight that is convolved with: the stored one, plus the identity for an offset."""
        return self.effective(self.weight.to(dtype))

    def effective(self, weight: Tensor) -> Tensor:
        """What is convolved with where `weight` is stored."""
        return weight + self.identity_weight(weight.dtype) if self.offset else weight

    def identity_weight(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """The identity as a weight of this shape: input i of a group goes to channel i."""
        kernel = kernels.identity(
            self.in_channels, self.dims, dtype=dtype, device=self.weight.device
        )
        kernel = kernels.regrouped(kernel, self.groups)
        repeats = self.out_channels // self.in_channels  # more outputs than inputs: in turn
        weight = kernel.weight.view(self.groups, -1, *kernel.weight.shape[1:])
        weight = weight.repeat(1, repeats, *(1,) * (self.dims + 1)).flatten(0, 1)
        return kernels.resized(
            Kernel(weight, weight.new_zeros(len(weight)), self.groups),
            tuple(self.weight.shape[2:]),
            self.dilation,
        ).weight

    def run(self, x: Tensor, padding: Sizes, stride: Sizes) -> Tensor:
        x, padding = kernels.cropped(x, padding)
        pointwise = max(self.weight.shape[2:]) == 1 and max(padding) == 0 and max(stride) > 1
        if pointwise and self.in_channels < 8 and x.is_cpu:
            # The backward pass of such a convolution, channels last, writes past its memory
            # (uxlfoundation/oneDNN issue 6035), and may end the process.
            x, stride = x[(..., *(slice(None, None, s) for s in stride))], (1,) * self.dims
        return kernels.CONVOLUTION[self.dims](
            x, self.effective_weight(), self.bias, stride, padding, self.dilation, self.groups
        )

    def kernel(self, dtype: torch.dtype = torch.float64) -> Kernel:
        weight = self.effective_weight(dtype)
        bias = weight.new_zeros(self.out_channels) if self.bias is None else self.bias.to(dtype)
        return Kernel(weight, bias, self.groups, self.dilation)

    def put(self, kernel: Kernel, norm: str = "keep", stats: Statistics | None = None) -> None:
        kernel = kernels.resized(
            kernels.regrouped(kernel, self.groups), tuple(self.weight.shape[2:]), self.dilation
        )
        weight = kernel.weight - self.identity_weight() if self.offset else kernel.weight
        if self.bias is not None:
            self.bias.copy_(kernel.bias)
        elif kernel.bias.abs().max() > 0:  # not true of nan: a diverged network stays one
            raise ValueError("a convolution without bias, and without a norm, cannot take a bias.")
        self.weight.copy_(weight)

    @torch.no_grad()
    def redraw(self, rule: str, generator: torch.Generator | None = None, last: bool = False):
        fan_in = math.prod(self.weight.shape[1:])
        if self.offset:
            self.weight.zero_()
        elif self.starts_as_identity:
            self.weight.copy_(self.identity_weight())
        elif rule == "repan":
            uniform_(self.weight, 0.1 / math.sqrt(self.out_channels), generator)
        elif rule == "fan_out":
            fan_out = self.out_channels * math.prod(self.weight.shape[2:])
            normal_(self.weight, math.sqrt(2 / fan_out), generator)
        else:
            uniform_(self.weight, self.gain / math.sqrt(fan_in), generator)
        if self.bias is not None:
            if rule == "default":
                uniform_(self.bias, 1 / math.sqrt(fan_in), generator)
            else:
                self.bias.zero_()


class PointwisePiece(Piece):
    """A per-channel map: alone, it crops, pads and strides its input first."""

    def run(self, x: Tensor, padding: Sizes, stride: Sizes) -> Tensor:
        x, padding = kernels.cropped(x, padding)
        if max(padding):
            x = F.pad(x, [amount for p in reversed(padding) for amount in (p, p)])
        if max(stride) > 1:
            x = x[(..., *(slice(None, None, s) for s in stride))]
        return self.apply_to(x)

    def apply_to(self, x: Tensor) -> Tensor:
        """The map on a feature map, without any geometry."""
        raise NotImplementedError


class Norm(PointwisePiece):
    """Batch normalisation, y = gamma (x - mean) / sqrt(var + eps) + beta; as `.norm`.

    It wraps the layer, so that converting it to SyncBatchNorm keeps the tree.
    """

    carries_bias = shifts = True

    initial = 1.0  # the slope to begin with

    def __init__(
        self,
        channels: int,
        dims: int,
        *,
        eps: float = 1e-5,
        momentum: float = 0.1,
        initial: float = 1.0,
    ):
        super().__init__()
        self.in_channels = self.out_channels = channels
        self.extent = (1,) * dims
        self.norm = BATCH_NORM[dims](channels, eps=eps, momentum=momentum)
        if initial != 1:
            self.initial = initial
            nn.init.constant_(self.norm.weight, initial)

    def apply_to(self, x: Tensor) -> Tensor:
        return self.norm(x)

    def affine(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """(factor, shift) of the eval-mode map y = factor x + shift; each (channels,)."""
        norm = self.norm
        if norm.running_var is None:
            raise ValueError("a norm without running statistics has no eval-mode kernel.")
        factor = (norm.running_var.to(dtype) + norm.eps).rsqrt()
        if norm.weight is not None:
            factor = factor * norm.weight.to(dtype)
        shift = -norm.running_mean.to(dtype) * factor
        return factor, shift if norm.bias is None else shift + norm.bias.to(dtype)

    def act(self, kernel: Kernel) -> Kernel:
        return kernels.scaled(kernel, *self.affine(kernel.weight.dtype))

    def at_constant(self, value: Tensor | None) -> Tensor:
        factor, shift = self.affine()
        return shift if value is None else factor * value + shift

    def undo(self, kernel: Kernel, norm: str, stats: Statistics | None, bias_below: bool) -> Kernel:
        """Divide by the norm (RepAn's inversion; Ding et al.'s fusion, backwards).

        `norm` is one of `NORM_AT_RESTORE`. The bias goes into beta, or, where the convolution
        below has one, down to it. Running statistics change for "reset" and "match" only.
        """
        layer = self.norm
        if layer.weight is None:
            raise ValueError("a norm without slope and shift cannot be undone.")
        bare = Kernel(kernel.weight, torch.zeros_like(kernel.bias), kernel.groups, kernel.dilation)
        if norm == "match":
            if stats is None:
                raise ValueError("norm='match' needs `stats`: kernel -> (mean, variance).")
            mean, var = (value.to(kernel.weight) for value in stats(bare))
            layer.running_mean.copy_(mean)
            layer.running_var.copy_(var)
            layer.weight.copy_((layer.running_var.double() + layer.eps).sqrt())
            # Slope and deviation are rounded to the layer's dtype: undo what is really stored.
            bias_below = False
        elif norm == "reset":
            layer.running_mean.zero_()
            layer.running_var.fill_(1)
            layer.num_batches_tracked.zero_()
        if norm in ("unit", "reset"):
            layer.weight.fill_(1)
        elif norm == "keep":
            layer.weight.masked_fill_(layer.weight.abs() < MIN_SLOPE, 1)
        if bias_below:
            layer.bias.zero_()
        else:
            layer.bias.zero_()
            _, shift = self.affine()
            layer.bias.copy_(kernel.bias - shift)
        factor, shift = self.affine()
        residue = kernel.bias - shift if bias_below else torch.zeros_like(kernel.bias)
        return kernels.scaled(
            Kernel(kernel.weight, residue, kernel.groups, kernel.dilation), 1 / factor
        )

    @torch.no_grad()
    def redraw(self, rule: str, generator: torch.Generator | None = None, last: bool = False):
        if self.norm.weight is not None:
            slopes = {"default": self.initial, "fan_out": 0.01 if last else 1}
            self.norm.weight.fill_(slopes.get(rule, 1))
            self.norm.bias.zero_()
        if rule != "repan":
            self.norm.reset_running_stats()

    def calibrate(self) -> Norm:
        """Forget the statistics; from now on train-mode batches count with equal weight."""
        self.norm.reset_running_stats()
        self.norm.momentum = None
        return self


class Scale(PointwisePiece):
    """A per-channel factor (OREPA's `vector`, RepOptimizers' constant scales)."""

    stored = "weight"  # the name of its parameter

    def __init__(self, channels: int, dims: int, initial: float = 1.0, trainable: bool = True):
        super().__init__()
        self.in_channels = self.out_channels = channels
        self.extent = (1,) * dims
        self.initial = initial
        value = nn.Parameter(torch.full(self.shape, initial), requires_grad=trainable)
        self.register_parameter(self.stored, value)

    @property
    def shape(self) -> Sizes:
        """Of its parameter."""
        return (self.out_channels,)

    @property
    def parameter(self) -> nn.Parameter:
        """What is trained."""
        return getattr(self, self.stored)

    def apply_to(self, x: Tensor) -> Tensor:
        # Under autocast the factor is float32; the map stays what it is, as behind a norm.
        return (x * self.weight.view((-1,) + (1,) * self.dims)).to(x.dtype)

    def act(self, kernel: Kernel) -> Kernel:
        return kernels.scaled(kernel, self.weight.to(kernel.weight.dtype))

    def undo(self, kernel: Kernel, norm: str, stats: Statistics | None, bias_below: bool) -> Kernel:
        """Divide by the factor; one near 0 is first set back to its initial value."""
        dead = self.parameter.abs() < MIN_SLOPE
        self.parameter.masked_fill_(dead, self.initial or 1.0)
        return kernels.scaled(kernel, 1 / self.weight.to(kernel.weight.dtype))

    @torch.no_grad()
    def redraw(self, rule: str, generator: torch.Generator | None = None, last: bool = False):
        if rule == "default" and self.parameter.requires_grad:
            self.parameter.fill_(self.initial)


class Scalar(Scale):
    """One factor for all channels; its `weight` repeats it for each."""

    stored = "value"
    shape: Sizes = ()

    @property
    def weight(self) -> Tensor:
        return self.value.expand(self.out_channels)


class Filter(Piece):
    """A fixed filter per channel, (channels, *size): a depthwise convolution that never learns."""

    def __init__(self, weight: Tensor, dilation: Sizes | None = None):
        super().__init__()
        self.in_channels = self.out_channels = len(weight)
        size = weight.shape[1:]
        self.dilation = tuple(dilation or (1,) * len(size))
        self.extent = tuple(d * (k - 1) + 1 for k, d in zip(size, self.dilation, strict=True))
        self.register_buffer("weight", weight.unsqueeze(1))

    def run(self, x: Tensor, padding: Sizes, stride: Sizes) -> Tensor:
        x, padding = kernels.cropped(x, padding)
        return kernels.CONVOLUTION[self.dims](
            x, self.weight, None, stride, padding, self.dilation, self.in_channels
        )

    def kernel(self, dtype: torch.dtype = torch.float64) -> Kernel:
        weight = self.weight.to(dtype)
        bias = weight.new_zeros(self.out_channels)
        return Kernel(weight, bias, self.in_channels, self.dilation)


class AveragePool(Filter):
    """Average pooling; padded zeros count, otherwise it is no convolution (DBB, transform V)."""

    def __init__(self, channels: int, size: Sizes, dilation: Sizes | None = None):
        super().__init__(torch.full((channels, *size), 1 / math.prod(size)), dilation)
        # A constant: it follows .to(), and stays out of checkpoints.
        self.register_buffer("weight", self.weight, persistent=False)

    def kernel(self, dtype: torch.dtype = torch.float64) -> Kernel:
        exact = torch.full_like(self.weight, 1 / self.weight[0].numel(), dtype=dtype)
        return Kernel(exact, exact.new_zeros(self.out_channels), self.in_channels, self.dilation)

    def run(self, x: Tensor, padding: Sizes, stride: Sizes) -> Tensor:
        size = tuple(self.weight.shape[2:])
        plain = max(self.dilation) == 1 and all(
            2 * p <= k for p, k in zip(padding, size, strict=True)
        )
        if not plain or min(padding) < 0:
            return kernels.convolve(x, self.kernel(x.dtype), padding, stride)
        # In 3-D a processor knows no lower precision, and autocast gives float32.
        wide = x.float() if self.dims == 3 and x.is_cpu and x.dtype.itemsize < 4 else x
        return AVERAGE_POOL[self.dims](wide, size, stride, padding).to(x.dtype)


class Chain(nn.Sequential, Piece):
    """Pieces one after the other.

    Padding is one rule: the chain is padded once, before its first spatial piece, with the value
    that the pieces before it give a zero input (for a norm: by its running statistics after the
    update, detached; DBB's "BN-and-pad"). It is strided at its last spatial piece. Without a
    spatial piece both happen at the first piece.
    """

    def __init__(self, *pieces: Piece):
        super().__init__(*pieces)
        for before, after in pairwise(pieces):
            if before.out_channels != after.in_channels:
                raise ValueError(
                    f"{type(before).__name__} gives {before.out_channels} channels, "
                    f"{type(after).__name__} after it takes {after.in_channels}."
                )
        self.in_channels, self.out_channels = pieces[0].in_channels, pieces[-1].out_channels
        self.extent = tuple(
            sum(e - 1 for e in axis) + 1 for axis in zip(*(p.extent for p in pieces), strict=True)
        )

    forward = Piece.forward

    def run(self, x: Tensor, padding: Sizes, stride: Sizes) -> Tensor:
        spatial = [i for i, piece in enumerate(self) if max(piece.extent) > 1] or [0]
        nothing, one = (0,) * self.dims, (1,) * self.dims
        for i, piece in enumerate(self):
            here = nothing
            if i == spatial[0]:
                x, here = kernels.cropped(x, padding)
                value = self.value_at_zero(i) if max(here) else None
                if value is not None:
                    x, here = padded_with(x, here, value), nothing
            x = piece.run(x, here, stride if i == spatial[-1] else one)
        return x

    @torch.no_grad()
    def value_at_zero(self, end: int) -> Tensor | None:
        """What the first `end` pieces make of a zero input, (channels,); None is 0."""
        value = None
        for piece in self[:end] if end else ():
            value = piece.at_constant(value)
        return value

    def __getitem__(self, index):
        # nn.Sequential would build a new Chain for a slice; a list of the pieces is enough.
        return list(self.children())[index]

    def kernel(self, dtype: torch.dtype = torch.float64) -> Kernel:
        kernel = self[0].kernel(dtype)
        for piece in self[1:]:
            kernel = piece.act(kernel)
        return kernel

    def act(self, kernel: Kernel) -> Kernel:
        for piece in self:
            kernel = piece.act(kernel)
        return kernel

    def at_constant(self, value: Tensor | None) -> Tensor | None:
        for piece in self:
            value = piece.at_constant(value)
        return value

    @property
    def shifts(self) -> bool:
        return any(piece.shifts for piece in self)

    @property
    def carries_bias(self) -> bool:
        return any(piece.carries_bias for piece in self)

    @property
    def invertible(self) -> bool:
        return self[0].invertible and all(piece.undoable for piece in self[1:])

    def put(self, kernel: Kernel, norm: str = "keep", stats: Statistics | None = None) -> None:
        for piece in reversed(self[1:]):
            kernel = piece.undo(kernel, norm, stats, self[0].carries_bias)
        self[0].put(kernel, norm, stats)

    def redraw(self, rule: str, generator: torch.Generator | None = None, last: bool = True):
        for piece in self:
            piece.redraw(rule, generator, last=last and piece is self[-1])


def padded_with(x: Tensor, padding: Sizes, value: Tensor) -> Tensor:
    """x with a border of `value` per channel; the gradient of the border is not followed.

    In the memory format of x. The border is added to the zeros of an ordinary padding, which is
    exact: a number plus 0 is that number.
    """
    amounts = [amount for p in reversed(padding) for amount in (p, p)]
    frame = F.pad(x.new_zeros(x.shape[2:]), amounts, value=1.0)
    return F.pad(x, amounts).add_(frame * value.to(x.dtype).view((-1,) + (1,) * len(padding)))


class Sum(Piece):
    """Named branches side by side, aligned at their centres; `main` takes the kernel at `put`.

    A branch of extent e in a sum of extent E and padding p is padded by p - (E - e) / 2.
    squeezed: the kernels are summed first and convolved once (OREPA); branches then have no norm.
    """

    def __init__(self, branches: dict[str, Piece], main: str, *, squeezed: bool = False):
        super().__init__()
        self.branches = nn.ModuleDict(branches)
        self.main, self.squeezed = main, squeezed
        first = next(iter(branches.values()))
        self.in_channels, self.out_channels = first.in_channels, first.out_channels
        extents = [branch.extent for branch in branches.values()]
        self.extent = tuple(max(axis) for axis in zip(*extents, strict=True))
        for name, branch in branches.items():
            if (branch.in_channels, branch.out_channels) != (self.in_channels, self.out_channels):
                raise ValueError(
                    f"branch {name!r} maps {branch.in_channels} channels to "
                    f"{branch.out_channels}, the others {self.in_channels} to {self.out_channels}."
                )
            if any((big - e) % 2 for big, e in zip(self.extent, branch.extent, strict=True)):
                raise ValueError(
                    f"branch {name!r} of extent {branch.extent} cannot be centred in extent "
                    f"{self.extent}: they must both be odd or both be even on every axis."
                )

    @property
    def main_branch(self) -> Piece:
        """The branch that takes the kernel."""
        return self.branches[self.main]

    @property
    def side_branches(self) -> dict[str, Piece]:
        """The branches other than the main one, by name."""
        return {name: branch for name, branch in self.branches.items() if name != self.main}

    def weighted(self, main: Tensor, side: Tensor) -> Tensor:
        """How the outputs of the main branch and of the others combine: here, they add."""
        return main + side

    def run(self, x: Tensor, padding: Sizes, stride: Sizes) -> Tensor:
        if self.squeezed:
            # A kernel is made in full precision; meta tensors have no autocast to turn off.
            with nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
                kernel = self.branches_kernel(next(self.parameters()).dtype)
            return kernels.convolve(x, kernel, padding, stride)

        def out(branch: Piece) -> Tensor:
            return branch.run(x, self.aligned(branch, padding), stride)

        main, sides = out(self.main_branch), self.side_branches.values()
        return self.weighted(main, reduce(add, map(out, sides))) if sides else main

    def aligned(self, branch: Piece, padding: Sizes) -> Sizes:
        """The padding with which a branch lies on the centre of the sum; see the class."""
        axes = zip(padding, self.extent, branch.extent, strict=True)
        return tuple(p - (big - e) // 2 for p, big, e in axes)

    def kernel(self, dtype: torch.dtype = torch.float64) -> Kernel:
        return self.branches_kernel(dtype)

    def branches_kernel(self, dtype: torch.dtype = torch.float64) -> Kernel:
        """The sum of the branches as one kernel."""
        main, side = self.main_branch.kernel(dtype), self.side_kernel(dtype)
        return main if side is None else main + side

    def side_kernel(self, dtype: torch.dtype = torch.float64) -> Kernel | None:
        """The side branches as one kernel, before any rate; None where there is none."""
        sides = [branch.kernel(dtype) for branch in self.side_branches.values()]
        return reduce(add, sides) if sides else None

    @property
    def shifts(self) -> bool:
        return any(branch.shifts for branch in self.branches.values())

    @property
    def carries_bias(self) -> bool:
        return self.main_branch.carries_bias

    @property
    def invertible(self) -> bool:
        return self.main_branch.invertible and self.main_branch.extent == self.extent

    def put(self, kernel: Kernel, norm: str = "keep", stats: Statistics | None = None) -> None:
        side = self.side_kernel(kernel.weight.dtype)
        self.main_branch.put(kernel if side is None else kernel - side, norm, stats)

    def redraw(self, rule: str, generator: torch.Generator | None = None, last: bool = True):
        for branch in self.branches.values():
            branch.redraw(rule, generator, last=True)
