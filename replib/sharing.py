"""The train-mode forward of a sum of branches, without work done twice.

    padding      with a constant is subtraction of the constant before, addition after: no copy
    pooling      keeps no map, and is the processor's fast depthwise convolution
    rates        are a factor on the slope and shift of a branch's last norm: no pass over a map
    norm-free    subtrees are evaluated in the cheapest order (`replib.squeezing`)

A branch is not a sequence of feature maps but a `Term`: a map that already exists, and a kernel of
size 1 that is still to be applied to it. With `block.folded`, norms are part of that kernel: once
its batch statistics are known, a norm is an affine map, and the algebra of merging applies to the
forward pass of training too.

    norms        become a factor and a shift in that kernel: no pass over a map writes their output
    pointwise    branches (1x1 convolutions, identities, norms) of one input stay kernels until the
                 end, add up, and are one convolution
    statistics   behind a pointwise kernel follow from the mean and covariance of its input:
                 mean(K x) = K mean(x), var(K x) = diag(K cov(x) K^T); one reduction serves them all
    convolutions of the same size on the same input are one convolution of stacked weights

All of it is derived from the tree; a new block gains it. The branch-by-branch form stays in
`replib.branches` as the reference: outputs, gradients and running statistics agree up to rounding.

The affine form of a norm: Ioffe and Szegedy, "Batch Normalization", ICML 2015, algorithm 2; the
algebra: Ding et al., "Diverse Branch Block", CVPR 2021, section 3.2.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from operator import add

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from replib import kernels, squeezing
from replib.branches import (
    AVERAGE_POOL,
    AveragePool,
    Chain,
    Convolution,
    Filter,
    Norm,
    Piece,
    Scale,
    Sizes,
    Sum,
    padded_with,
)
from replib.kernels import Kernel

# A covariance costs 4 P C^2 operations (P pixels, C channels; forward and backward), a few percent
# of a 3x3 convolution, and spares a map and its passes for each norm that it serves. Its kernel
# algebra costs C^3, so the pixels must outnumber the channels.
COVARIANCE_PIXELS = 8  # pixels per channel
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


class Map:
    """A feature map (N, C, *space) that exists, with what is known of it once it is asked for.

    dtype: of its statistics, and of the kernels that are applied to it.
    """

    def __init__(self, values: Tensor, dtype: torch.dtype):
        self.values, self.dtype = values, dtype
        self.known: tuple[Tensor, Tensor] | None = None
        self.known_covariance: tuple[Tensor, Tensor] | None = None

    @property
    def channels(self) -> int:
        return self.values.shape[1]

    @property
    def count(self) -> int:
        """Values per channel."""
        return self.values.numel() // self.channels

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and biased variance, each (C,)."""
        if self.known is None and self.known_covariance is not None:
            self.known = self.known_covariance[0], self.known_covariance[1].diagonal()
        if self.known is None:
            self.known = MapStatistics.apply(self.values, self.dtype)
        return self.known

    def covariance(self) -> tuple[Tensor, Tensor]:
        """Mean (C,) and biased covariance (C, C)."""
        if self.known_covariance is None:
            self.known_covariance = MapCovariance.apply(self.values, self.dtype)
        return self.known_covariance


@dataclass(frozen=True, eq=False)
class Stack:
    """Several maps in one: channels are numbered (group, part, channel of the group)."""

    map: Map
    groups: int
    parts: int

    def apart(self, values: Tensor, axis: int) -> Tensor:
        """The channel axis as three."""
        return values.unflatten(axis, (self.groups, self.parts, -1))


class Part(Map):
    """One map of a stack; its statistics are a part of the stack's."""

    def __init__(self, stack: Stack, index: int):
        self.stack, self.index = stack, index
        self.dtype = stack.map.dtype

    @property
    def values(self) -> Tensor:
        return self.stack.apart(self.stack.map.values, 1)[:, :, self.index].flatten(1, 2)

    @property
    def channels(self) -> int:
        return self.stack.map.channels // self.stack.parts

    @property
    def count(self) -> int:
        return self.stack.map.count

    def statistics(self) -> tuple[Tensor, Tensor]:
        mean, variance = self.stack.map.statistics()
        return tuple(self.stack.apart(v, 0)[:, self.index].flatten() for v in (mean, variance))


