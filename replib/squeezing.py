"""A sum of linear branches without norms, evaluated in the cheaper order.

Such a sum (OREPA's) is one convolution, whose kernel is a sum of products of weights. A branch
L_n ... L_1 x may be multiplied out from either end: into one kernel, at a cost that does not
depend on the batch, or onto the feature map, at a cost per pixel. This is the matrix-chain-order
problem with the map as the last matrix; it is decided from shapes, branch by branch:

    y = K * x + sum of L_n * (... (L_1 * x)) over the branches left on the map
    K = sum of L_n o ... o L_1 over all others

Two kernels of A and B weights with T channels between them are multiplied out with A B / T
multiply-adds, in any grouping. A scale or a fixed filter is a depthwise kernel, so taking the
cheapest neighbours first folds it into the smaller side by itself. For the backward pass nothing
is kept but x, the weights and, where it is no larger than the maps, K: the rest is made again.

Source: Hu et al., "Online Convolutional Re-parameterization", CVPR 2022, section 3.2, which
multiplies out every kernel. `Sum.run` is that plain form, and the reference of this one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from math import gcd, prod

import torch
from torch import Tensor

from replib import kernels
from replib.branches import Chain, Convolution, Filter, Piece, Scale, Sizes, Sum
from replib.kernels import Kernel

KNOWN = (Convolution, Scale, Filter, Chain, Sum)
MOVED = 16  # multiply-adds that take as long as reading and writing one number
KEPT = 4  # a kernel of more numbers than so many output maps is made again, not kept
BLOCK = 4  # inputs of a depthwise kernel that are multiplied as one matrix, zeros included

Values = dict[Piece, Tensor]  # the weight of each leaf, and the rate of each sum that has one


def run(piece: Sum, x: Tensor, padding: Sizes, stride: Sizes) -> Tensor:
    """What `Sum.run` computes for a squeezed sum, up to rounding, with less work and memory.

    (N, in_channels, *space) -> (N, out_channels, *space'), before the post-norm of a block.
    A sum with a bias, a norm or a new kind of leaf inside takes the plain form.
    """
    parts = [part for part in piece.modules() if isinstance(part, Piece)]
    shifts = any(branch.shifts for branch in piece.branches.values())
    if shifts or not all(isinstance(part, KNOWN) for part in parts):
        return Sum.run(piece, x, padding, stride)
    dtype = next(piece.parameters()).dtype
    values = {part: value.to(dtype) for part in parts if (value := own_value(part)) is not None}
    tensors = tuple(values.values())
    axes = zip(x.shape[2:], padding, piece.extent, stride, strict=True)
    before = len(x) * prod(x.shape[2:])
    after = len(x) * prod((size + 2 * p - e) // s + 1 for size, p, e, s in axes)
    # Autocast rounds every map: there the kernel is made, in full precision, whatever the batch.
    cast = not x.is_meta and torch.is_autocast_enabled(x.device.type)
    on_map = [] if cast else left_on_map(piece, before, after)
    squeezed = [name for name in piece.branches if name not in on_map]

    def margin(extent: Sizes) -> Sizes:
        """The padding of what is centred in the sum."""
        axes = zip(padding, piece.extent, extent, strict=True)
        return tuple(p - (big - e) // 2 for p, big, e in axes)

    out = None
    if squeezed:
        form = reduce(aligned, (form_of(piece.branches[name]) for name in squeezed))

        def kernel(*tensors: Tensor) -> Total:
            return total(piece, squeezed, dict(zip(values, tensors, strict=True)))

        def convolution(x: Tensor, *tensors: Tensor) -> Applied:
            return Applied(x, form.holding(made(kernel, *tensors)), margin(form.extent), stride)

        if cast or kept(form, after):
            with full_precision(x):
                weight = made(kernel, *tensors)
            out = kernels.convolve(x, form.holding(weight), margin(form.extent), stride)
        else:
            out = made(convolution, x, *tensors)
    for name in on_map:
        leaves, factors = unscaled(piece, name)
        geometry = margin(piece.branches[name].extent), stride

        def last(x: Tensor, *tensors: Tensor, leaves=leaves, geometry=geometry) -> Applied:
            return mapped(leaves, x, dict(zip(values, tensors, strict=True)), *geometry)

        y = made(last, x, *tensors)
        if factors:
            factor = reduce(torch.mul, (values[part] for part in factors))
            factor = factor.expand(piece.out_channels).view(-1, *(1,) * piece.dims)
            out = y * factor if out is None else torch.addcmul(out, y, factor)
        else:
            out = y if out is None else out + y
    return out


def own_value(piece: Piece) -> Tensor | None:
    """The weight of a leaf; of a sum that weighs its side branches, their rate."""
    if isinstance(piece, Sum) and type(piece).weighted is not Sum.weighted:
        one = torch.ones_like(next(piece.parameters()).view(-1)[0].detach())
        return piece.weighted(torch.zeros_like(one), one)
    return piece.weight if isinstance(piece, Convolution | Scale) else None


def full_precision(x: Tensor) -> AbstractContextManager:
    """Without autocast; meta tensors have none to turn off."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


# -- which order ------------------------------------------------------------------------------
@dataclass(frozen=True)
class Form:
    """The shape of a kernel: enough to count with, before there is one."""

    out_channels: int
    in_channels: int
    groups: int
    size: Sizes
    dilation: Sizes

    @property
    def extent(self) -> Sizes:
        return tuple(d * (k - 1) + 1 for k, d in zip(self.size, self.dilation, strict=True))

    def holding(self, weight: Tensor) -> Kernel:
        """A kernel of this form, without bias."""
        return Kernel(weight, None, self.groups, self.dilation)


Shaped = Form | Kernel


def form_of(piece: Piece) -> Form:
    """The form of the kernel of a piece."""
    if isinstance(piece, Chain):
        return reduce(joined, map(form_of, piece))
    if isinstance(piece, Sum):
        return reduce(aligned, map(form_of, piece.branches.values()))
    channels, ones = (piece.out_channels, piece.in_channels), (1,) * piece.dims
    if isinstance(piece, Scale):
        return Form(*channels, piece.in_channels, ones, ones)
    size = tuple(piece.weight.shape[2:])
    dilation = tuple(d if k > 1 else 1 for k, d in zip(size, piece.dilation, strict=True))
    groups = piece.groups if isinstance(piece, Convolution) else piece.in_channels
    return Form(*channels, groups, size, dilation)


def joined(first: Shaped, second: Shaped) -> Form:
    """The form of `first`, then `second`."""
    dilation = kernels.common_dilation(first, second)
    sizes = zip(*(kernels.sizes_at(form, dilation) for form in (first, second)), strict=True)
    size = tuple(a + b - 1 for a, b in sizes)
    groups = gcd(first.groups, second.groups)
    return Form(second.out_channels, first.in_channels, groups, size, dilation)


def aligned(a: Form, b: Form) -> Form:
    """The form of the sum."""
    dilation = kernels.common_dilation(a, b)
    size = tuple(map(max, kernels.sizes_at(a, dilation), kernels.sizes_at(b, dilation)))
    return Form(a.out_channels, a.in_channels, gcd(a.groups, b.groups), size, dilation)


def weights(form: Shaped) -> int:
    return form.out_channels * form.in_channels // form.groups * prod(form.size)


def product_cost(first: Shaped, second: Shaped) -> float:
    """Of multiplying out two kernels, in multiply-adds."""
    multiply_adds = weights(first) * weights(second) / first.out_channels
    return multiply_adds + MOVED * weights(joined(first, second))


def map_cost(form: Form, pixels: int) -> float:
    """Of convolving a map with a kernel, in multiply-adds; pixels: of the output, in all images."""
    return weights(form) * pixels + MOVED * (weights(form) + form.out_channels * pixels)


def folded(chain: list, join: Callable, until: int = 1) -> list:
    """Join neighbours, the cheapest first, until so many are left."""
    while len(chain) > until:
        costs = [product_cost(*pair) for pair in pairwise(chain)]
        i = costs.index(min(costs))
        chain = [*chain[:i], join(*chain[i : i + 2]), *chain[i + 2 :]]
    return chain


def flat(piece: Piece) -> list[Piece]:
    """The links of a chain, and of the chains in it."""
    return [leaf for part in piece for leaf in flat(part)] if isinstance(piece, Chain) else [piece]


def unscaled(piece: Sum, name: str) -> tuple[list[Piece], list[Piece]]:
    """A branch without the scales at its end, and what has the factors: the scales, the rate."""
    leaves, factors = flat(piece.branches[name]), []
    while len(leaves) > 1 and isinstance(leaves[-1], Scale):
        factors.append(leaves.pop())
    weighs = name != piece.main and own_value(piece) is not None
    return leaves, [*factors, piece] if weighs else factors


def left_on_map(piece: Sum, before: int, after: int) -> list[str]:
    """The branches that are cheaper on a map of so many pixels before and after the stride."""
    on_kernel, on_map = {}, {}
    for name, branch in piece.branches.items():
        chain = [form_of(leaf) for leaf in flat(branch)]
        on_kernel[name] = MOVED * weights(form_of(piece))

        def join(first: Form, second: Form, name: str = name) -> Form:
            on_kernel[name] += product_cost(first, second)
            return joined(first, second)

        folded(chain, join)
        leaves, factors = unscaled(piece, name)
        last = max((i for i, leaf in enumerate(leaves) if max(leaf.extent) > 1), default=0)
        costs = [
            map_cost(form, before if i < last else after)
            for i, form in enumerate(chain[: len(leaves)])
        ]
        on_map[name] = sum(costs) + MOVED * after * piece.out_channels * (1 + len(factors))
    cheaper = [name for name in on_map if on_map[name] < on_kernel[name]]
    shared = map_cost(form_of(piece), after) + sum(map(min, on_map.values(), on_kernel.values()))
    return list(on_map) if sum(on_map.values()) <= shared else cheaper


def kept(form: Form, pixels: int) -> bool:
    """Whether the kernel is kept for the backward pass."""
    return weights(form) <= KEPT * form.out_channels * pixels


# -- on the map -------------------------------------------------------------------------------
@dataclass
class Applied:
    """A convolution that has not been carried out."""

    x: Tensor
    kernel: Kernel
    padding: Sizes
    stride: Sizes

    def value(self) -> Tensor:
        return kernels.convolve(self.x, self.kernel, self.padding, self.stride)

    def gradients(self, grad: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """What it is made of, with its gradient where `grad` is that of the value."""
        x, padding = kernels.cropped(self.x, self.padding)
        weight, dims = self.kernel.weight, self.kernel.dims
        wanted = [x.requires_grad, weight.requires_grad, False]
        geometry = self.stride, padding, self.kernel.dilation, False, (0,) * dims
        found = torch.ops.aten.convolution_backward(
            grad, x, weight, None, *geometry, self.kernel.groups, wanted
        )
        yield from zip((x, weight), found, strict=False)


def mapped(
    leaves: list[Piece], x: Tensor, values: Values, padding: Sizes, stride: Sizes
) -> Applied:
    """A chain on the map, except for its last link; padded and strided as `Chain.run` does."""
    spatial = [i for i, leaf in enumerate(leaves) if max(leaf.extent) > 1] or [0]
    nothing, one = (0,) * len(padding), (1,) * len(padding)
    for i, leaf in enumerate(leaves):
        here = padding if i == spatial[0] else nothing, stride if i == spatial[-1] else one
        link = Applied(x, kernel_of(leaf, values), *here)
        if i < len(leaves) - 1:
            x = link.value()
    return link


# -- in the kernel ----------------------------------------------------------------------------
class Product:
    """Two kernels that have not been multiplied out; at most one of them has several taps.

    Group by group: where one kernel has more groups than the other, the product with zeros is
    never formed, except for very small groups, which are slower than the zeros.
    """

    def __init__(self, first: Kernel, second: Kernel):
        fine, coarse = max(first.groups, second.groups), min(first.groups, second.groups)
        if first.groups > second.groups and first.weight.shape[1] < BLOCK:
            fine //= gcd(fine // coarse, BLOCK)
            first = kernels.regrouped(first, fine)
        self.form = joined(first, second)
        between = first.out_channels // fine
        if first.groups == fine:
            self.equation = "gortk", "grtil", "gorikl"
            shape = (coarse, -1, fine // coarse, between)
        else:
            self.equation = "grotk", "grtil", "groikl"
            shape = (coarse, fine // coarse, -1, between)
        self.second = second.weight.reshape(*shape, prod(second.size))
        self.first = first.weight.reshape(
            coarse, fine // coarse, between, first.weight.shape[1], prod(first.size)
        )

    def value(self) -> Tensor:
        second, first, product = self.equation
        out = torch.einsum(f"{second},{first}->{product}", self.second, self.first)
        return out.reshape(self.form.out_channels, -1, *self.form.size)

    def gradients(self, grad: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """What it is made of, with its gradient where `grad` is that of the value."""
        second, first, product = self.equation
        sizes = dict(zip(second, self.second.shape, strict=True))
        sizes |= dict(zip(first, self.first.shape, strict=True))
        grad = grad.reshape([sizes[axis] for axis in product])
        if self.second.requires_grad:
            yield self.second, torch.einsum(f"{product},{first}->{second}", grad, self.first)
        if self.first.requires_grad:
            yield self.first, torch.einsum(f"{second},{product}->{first}", self.second, grad)


@dataclass
class Total:
    """A sum of weights and of products that have not been multiplied out, all of one form."""

    done: list[Tensor]
    products: list[Product]

    def value(self) -> Tensor:
        terms = (*self.done, *(product.value() for product in self.products))
        return reduce(torch.add, terms).contiguous()

    def gradients(self, grad: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """What it is made of, with its gradient where `grad` is that of the value."""
        yield from ((weight, grad) for weight in self.done)
        for product in self.products:
            yield from product.gradients(grad)


def kernel_of(piece: Piece, values: Values) -> Kernel:
    """The kernel of one link of a chain, without bias."""
    if isinstance(piece, Sum):
        return form_of(piece).holding(total(piece, list(piece.branches), values).value())
    if isinstance(piece, Scale):
        return form_of(piece).holding(values[piece].view(-1, *(1,) * (piece.dims + 1)))
    if isinstance(piece, Convolution):
        weight = values[piece]
        weight = weight + piece.identity_weight(weight.dtype) if piece.offset else weight
        return form_of(piece).holding(weight)
    dtype = next(iter(values.values())).dtype
    return form_of(piece).holding(piece.kernel(dtype).weight)  # a constant


def composed(first: Kernel, second: Kernel) -> Kernel:
    """`first`, then `second`."""
    if multiplies(first, second):
        product = Product(first, second)
        return product.form.holding(product.value())
    first, second = (
        Kernel(k.weight, k.weight.new_zeros(k.out_channels), k.groups, k.dilation)
        for k in (first, second)
    )
    return kernels.composed(first, second)


def multiplies(first: Kernel, second: Kernel) -> bool:
    """Whether `Product` takes these two: one has a single tap, and the groups divide."""
    groups = sorted((first.groups, second.groups))
    return min(max(first.size), max(second.size)) == 1 and groups[1] % groups[0] == 0


def total(piece: Sum, names: list[str], values: Values) -> Total:
    """The kernel of some branches of a sum, as far as it is cheap."""
    form = reduce(aligned, (form_of(piece.branches[name]) for name in names))
    done, products, filtered = [], [], []
    for name in names:
        chain = [kernel_of(leaf, values) for leaf in flat(piece.branches[name])]
        if name != piece.main and piece in values:
            rate = values[piece].expand(piece.out_channels)
            chain.append(Kernel(rate.view(-1, *(1,) * (piece.dims + 1)), None, len(rate)))
        chain = folded(chain, composed, until=2)
        if len(chain) < 2 or not multiplies(*chain):
            whole = kernels.regrouped(reduce(composed, chain), form.groups)
            done.append(kernels.resized(whole, form.size, form.dilation).weight)
            continue
        first, second = chain
        if gcd(first.groups, second.groups) != form.groups:
            first = kernels.regrouped(first, form.groups)
        if max(second.size) > 1 or (max(first.size) == 1 and weights(second) <= weights(first)):
            second = kernels.resized(second, form.size, form.dilation)
        else:
            first = kernels.resized(first, form.size, form.dilation)
        if max(first.size) == 1 and second.groups == second.in_channels == second.out_channels:
            filtered.append((first, second))
        else:
            products.append(Product(first, second))
    if filtered:
        products.append(Product(*stacked(filtered)))
    return Total(done, products)


def stacked(pairs: list[tuple[Kernel, Kernel]]) -> tuple[Kernel, Kernel]:
    """Pairs of a pointwise and a depthwise kernel as one pair, whose product is their sum."""
    firsts, seconds = zip(*pairs, strict=True)
    first = torch.stack([kernel.weight for kernel in firsts], 1).flatten(0, 1)
    second = torch.cat([kernel.weight for kernel in seconds], 1)
    return (
        Kernel(first, None, firsts[0].groups),
        Kernel(second, None, seconds[0].groups, seconds[0].dilation),
    )


# -- made again -------------------------------------------------------------------------------
def made(form: Callable[..., Applied | Total], *tensors: Tensor) -> Tensor:
    """form(*tensors).value(), of which only the tensors are kept for the backward pass."""
    if torch.compiler.is_compiling():  # it decides itself what is made again
        return form(*tensors).value()
    return Made.apply(form, *tensors)


class Made(torch.autograd.Function):
    """The value of what `form` declares. All but its last step is taken again in the backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(form: Callable[..., Applied | Total], *tensors: Tensor) -> Tensor:
        return form(*tensors).value()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.form, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad: Tensor):
        again, needed = torch.is_grad_enabled(), ctx.needs_input_grad[1:]
        # Aliases: where one tensor depends on another, the gradient must stop between them.
        tensors = [
            t.view_as(t) if again else t.detach().requires_grad_(need)
            for t, need in zip(ctx.saved_tensors, needed, strict=True)
        ]
        with torch.enable_grad(), full_precision(grad):
            unfinished = ctx.form(*tensors)
            with torch.set_grad_enabled(again):
                pairs = [(t, g) for t, g in unfinished.gradients(grad) if t.requires_grad]
            wanted = [t for t, need in zip(tensors, needed, strict=True) if need]
            values, grads = zip(*pairs, strict=True)
            found = torch.autograd.grad(
                values, wanted, grads, create_graph=again, allow_unused=True
            )
        found = iter(found)
        return None, *(next(found) if need else None for need in needed)
