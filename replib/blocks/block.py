"""RepBlock: a sum of branches with a main one, a rate on the others, and an optional post-norm.

    y = post_norm( main(x) + rate * (sum of the side branches)(x) )

A family of blocks is a subclass that declares its branches, in 3 to 15 lines, with the pieces
that `Geometry` builds; merging, restoring, redrawing and deploying are inherited.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from replib import kernels, sharing
from replib.blocks.ends import left_out, with_ends
from replib.branches import (
    NORM_AT_RESTORE,
    RULES,
    AveragePool,
    Convolution,
    Norm,
    Piece,
    Scale,
    Sizes,
    Statistics,
    Sum,
)
from replib.kernels import Kernel

CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}
PLAIN = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


def per_axis(name: str, value: int | Sizes, dims: int, least: int) -> Sizes:
    """`value` as one integer per axis; ValueError with the values where it cannot be."""
    sizes = (value,) * dims if isinstance(value, int) else tuple(value)
    if len(sizes) != dims or any(not isinstance(v, int) or v < least for v in sizes):
        raise ValueError(
            f"{name} (={value!r}) must be an integer of at least {least}, or {dims} of them."
        )
    return sizes


@dataclass(frozen=True)
class Geometry:
    """What a block is asked for, and the pieces a family declares from it."""

    in_channels: int
    out_channels: int
    kernel_size: Sizes
    stride: Sizes
    padding: Sizes
    dilation: Sizes
    groups: int
    dims: int

    @property
    def keeps_shape(self) -> bool:
        """Whether an identity branch is possible: same channels, stride 1."""
        return self.in_channels == self.out_channels and max(self.stride) == 1

    @property
    def depthwise(self) -> bool:
        return self.groups == self.in_channels

    def conv(self, size: int | Sizes | None = None, **changes) -> Convolution:
        """A convolution of the block's channels, groups and dilation; size: the block's kernel.

        changes: other arguments of `Convolution`.
        """
        size = self.kernel_size if size is None else per_axis("size", size, self.dims, 1)
        channels = {"in_channels": self.in_channels, "out_channels": self.out_channels}
        arguments = channels | {"groups": self.groups, "dilation": self.dilation} | changes
        return Convolution(size=size, **arguments)

    def norm(self, channels: int | None = None, **changes) -> Norm:
        return Norm(channels or self.out_channels, self.dims, **changes)

    def scale(self, initial: float = 1.0, channels: int | None = None, **options) -> Scale:
        return Scale(channels or self.out_channels, self.dims, initial, **options)

    def average_pool(self, channels: int | None = None) -> AveragePool:
        return AveragePool(channels or self.out_channels, self.kernel_size, self.dilation)

    def identity(self, channels: int | None = None) -> AveragePool:
        """The input as it is: its average over one pixel."""
        return AveragePool(channels or self.in_channels, (1,) * self.dims)


# What a block may be asked for beyond a plain 2-D convolution; `RepBlock.cannot` refuses some.
FEATURES: dict[str, Callable[[Geometry], bool]] = {
    "1-D": lambda g: g.dims == 1,
    "3-D": lambda g: g.dims == 3,
    "groups": lambda g: g.groups > 1 and not g.depthwise,
    "depthwise": lambda g: g.groups > 1 and g.depthwise,
    "stride": lambda g: max(g.stride) > 1,
    "dilation": lambda g: max(g.dilation) > 1 and max(g.kernel_size) > 1,
    "kernel of 1": lambda g: max(g.kernel_size) == 1,
    "larger kernel": lambda g: max(g.kernel_size) > 1,
    "even kernel": lambda g: any(k % 2 == 0 for k in g.kernel_size),
    "rectangular kernel": lambda g: len(set(g.kernel_size)) > 1,
}
COMMON = ("norms", "scaling", "without")  # options that every family has
OFF_CENTRE = {"even kernel": "its smaller branches have no centre there; take an odd size"}


class RepBlock(Sum):
    """A re-parameterizable convolution, without activation: affine in eval mode.

    Shapes: (N, in_channels, *space) -> (N, out_channels, *space'), as nn.Conv1d/2d/3d with the
    same arguments. Sizes are integers or one per axis; padding None is centred.
    `rate` (lambda) multiplies the side branches; it is a 0-dim buffer, since it changes the
    function and so belongs in the checkpoint.
    norms, scaling: where norms stand, and what ends a branch without one; keys of
    `replib.blocks.ends.NORMS` and `SCALINGS`, None as the family declares.
    without: names of branches to leave out; the others are drawn as if it were there.
    Raises: ValueError for channels that groups do not divide, and for options that the family
    does not have.
    """

    version: ClassVar[int] = 1  # raise when the numbers of this family change
    main_name: ClassVar[str] = "main"  # the branch that takes the kernel
    post_normed: ClassVar[bool] = False  # one norm after the sum (OREPA, RepOptimizers)
    squeezable: ClassVar[bool] = False  # the kernel is made first, then convolved once (OREPA)
    norm_at_restore: ClassVar[str] = "unit"  # of NORM_AT_RESTORE
    cannot: ClassVar[dict[str, str]] = {}  # of FEATURES: the reason, and the way out
    default_kernel_size: ClassVar[int] = 3
    shared: bool = True  # train mode: branches share work; False: branch by branch, the reference
    folded: bool = False  # and norms are folded into the kernels around them: less is saved

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sizes | None = None,
        stride: int | Sizes = 1,
        padding: int | Sizes | None = None,
        dilation: int | Sizes = 1,
        groups: int = 1,
        dims: int = 2,
        padding_mode: str = "zeros",
        norms: str | None = None,
        scaling: str | None = None,
        without: Collection[str] = (),
        **options,
    ):
        family = type(self).__name__
        if dims not in PLAIN:
            raise ValueError(f"dims (={dims!r}) must be 1, 2 or 3.")
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(
                f"in_channels (={in_channels}) and out_channels (={out_channels}) must be "
                f"divisible by groups (={groups})."
            )
        if padding_mode not in PADDING_MODES:
            raise ValueError(
                f"padding_mode (={padding_mode!r}) must be one of {', '.join(PADDING_MODES)}."
            )
        unknown = sorted(set(options) - set(self.options()))
        if unknown:
            known = ", ".join(self.options()) or "none"
            raise ValueError(f"{family} has no option {unknown[0]!r}; its options: {known}.")
        kernel_size = self.default_kernel_size if kernel_size is None else kernel_size
        size = per_axis("kernel_size", kernel_size, dims, 1)
        dilation = per_axis("dilation", dilation, dims, 1)
        if padding is None:
            padding = tuple(d * (k - 1) // 2 for k, d in zip(size, dilation, strict=True))
        geometry = Geometry(
            in_channels,
            out_channels,
            size,
            per_axis("stride", stride, dims, 1),
            per_axis("padding", padding, dims, 0),
            dilation,
            groups,
            dims,
        )
        for feature, reason in self.cannot.items():
            if FEATURES[feature](geometry):
                raise ValueError(
                    f"{family} has no {feature} (kernel_size={size}, groups={groups}, "
                    f"dims={dims}): {reason}."
                )
        branches = self.declare(geometry, **options)
        if without:
            square = replace(geometry, out_channels=in_channels, stride=(1,) * dims)
            with torch.device("meta"):  # of that shape it has all branches that it may have
                known = self.declare(square, **options)
            branches = left_out(branches, without, known, self.main_name)
        branches = with_ends(branches, norms, scaling)
        squeezed = self.squeezable and norms != "branches"
        super().__init__(branches, self.main_name, squeezed=squeezed)
        want = tuple(d * (k - 1) + 1 for k, d in zip(size, dilation, strict=True))
        if self.extent != want:
            raise ValueError(f"{family}: branches see {self.extent} pixels, the block {want}.")
        self.geometry, self.padding_mode = geometry, padding_mode
        follows = self.post_normed if norms is None else norms == "sum"
        self.post_norm = geometry.norm() if follows else None
        self.register_buffer("rate", torch.ones(()))

    # -- what a family declares -----------------------------------------------------------------
    def declare(self, g: Geometry, **options) -> dict[str, Piece]:
        """The branches by name. Keyword arguments with defaults are the family's options."""
        raise NotImplementedError

    @classmethod
    def options(cls) -> list[str]:
        """The names of the family's own options, then of those that every family has."""
        return [*list(inspect.signature(cls.declare).parameters)[2:], *COMMON]

    # -- what every block does ------------------------------------------------------------------
    def forward(self, input: Tensor) -> Tensor:  # the argument's name is that of nn.Conv2d
        return self.run(*self.padded(input), self.geometry.stride)

    def padded(self, x: Tensor) -> tuple[Tensor, Sizes]:
        """x, and the zeros that are still to be put around it; other modes of padding are done."""
        g = self.geometry
        if self.padding_mode == "zeros":
            return x, g.padding
        # Every branch is aligned in the same padded input, so other modes need no more than this.
        amounts = [amount for p in reversed(g.padding) for amount in (p, p)]
        return F.pad(x, amounts, self.padding_mode), (0,) * g.dims

    def branch_outputs(self, x: Tensor) -> dict[str, Tensor]:
        """What every branch makes of an input of the block: name -> (N, out_channels, *space').

        Without the rate, and before a norm that follows the sum.
        """
        (x, padding), stride = self.padded(x), self.geometry.stride
        return {
            name: branch.run(x, self.aligned(branch, padding), stride)
            for name, branch in self.branches.items()
        }

    def run(self, x: Tensor, padding: Sizes, stride: Sizes) -> Tensor:
        if self.shared and self.training and sharing.applies(self, x):
            out = sharing.run(self, x, padding, stride)
        else:
            out = super().run(x, padding, stride)
        return out if self.post_norm is None else self.post_norm(out)

    @property
    def shifts(self) -> bool:
        return self.post_norm is not None or super().shifts

    def weighted(self, main: Tensor, side: Tensor) -> Tensor:
        return torch.addcmul(main, side, self.rate.to(side.dtype))  # one pass over the map

    def branches_kernel(
        self, dtype: torch.dtype = torch.float64, rate: float | None = None
    ) -> Kernel:
        main, side = self.main_branch.kernel(dtype), self.side_kernel(dtype)
        if side is None:
            return main
        rate = self.rate if rate is None else torch.as_tensor(rate, dtype=dtype)
        rate = rate.to(self.rate.device, dtype)
        # A factor per channel, since torch.compile fails at a Kernel times a tensor.
        return main + kernels.scaled(side, rate.expand(side.out_channels))

    def kernel(self, dtype: torch.dtype = torch.float64, rate: float | None = None) -> Kernel:
        """The whole block as one kernel in `dtype`; `rate` replaces lambda."""
        kernel = self.branches_kernel(dtype, rate)
        return kernel if self.post_norm is None else self.post_norm.act(kernel)

    def merged(self, rate: float | None = None) -> Kernel:
        """The block in eval mode as one kernel (O, I/G, *k), in the block's dtype.

        Folded in float64; differentiable. `rate` replaces lambda: RepAn's released merge takes 1
        whatever lambda is. Source: RepVGG section 3.3, DBB section 3.2, RepAn (Rep).
        """
        return self.in_own_form(self.kernel(rate=rate)).to(next(self.parameters()).dtype)

    def in_own_form(self, kernel: Kernel) -> Kernel:
        """`kernel` with the size, dilation and groups of this block."""
        g = self.geometry
        return kernels.resized(kernels.regrouped(kernel, g.groups), g.kernel_size, g.dilation)

    @torch.no_grad()
    def deploy(self) -> nn.Module:
        """A new plain convolution with bias that computes what this block does in eval mode.

        On the device, in the dtype and in the memory format of the block.
        """
        g, kernel = self.geometry, self.merged()
        with torch.random.fork_rng(devices=[]):  # its initialisation is overwritten at once
            conv = PLAIN[g.dims](
                g.in_channels,
                g.out_channels,
                g.kernel_size,
                g.stride,
                g.padding,
                g.dilation,
                g.groups,
                padding_mode=self.padding_mode,
                dtype=kernel.weight.dtype,
            ).to(kernel.weight.device)
        spread = any(not p.is_contiguous() for p in self.parameters())  # channels come last
        if spread and g.dims in CHANNELS_LAST:
            conv = conv.to(memory_format=CHANNELS_LAST[g.dims])
        conv.weight.copy_(kernel.weight)
        conv.bias.copy_(kernel.bias)
        return conv.train(self.training)

    @torch.no_grad()
    def set_rate(self, value: float) -> None:
        """Set lambda, the factor on the side branches."""
        self.rate.fill_(value)

    def redraw(
        self,
        rule: str = "repan",
        generator: torch.Generator | None = None,
        last: bool | None = None,
    ) -> None:
        """Draw the side branches anew by a rule of `replib.branches.RULES`; main stays.

        `last` is given by the branch of another block that this one is a part of: then all is
        drawn.
        """
        if rule not in RULES:
            raise ValueError(f"rule (={rule!r}) must be one of {', '.join(RULES)}.")
        for branch in (self.side_branches if last is None else self.branches).values():
            branch.redraw(rule, generator, last=True)

    def put(self, kernel: Kernel, norm: str = "keep", stats: Statistics | None = None) -> None:
        """As a part of another block: become `kernel` whatever the side branches are."""
        self.restore(kernel, "preserving", norm, stats)

    @torch.no_grad()
    def restore(
        self,
        kernel: Kernel,
        fidelity: str = "official",
        norm: str | None = None,
        stats: Statistics | None = None,
    ) -> None:
        """Put `kernel` back into the main branch (RepAn: inversion, or restoration).

        official: the main branch takes the whole kernel, the side branches come on top of it.
        preserving: it takes the kernel less rate * side branches, so that `merged()` is `kernel`.
        A squeezed block always subtracts: its branches share one norm and are one convolution.
        norm: a key of `NORM_AT_RESTORE`, by default the family's; "match" calls
        stats(kernel without bias) -> (mean, variance), each (O,), of what will enter the norm.
        Raises: ValueError for other values; TypeError for a block that cannot be inverted.
        """
        norm = self.norm_at_restore if norm is None else norm
        if fidelity not in ("official", "preserving"):
            raise ValueError(f"fidelity (={fidelity!r}) must be 'official' or 'preserving'.")
        if norm not in NORM_AT_RESTORE:
            raise ValueError(f"norm (={norm!r}) must be one of {', '.join(NORM_AT_RESTORE)}.")
        if not self.invertible:
            raise TypeError(
                f"{type(self).__name__} cannot take a kernel: its main branch "
                f"{self.main!r} is not invertible. Leave it as it is."
            )
        kernel = kernel.to(torch.float64)
        if self.post_norm is not None:
            kernel = self.post_norm.undo(kernel, norm, stats, self.main_branch.carries_bias)
        side = self.side_kernel()
        if side is not None and (fidelity == "preserving" or self.squeezed):
            kernel = kernel - side * self.rate.double()
        self.main_branch.put(kernel, norm, stats)

    def extra_repr(self) -> str:
        g = self.geometry
        return (
            f"{g.in_channels}, {g.out_channels}, kernel_size={g.kernel_size}, stride={g.stride}, "
            f"padding={g.padding}, dilation={g.dilation}, groups={g.groups}"
        )