@dataclass(frozen=True)
class Term:
    """A map, and a kernel of size 1 still to be applied to it; None is the identity.

    constant: instead of a kernel, what is still to be added, (C,).
    """

    map: Map
    kernel: Kernel | None = None
    constant: Tensor | None = None

    @property
    def own_kernel(self) -> Kernel:
        x = self.map.values
        if self.kernel is not None:
            return self.kernel
        kernel = kernels.identity(x.shape[1], x.dim() - 2, dtype=self.map.dtype, device=x.device)
        bias = kernel.bias if self.constant is None else kernel.bias + self.constant
        return Kernel(kernel.weight, bias, kernel.groups)

    @property
    def per_channel(self) -> bool:
        """Whether the kernel is a factor and a shift: every output reads one input."""
        return self.kernel is None or self.kernel.weight.shape[1] == 1

    def then(self, piece: Piece) -> Term:
        """The term behind a pointwise piece."""
        if self.kernel is None and self.constant is None and isinstance(piece, Convolution):
            return Term(self.map, piece.kernel(self.map.dtype))
        return Term(self.map, piece.act(self.own_kernel))

    def scaled(self, factor: Tensor, shift: Tensor | None = None) -> Term:
        return Term(self.map, kernels.scaled(self.own_kernel, factor, shift))

    def plus(self, shift: Tensor) -> Term:
        if self.kernel is None and self.constant is None:
            return Term(self.map, constant=shift)
        kernel = self.own_kernel
        return Term(self.map, Kernel(kernel.weight, kernel.bias + shift, kernel.groups))


class Pass:
    """What the branches share in one forward pass, and how it computes."""

    def __init__(self, block: Sum, x: Tensor):
        dtype = next(block.parameters()).dtype
        self.dtype = dtype if dtype.itemsize >= 4 else torch.float32  # of kernels and statistics
        self.device = x.device.type
        self.folded = block.folded
        self.lower = not x.is_meta and torch.is_autocast_enabled(self.device)
        self.autocast_dtype = torch.get_autocast_dtype(self.device) if self.lower else None
        self.seen: list[tuple[Tensor, Sizes, Sizes, Map]] = []

    def full_precision(self):
        """Kernels and statistics are made in full precision."""
        return torch.autocast(self.device, enabled=False) if self.lower else nullcontext()

    def as_asked(self):
        """Maps are made in the precision that the caller asked for."""
        if not self.lower:
            return nullcontext()
        return torch.autocast(self.device, dtype=self.autocast_dtype)

    def map(self, x: Tensor) -> Map:
        return Map(x, self.dtype)

    def cut(self, x: Tensor, padding: Sizes, stride: Sizes) -> Map:
        """The input as a pointwise branch of that padding and stride sees it; the same map for
        every branch that asks."""
        for known, p, s, found in self.seen:
            if known is x and (p, s) == (padding, stride):
                return found
        y, rest = kernels.cropped(x, padding)
        if max(rest):
            y = F.pad(y, [amount for p in reversed(rest) for amount in (p, p)])
        if max(stride) > 1:
            y = y[(..., *(slice(None, None, s) for s in stride))]
        self.seen.append((x, padding, stride, self.map(y)))
        return self.seen[-1][-1]

    def moments(self, term: Term) -> tuple[Term, Tensor, Tensor]:
        """(term, mean, biased variance) of what a term stands for, each (O,).

        The term comes back as a map where that is cheaper than a covariance.
        """
        if not term.per_channel and not covariance_pays(term):
            term = Term(self.map(self.evaluated(term)))
        if term.kernel is None and term.constant is None:
            return term, *term.map.statistics()
        term = Term(term.map, term.own_kernel)
        weight = term.kernel.weight.flatten(1)
        if term.per_channel:
            repeats = len(weight) // term.map.channels
            mean, variance = (v.repeat_interleave(repeats) for v in term.map.statistics())
            mean, variance = weight[:, 0] * mean, weight[:, 0].square() * variance
        else:
            mean, covariance = term.map.covariance()
            mean = weight @ mean
            variance = ((weight @ covariance) * weight).sum(1).clamp(min=0)
        return term, mean + term.kernel.bias, variance

    def evaluated(self, term: Term) -> Tensor:
        """The feature map that a term stands for."""
        x = term.map.values
        if term.kernel is not None:
            return self.total([term])
        return x if term.constant is None else x + per_channel_view(term.constant, x).to(x.dtype)

    def total(self, terms: list[Term]) -> Tensor:
        """The sum of terms as one map: kernels of one map add up, all shifts are one.

        One pointwise convolution for a map that needs one, one multiplication and addition for
        any other.
        """
        merged: list[Term] = []
        for term in terms:
            same = [i for i, other in enumerate(merged) if other.map is term.map]
            if same:
                kernel = merged[same[0]].own_kernel + term.own_kernel
                merged[same[0]] = Term(term.map, kernel)
            else:
                merged.append(term)
        if all(term.kernel is None and term.constant is None for term in merged):
            return reduce(add, (term.map.values for term in merged))
        shift = reduce(add, (term.own_kernel.bias for term in merged))
        out: Tensor | None = None
        parts = [term for term in merged if isinstance(term.map, Part)]
        merged = [term for term in merged if not isinstance(term.map, Part)]
        for term in sorted(merged, key=lambda term: term.per_channel):
            x, kernel = term.map.values, term.own_kernel
            if term.per_channel and len(kernel.weight) == x.shape[1]:
                factor = per_channel_view(kernel.weight.flatten(), x)
                out = per_channel_view(shift, x) if out is None else out
                dtype = out.dtype if out.dim() == x.dim() else x.dtype
                out = torch.addcmul(out.to(dtype), x.to(dtype), factor.to(dtype))
                continue
            bias = shift if out is None else torch.zeros_like(shift)
            dtype = self.dtype if self.lower else x.dtype  # autocast rounds by itself
            with self.as_asked():
                y = kernels.convolve(x, Kernel(kernel.weight, bias, kernel.groups).to(dtype))
            out = y if out is None else out + y
        for stack in dict.fromkeys(term.map.stack for term in parts):
            y = weighted(stack, [term for term in parts if term.map.stack is stack])
            out = y + per_channel_view(shift, y) if out is None else out + y
        return out


