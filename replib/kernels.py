"""The exact identities of structural re-parameterization, as pure functions on `Kernel`.

A convolution is linear in its kernel, so a tree of convolutions, norms in eval mode, poolings and
sums is itself one convolution. Everything here works in 1-D, 2-D and 3-D, for any grouping and
dilation, is differentiable, and computes in the dtype that it is given (callers fold in float64).

Notation: O output channels, I input channels, G groups, k kernel size per axis; a weight has
shape (O, I/G, *k), output channel o belongs to group o // (O/G). All convolutions are
cross-correlations, as in PyTorch.

Sources: Ding et al., "Diverse Branch Block", CVPR 2021, section 3.2 (transforms I to VI), and
Ding et al., "RepVGG", CVPR 2021, section 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor

CONVOLUTION = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True)
class Kernel:
    """One convolution: weight (O, I/groups, *size), bias (O,), groups, dilation per axis.

    `a + b` and `a - b` centre the smaller kernel in the larger one and write both with the
    groups and the dilation they have in common; `a * rate` scales weight and bias.
    """

    weight: Tensor
    bias: Tensor
    groups: int = 1
    dilation: tuple[int, ...] = ()

    def __post_init__(self):
        # An axis of size 1 has no dilation: normalising it makes kernels comparable.
        given = self.dilation or (1,) * self.dims
        clean = tuple(d if k > 1 else 1 for d, k in zip(given, self.size, strict=True))
        object.__setattr__(self, "dilation", clean)

    @property
    def dims(self) -> int:
        return self.weight.dim() - 2

    @property
    def size(self) -> tuple[int, ...]:
        return tuple(self.weight.shape[2:])

    @property
    def in_channels(self) -> int:
        return self.weight.shape[1] * self.groups

    @property
    def out_channels(self) -> int:
        return self.weight.shape[0]

    def to(self, *args, **kwargs) -> Kernel:
        """The same kernel in another dtype or on another device (arguments of `Tensor.to`)."""
        weight, bias = self.weight.to(*args, **kwargs), self.bias.to(*args, **kwargs)
        return Kernel(weight, bias, self.groups, self.dilation)

    def __add__(self, other: Kernel) -> Kernel:
        a, b = alike(self, other)
        return Kernel(a.weight + b.weight, a.bias + b.bias, a.groups, a.dilation)

    def __sub__(self, other: Kernel) -> Kernel:
        return self + other * -1

    def __mul__(self, rate: float | Tensor) -> Kernel:
        return Kernel(self.weight * rate, self.bias * rate, self.groups, self.dilation)


def identity(channels: int, dims: int, *, dtype=torch.float64, device=None) -> Kernel:
    """The map x -> x as a depthwise kernel of size 1 (groups = channels)."""
    weight = torch.ones((channels, 1) + (1,) * dims, dtype=dtype, device=device)
    return Kernel(weight, weight.new_zeros(channels), groups=channels)


def scaled(kernel: Kernel, factor: Tensor, shift: Tensor | None = None) -> Kernel:
    """`kernel` followed by y -> factor y + shift per channel; factor and shift (O,).

    With factor = gamma / sqrt(var + eps) and shift = beta - mean factor this folds a norm in eval
    mode (DBB, transform I).
    """
    weight = kernel.weight * factor.view((-1, 1) + (1,) * kernel.dims)
    bias = kernel.bias * factor if shift is None else kernel.bias * factor + shift
    return Kernel(weight, bias, kernel.groups, kernel.dilation)


def regrouped(kernel: Kernel, groups: int) -> Kernel:
    """The same map written with fewer groups; `groups` divides `kernel.groups`.

    Identity (DBB; RepVGG figure 4) and average pooling (DBB, transform V) are depthwise kernels,
    so this one function gives both in any grouping.
    """
    if groups == kernel.groups:
        return kernel
    if kernel.groups % groups:
        raise ValueError(
            f"groups (={groups}) must divide the kernel's groups (={kernel.groups}): a map with "
            f"{kernel.groups} groups cannot be written with {groups}."
        )
    ratio = kernel.groups // groups  # old groups that become the blocks of one new group
    out_channels, slots = kernel.weight.shape[:2]
    blocks = kernel.weight.reshape(groups, ratio, -1, 1, slots, *kernel.size)
    diagonal = torch.eye(ratio, dtype=kernel.weight.dtype, device=kernel.weight.device)
    spread = blocks * diagonal.view(1, ratio, 1, ratio, 1, *(1,) * kernel.dims)
    weight = spread.reshape(out_channels, ratio * slots, *kernel.size)
    return Kernel(weight, kernel.bias, groups, kernel.dilation)


def resized(kernel: Kernel, size: tuple[int, ...], dilation: tuple[int, ...]) -> Kernel:
    """The same map, centred in a kernel of `size` and `dilation` (DBB, transform VI).

    Raises: ValueError where the taps of the kernel do not fall on the taps of the new one.
    """
    if (kernel.size, kernel.dilation) == (tuple(size), tuple(dilation)):
        return kernel
    weight = kernel.weight
    for axis, (k, d, new_k, new_d) in enumerate(
        zip(kernel.size, kernel.dilation, size, dilation, strict=True)
    ):
        step = 1 if k == 1 else d // new_d
        spread = (k - 1) * step + 1
        if (k > 1 and d % new_d) or spread > new_k or (new_k - spread) % 2:
            raise ValueError(
                f"a kernel of size {k} and dilation {d} does not fit centred in one of size "
                f"{new_k} and dilation {new_d} (axis {axis})."
            )
        if step > 1:
            shape = list(weight.shape)
            shape[2 + axis] = spread
            index = torch.arange(k, device=weight.device) * step
            weight = weight.new_zeros(shape).index_copy(2 + axis, index, weight)
        margin = (new_k - spread) // 2
        if margin:
            # F.pad counts axes from the last one.
            weight = F.pad(weight, (0, 0) * (kernel.dims - 1 - axis) + (margin, margin))
    return Kernel(weight, kernel.bias, kernel.groups, tuple(dilation))


def common_dilation(a: Kernel, b: Kernel) -> tuple[int, ...]:
    """The largest dilation, per axis, in which both kernels can be written."""
    pairs = zip(a.size, a.dilation, b.size, b.dilation, strict=True)
    return tuple(db if ka == 1 else da if kb == 1 else gcd(da, db) for ka, da, kb, db in pairs)


def sizes_at(kernel: Kernel, dilation: tuple[int, ...]) -> tuple[int, ...]:
    """The size of the kernel when it is written with a smaller dilation."""
    pairs = zip(kernel.size, kernel.dilation, dilation, strict=True)
    return tuple((k - 1) * (d // new) + 1 if k > 1 else 1 for k, d, new in pairs)


def alike(a: Kernel, b: Kernel) -> tuple[Kernel, Kernel]:
    """Both kernels with the same size, dilation and groups, hence weights of one shape."""
    groups = gcd(a.groups, b.groups)
    dilation = common_dilation(a, b)
    size = tuple(map(max, sizes_at(a, dilation), sizes_at(b, dilation)))
    a, b = (resized(regrouped(kernel, groups), size, dilation) for kernel in (a, b))
    if a.weight.shape != b.weight.shape:
        raise ValueError(
            f"kernels of shapes {tuple(a.weight.shape)} and {tuple(b.weight.shape)} cannot be "
            "added: input and output channels must be the same."
        )
    return a, b


def composed(first: Kernel, second: Kernel) -> Kernel:
    """The one kernel that equals `first`, then `second` (DBB, transform III, for any sizes).

    K[o, i] = sum over t of second[o, t] convolved with first[t, i];
    b[o] = second.bias[o] + sum over t and taps of second[o, t] first.bias[t].
    The bias is exact where `second` sees no padding, or padding with `first.bias`.
    """
    groups = gcd(first.groups, second.groups)
    dilation = common_dilation(first, second)
    first, second = (
        resized(regrouped(kernel, groups), sizes_at(kernel, dilation), dilation)
        for kernel in (first, second)
    )
    if first.out_channels != second.in_channels:
        raise ValueError(
            f"the first kernel gives {first.out_channels} channels, the second takes "
            f"{second.in_channels}."
        )
    axes = tuple(range(2, 2 + first.dims))
    before = first.weight.unflatten(0, (groups, -1))  # (G, M/G, I/G, *k1)
    after = second.weight.unflatten(0, (groups, -1))  # (G, O/G, M/G, *k2)
    if max(first.size) == 1:  # one tap: a matrix product, several times faster
        weight = torch.einsum("gotk,gti->goik", after.flatten(3), before.flatten(3)[..., 0])
        weight = weight.reshape(second.out_channels, -1, *second.size)
    elif max(second.size) == 1:
        weight = torch.einsum("got,gtik->goik", after.flatten(3)[..., 0], before.flatten(3))
        weight = weight.reshape(second.out_channels, -1, *first.size)
    else:
        # A convolution of kernels is a cross-correlation with the second one flipped; the inputs
        # of the first kernel play the part of the batch.
        weight = CONVOLUTION[first.dims](
            first.weight.transpose(0, 1),
            second.weight.flip(axes),
            padding=tuple(k - 1 for k in second.size),
            groups=groups,
        ).transpose(0, 1)
    taps = second.weight.sum(axes).view(groups, -1, second.weight.shape[1])
    carried = torch.einsum("got,gt->go", taps, first.bias.view(groups, -1)).reshape(-1)
    return Kernel(weight, second.bias + carried, groups, dilation)


def convolve(
    x: Tensor, kernel: Kernel, padding: tuple[int, ...] = (), stride: tuple[int, ...] = ()
) -> Tensor:
    """Apply a kernel to x (N, I, *space), padded with zeros; a negative padding crops."""
    x, padding = cropped(x, padding or (0,) * kernel.dims)
    return CONVOLUTION[kernel.dims](
        x, kernel.weight, kernel.bias, stride or 1, padding, kernel.dilation, kernel.groups
    )


def cropped(x: Tensor, padding: tuple[int, ...]) -> tuple[Tensor, tuple[int, ...]]:
    """Carry out the negative part of a padding; returns the input and the part still to do."""
    if min(padding) >= 0:
        return x, padding
    for axis, amount in enumerate(padding, start=2):
        if amount < 0:
            x = x.narrow(axis, -amount, x.shape[axis] + 2 * amount)
    return x, tuple(max(amount, 0) for amount in padding)