def weighted(stack: Stack, terms: list[Term]) -> Tensor:
    """The sum of the parts of a stack, each by its factor per channel, in one pass."""
    values = stack.map.values
    factors: list[Tensor | None] = [None] * stack.parts
    for term in terms:
        factors[term.map.index] = term.own_kernel.weight.flatten().view(stack.groups, -1)
    factor = torch.stack(factors, 1).to(values.dtype)
    factor = factor.view(factor.shape + (1,) * (values.dim() - 2))
    return (stack.apart(values, 1) * factor).sum(2).flatten(1, 2)


def covariance_pays(term: Term) -> bool:
    """Whether statistics by a covariance cost less than making the map and passing over it."""
    channels = term.map.channels
    return term.kernel.groups == 1 and term.map.count >= COVARIANCE_PIXELS * channels


def per_channel_view(values: Tensor, x: Tensor) -> Tensor:
    """(C,) so that it multiplies x (N, C, *space)."""
    return values.view((-1,) + (1,) * (x.dim() - 2))


class MapStatistics(torch.autograd.Function):
    """x (N, C, *space) -> mean and biased variance, each (C,), in the given dtype.

    Saves x alone; its gradient is one factor and one shift per channel.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if x.is_cpu and x.dtype == dtype and not torch.compiler.is_compiling():
            return torch.batch_norm_update_stats(x, None, None, 0.0)  # one fast pass
        axes = (0, *range(2, x.dim()))
        variance, mean = torch.var_mean(x.to(dtype), axes, correction=0)
        return mean, variance

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0], output[0])

    @staticmethod
    def backward(ctx, grad_mean: Tensor, grad_variance: Tensor):
        x, mean = ctx.saved_tensors
        count = x.numel() // len(mean)
        factor = grad_variance * (2 / count)
        shift = grad_mean / count - factor * mean
        factor, shift = (per_channel_view(v, x).to(x.dtype) for v in (factor, shift))
        return torch.addcmul(shift, x, factor), None


class MapCovariance(torch.autograd.Function):
    """x (N, C, *space) -> mean (C,) and biased covariance (C, C), in the given dtype.

    Centred before it is squared, so that a large mean costs no digits. Saves x alone.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        rows = x.movedim(1, -1).reshape(-1, x.shape[1]).to(dtype)
        mean = rows.mean(0)
        centred = rows - mean
        return mean, centred.t() @ centred / len(rows)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0], output[0])

    @staticmethod
    def backward(ctx, grad_mean: Tensor, grad_covariance: Tensor):
        x, mean = ctx.saved_tensors
        count = x.numel() // len(mean)
        symmetric = (grad_covariance + grad_covariance.t()) / count
        shift = grad_mean / count - mean @ symmetric
        weight = symmetric.view(*symmetric.shape, *(1,) * (x.dim() - 2))
        conv = kernels.CONVOLUTION[x.dim() - 2]
        return conv(x, weight.to(x.dtype), shift.to(x.dtype)), None


class Pooled(torch.autograd.Function):
    """Average pooling, x (N, C, *space) by a depthwise kernel (C, 1, *size); saves no map.

    PyTorch's keeps its input for the sake of its shape. On a processor a depthwise convolution is
    several times faster than pooling, in channels-last above all.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, padding, stride, dilation) -> Tensor:
        size = tuple(weight.shape[2:])
        fits = max(dilation) == 1 and all(2 * p <= k for p, k in zip(padding, size, strict=True))
        if fits and not (x.is_cpu and not torch.compiler.is_compiling()):
            return AVERAGE_POOL[len(size)](x, size, stride, padding)
        convolution = kernels.CONVOLUTION[len(size)]
        return convolution(x, weight, None, stride, padding, dilation, x.shape[1])

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, ctx.padding, ctx.stride, ctx.dilation = inputs
        ctx.space = tuple(x.shape[2:])
        ctx.save_for_backward(weight)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (weight,) = ctx.saved_tensors
        axes = zip(
            ctx.space, grad.shape[2:], weight.shape[2:], ctx.padding, ctx.stride, ctx.dilation,
            strict=True,
        )  # fmt: skip
        rest = [i - ((o - 1) * s - 2 * p + d * (k - 1) + 1) for i, o, k, p, s, d in axes]
        transposed = TRANSPOSED[len(rest)]
        channels = weight.shape[0]
        x = transposed(grad, weight, None, ctx.stride, ctx.padding, rest, channels, ctx.dilation)
        return x, None, None, None, None


# -- what can be shared --------------------------------------------------------------------------
def applies(block: Sum, x: Tensor) -> bool:
    """Whether the shared form computes what the branches one by one would.

    Not where anything watches or replaces a part (hooks, another `forward`), and not where a norm
    is not PyTorch's own or exchanges its statistics with other processes.
    """
    if x.dim() != block.dims + 2 or not (block.folded or has_waste(block)):
        return False
    for module in block.modules():
        if module is block:
            continue
        watched = module._forward_hooks or module._forward_pre_hooks
        watched = watched or module._backward_hooks or module._backward_pre_hooks
        if watched or "forward" in module.__dict__:
            return False
        if isinstance(module, Norm) and not ordinary(module.norm):
            return False
    return x.numel() > 0


def has_waste(block: Sum) -> bool:
    """Whether there is something to spare, by the structure: otherwise a tree that is walked costs
    more than it gives."""
    if norm_free(block):
        return len(block.branches) > 1 or block.squeezed
    for branch in block.branches.values():
        pieces = list(branch) if isinstance(branch, Chain) else [branch]
        for before, piece in pairwise([None, *pieces]):
            spatial = max(piece.extent) > 1
            if isinstance(piece, Sum) or (
                spatial and (isinstance(before, Norm) or isinstance(piece, AveragePool))
            ):
                return True
    return False


def ordinary(layer: nn.Module) -> bool:
    """Whether a norm is PyTorch's own batch norm, with slope and shift, without exchange."""
    own = isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)
    return own and layer.affine


def norm_free(piece: Piece) -> bool:
    """Whether there is no norm in it, but for one behind a whole sum."""
    inside = piece.branches if isinstance(piece, Sum) else piece
    return not any(isinstance(module, Norm) for module in inside.modules())


# -- the evaluation ------------------------------------------------------------------------------
def run(block: Sum, x: Tensor, padding: Sizes, stride: Sizes) -> Tensor:
    """The sum of the branches of x, as `Sum.run` computes it (without a post-norm)."""
    shared = Pass(block, x)
    if norm_free(block):
        return squeezing.run(block, x, padding, stride)
    with shared.full_precision():
        return shared.total(terms_of(block, x, padding, stride, shared))


def terms_of(block: Sum, x: Tensor, padding: Sizes, stride: Sizes, shared: Pass) -> list[Term]:
    """The branches of a sum as terms, with its rate on those beside the main one."""
    stacked = stacked_convolutions(block, x, padding, stride, shared) if shared.folded else {}
    found: list[Term] = []
    rate = getattr(block, "rate", None)
    for name, branch in block.branches.items():
        axes = zip(padding, block.extent, branch.extent, strict=True)
        inner = tuple(p - (big - e) // 2 for p, big, e in axes)
        side = rate is not None and name != block.main
        factor = rate.to(shared.dtype).expand(block.out_channels) if side else None
        found += branch_terms(branch, x, inner, stride, shared, factor, stacked.get(name))
    return found


def branch_terms(
    branch: Piece,
    x: Tensor,
    padding: Sizes,
    stride: Sizes,
    shared: Pass,
    factor: Tensor | None = None,
    first_output: Part | None = None,
) -> list[Term]:
    """One branch, times a factor (O,), as terms; padded before its first spatial piece, strided
    at its last.

    first_output: what its first piece makes of x, where that is known already.
    """
    if is_plain_sum(branch) and not norm_free(branch):
        terms = terms_of(branch, x, padding, stride, shared)
        return terms if factor is None else [term.scaled(factor) for term in terms]
    pieces = list(branch) if isinstance(branch, Chain) else [branch]
    spatial = [i for i, piece in enumerate(pieces) if max(piece.extent) > 1]
    nothing, one = (0,) * branch.dims, (1,) * branch.dims
    term = Term(shared.map(x) if spatial else shared.cut(x, padding, stride))
    for i, piece in enumerate(pieces):
        if i == 0 and first_output is not None:
            term = Term(first_output)
        elif isinstance(piece, Norm):
            last = piece is pieces[-1]
            term = normalised(term, piece, shared, factor if last else None)
        elif i not in spatial and isinstance(piece, Convolution | Scale | Filter):
            term = term.then(piece)
        else:
            starts = spatial and i == spatial[0]
            value = branch.value_at_zero(i) if starts and isinstance(branch, Chain) else None
            strides = stride if spatial and i == spatial[-1] else one
            term = spatially(term, piece, padding if starts else nothing, strides, value, shared)
    ends_in_norm = isinstance(pieces[-1], Norm)
    return [term if factor is None or ends_in_norm else term.scaled(factor)]


def is_plain_sum(piece: Piece) -> bool:
    """A sum that is nothing but its branches: no norm behind them, no squeezing."""
    own = isinstance(piece, Sum) and not piece.squeezed
    return own and getattr(piece, "post_norm", None) is None


def stacked_convolutions(
    block: Sum, x: Tensor, padding: Sizes, stride: Sizes, shared: Pass
) -> dict[str, Part]:
    """What the branches that are a convolution of one geometry, then a norm, convolve to: by one
    convolution of all their weights."""
    alike: dict[tuple, list[str]] = {}
    for name, branch in block.branches.items():
        pieces = list(branch) if isinstance(branch, Chain) else []
        kinds = [type(piece) for piece in pieces]
        if kinds == [Convolution, Norm] and max(pieces[0].extent) > 1 and pieces[0].bias is None:
            key = tuple(pieces[0].weight.shape), pieces[0].dilation, pieces[0].groups
            alike.setdefault(key, []).append(name)
    parts: dict[str, Part] = {}
    for (_, dilation, groups), names in alike.items():
        if len(names) == 1:
            continue
        convolutions = [block.branches[name][0] for name in names]
        weights = [c.effective_weight().unflatten(0, (groups, -1)) for c in convolutions]
        weight = torch.stack(weights, 1).flatten(0, 2)
        axes = zip(padding, block.extent, convolutions[0].extent, strict=True)
        inner = tuple(p - (big - e) // 2 for p, big, e in axes)
        cut, rest = kernels.cropped(x, inner)
        with shared.as_asked():
            convolution = kernels.CONVOLUTION[block.dims]
            y = convolution(cut, weight, None, stride, rest, dilation, groups)
        stack = Stack(shared.map(y), groups, len(names))
        parts |= {name: Part(stack, i) for i, name in enumerate(names)}
    return parts


def normalised(term: Term, norm: Norm, shared: Pass, factor: Tensor | None) -> Term:
    """A term behind a norm, times a factor: from the batch; running statistics move."""
    layer = norm.norm
    if not (layer.training or layer.running_mean is None):
        term = term.then(norm)
        return term if factor is None else term.scaled(factor)
    if not shared.folded:
        constant = term.constant  # the norm takes it away again, but for its running mean
        x = shared.evaluated(Term(term.map, term.kernel))
        return Term(shared.map(batch_norm(layer, x, factor, constant)))
    term, mean, variance = shared.moments(term)
    count = term.map.count
    if count == 1:
        raise ValueError(
            "batch statistics need more than 1 value per channel in train mode; the input has "
            f"shape {tuple(term.map.values.shape)}."
        )
    if layer.running_mean is not None and layer.training:
        update(layer, mean.detach(), variance.detach(), count)
    slope, shift = slope_and_shift(layer, factor, shared.dtype)
    slope = slope * (variance + layer.eps).rsqrt()
    return term.scaled(slope, shift - mean * slope)


def slope_and_shift(
    layer: nn.Module, factor: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """gamma and beta of a norm, each (O,), both times a factor."""
    both = layer.weight.to(dtype), layer.bias.to(dtype)
    return both if factor is None else tuple((value * factor).to(dtype) for value in both)


def batch_norm(
    layer: nn.Module, x: Tensor, factor: Tensor | None, constant: Tensor | None
) -> Tensor:
    """The norm of x + constant, times a factor, by PyTorch's own fused operation."""
    momentum = layer.momentum
    tracked = layer.running_mean is not None and layer.training
    if tracked:
        layer.num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1 / layer.num_batches_tracked.item()
    running = (layer.running_mean, layer.running_var) if tracked else (None, None)
    slope, shift = slope_and_shift(layer, factor, layer.weight.dtype)
    if constant is not None and tracked:
        # The batch does not see the constant; its running mean does. It is added beforehand,
        # since the operation's backward pass holds on to what it leaves there.
        if momentum == 1:
            x = x + per_channel_view(constant, x).to(x.dtype)
        else:
            ahead = constant.detach().to(layer.running_mean.dtype)
            layer.running_mean.add_(ahead, alpha=momentum / (1 - momentum))
    return F.batch_norm(x, *running, slope, shift, True, momentum or 0.0, layer.eps)


@torch.no_grad()
def update(layer: nn.Module, mean: Tensor, variance: Tensor, count: int) -> None:
    """Running statistics, as torch's batch norm moves them (the variance unbiased)."""
    layer.num_batches_tracked.add_(1)
    momentum = layer.momentum
    if momentum is None:  # every batch counts the same
        momentum = 1 / layer.num_batches_tracked.to(layer.running_mean.dtype)
    for running, value in (
        (layer.running_mean, mean),
        (layer.running_var, variance * (count / (count - 1))),
    ):
        running.lerp_(value.to(running.dtype), momentum)


def spatially(
    term: Term, piece: Piece, padding: Sizes, stride: Sizes, value: Tensor | None, shared: Pass
) -> Term:
    """A term behind a piece that looks at neighbours: the map is made, bordered by `value`.

    A border of v around a map is a border of 0 around the map less v, and v through the piece.
    """
    x, rest = kernels.cropped(term.map.values, padding)
    if x is not term.map.values:
        term = Term(shared.map(x), term.kernel)
    constant = None
    if value is None or not max(rest):
        x = shared.evaluated(term)
    elif isinstance(piece, Convolution | Filter) and x.dtype.itemsize >= 4 and not shared.lower:
        value = value.to(shared.dtype)
        constant = through(piece.kernel(shared.dtype), value)
        x = shared.evaluated(term.plus(-value))
    else:  # another kind of piece, or too few digits for a difference
        x = padded_with(shared.evaluated(term), rest, value)
        rest = (0,) * len(rest)
    with shared.as_asked():
        out = Term(shared.map(spatial(piece, x, rest, stride)))
    return out if constant is None else out.plus(constant)


def spatial(piece: Piece, x: Tensor, padding: Sizes, stride: Sizes) -> Tensor:
    """A spatial piece on a map."""
    if isinstance(piece, AveragePool) and min(padding) >= 0:
        weight = piece.kernel(x.dtype).weight
        return Pooled.apply(x, weight, tuple(padding), tuple(stride), piece.dilation)
    if isinstance(piece, Sum) and getattr(piece, "post_norm", None) is None and norm_free(piece):
        return squeezing.run(piece, x, padding, stride)
    return piece.run(x, padding, stride)


def through(kernel: Kernel, value: Tensor) -> Tensor:
    """What a kernel makes of a constant map of `value` (I,): (O,)."""
    taps = kernel.weight.flatten(2).sum(2).unflatten(0, (kernel.groups, -1))
    taps = (taps * value.view(kernel.groups, 1, -1)).sum(2)
    return taps.flatten() + kernel.bias
