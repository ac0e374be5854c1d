"""A sum of linear branches without norms, evaluated in the cheaper order.

Such a sum (OREPA's) is one convolution, whose kernel is a sum of products of weights. A branch
L_n ... L_1 x may be multiplied out from either end: into one kernel, at a cost that does not
depend on the batch, or onto the feature map, at a cost per pixel. This is the matrix-chain-order
problem with the map as the last matrix; it is decided from shapes, branch by branch:

    y = K * x + sum of L_n * (... (L_1 * x)) over the branches left on the map
    K = sum of L_n o ... o L_1 over all others

Two kernels of A and B weights with T channels between them are multiplied out with A B / T
multiply-adds, in any grouping. A scale or a fixed filter is a depthwise kernel, so taking the
cheapest neighbours first folds it into the smaller side by itself. Of the making of K nothing
but the weights it is made of is kept for the backward pass.

Source: Hu et al., "Online Convolutional Re-parameterization", CVPR 2022, section 3.2, which
multiplies out every kernel. `Sum.run` is that plain form, and the reference of this one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, reduce, wraps
from itertools import pairwise
from math import gcd, prod
from operator import add
from typing import NamedTuple

import torch
from torch import Tensor

from replib import kernels
from replib.branches import AveragePool, Chain, Convolution, Filter, Piece, Scale, Sizes, Sum
from replib.kernels import Kernel

MOVED = 16  # multiply-adds that take as long as reading and writing one number
DECLARED = 3 * 10**7  # multiply-adds in the time that describing a kernel of any size takes
BLOCK = 4  # inputs of a depthwise kernel that are multiplied as one matrix, zeros included

Values = dict[Piece, Tensor]  # the weight of each leaf, and the rate of each sum that has one


def run(piece: Sum, x: Tensor, padding: Sizes, stride: Sizes) -> Tensor:
    """What `Sum.run` computes for a squeezed sum, up to rounding, with less work and memory.

    (N, in_channels, *space) -> (N, out_channels, *space'), before the post-norm of a block.
    A sum with a bias, a norm or a new kind of leaf inside takes the plain form.
    """
    if not known(piece):
        return Sum.run(piece, x, padding, stride)
    axes = zip(x.shape[2:], padding, piece.extent, stride, strict=True)
    before = len(x) * prod(x.shape[2:])
    after = len(x) * prod([(size + 2 * p - e) // s + 1 for size, p, e, s in axes])
    # Autocast rounds every map: there the kernel is made, in full precision, whatever the batch.
    cast = not x.is_meta and torch.is_autocast_enabled(x.device.type)
    chains = chains_of(piece)
    on_map = () if cast else left_on_map(chains, before, after)

    def margin(extent: Sizes) -> Sizes:
        """The padding of what is centred in the sum."""
        axes = zip(padding, piece.extent, extent, strict=True)
        return tuple(p - (big - e) // 2 for p, big, e in axes)

    def out(name: str) -> Tensor:
        branch = piece.branches[name]
        return branch.run(x, margin(branch.extent), stride)

    mains = [out(name) for name in on_map if name == piece.main]
    sides = [out(name) for name in on_map if name != piece.main]
    squeezed = tuple(chain for chain in chains if chain[0] not in on_map)
    if squeezed:
        form = whole(squeezed)
        with full_precision(x):
            kernel = form.holding(made(piece, squeezed))
        mains.append(kernels.convolve(x, kernel, margin(form.extent), stride))
    main = reduce(add, mains)
    return piece.weighted(main, reduce(add, sides)) if sides else main


def known(piece: Sum) -> bool:
    """Whether everything inside is a linear map of a kind that is known here."""
    leaves = [leaf for branch in piece.branches.values() for leaf in flat(branch)]
    return all(
        known(leaf)
        if isinstance(leaf, Sum) and getattr(leaf, "post_norm", None) is None
        else isinstance(leaf, Convolution | Scale | Filter) and not leaf.carries_bias
        for leaf in leaves
    )


def flat(piece: Piece) -> list[Piece]:
    """The links of a chain, and of the chains in it."""
    return [leaf for part in piece for leaf in flat(part)] if isinstance(piece, Chain) else [piece]


def full_precision(x: Tensor) -> AbstractContextManager:
    """Without autocast; meta tensors have none to turn off."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


# -- which order ----------------------------------------------------------------------------------
class Form(NamedTuple):
    """The shape of a kernel: enough to count with, before there is one."""

    out_channels: int
    in_channels: int
    groups: int
    size: Sizes
    dilation: Sizes

    @property
    def extent(self) -> Sizes:
        return tuple(d * (k - 1) + 1 for k, d in zip(self.size, self.dilation, strict=True))

    @property
    def weights(self) -> int:
        """How many numbers the weight has."""
        return self.out_channels * self.in_channels // self.groups * prod(self.size)

    @property
    def depthwise(self) -> bool:
        return self.groups == self.in_channels == self.out_channels

    def holding(self, weight: Tensor) -> Kernel:
        """A kernel of this form, without bias."""
        return Kernel(weight, None, self.groups, self.dilation)


def remembered(function: Callable) -> Callable:
    """The function with a memory, which torch.compile, which would warn of it, does not see."""
    remembering = lru_cache(function)

    @wraps(function)
    def either(*arguments):
        return (function if torch.compiler.is_compiling() else remembering)(*arguments)

    return either


Forms = tuple[Form, ...]
Chains = tuple[tuple[str, Forms, bool], ...]


def form_of(piece: Piece) -> Form:
    """The form of the kernel of a piece."""
    if isinstance(piece, Chain):
        return reduce(joined, map(form_of, piece))
    if isinstance(piece, Sum):
        return summed(tuple(map(form_of, piece.branches.values())))
    out_channels, in_channels = piece.out_channels, piece.in_channels
    if isinstance(piece, Scale):
        ones = (1,) * len(piece.extent)
        return Form(out_channels, in_channels, in_channels, ones, ones)
    size = tuple(piece.weight.shape[2:])
    dilation = tuple(d if k > 1 else 1 for k, d in zip(size, piece.dilation, strict=True))
    groups = piece.groups if isinstance(piece, Convolution) else in_channels
    return Form(out_channels, in_channels, groups, size, dilation)


@remembered
def joined(first: Form, second: Form) -> Form:
    """The form of `first`, then `second`."""
    dilation = kernels.common_dilation(first, second)
    sizes = zip(*(kernels.sizes_at(form, dilation) for form in (first, second)), strict=True)
    size = tuple(a + b - 1 for a, b in sizes)
    groups = gcd(first.groups, second.groups)
    return Form(second.out_channels, first.in_channels, groups, size, dilation)


@remembered
def summed(forms: Forms) -> Form:
    """The form of the sum."""

    def aligned(a: Form, b: Form) -> Form:
        dilation = kernels.common_dilation(a, b)
        size = tuple(map(max, kernels.sizes_at(a, dilation), kernels.sizes_at(b, dilation)))
        return Form(a.out_channels, a.in_channels, gcd(a.groups, b.groups), size, dilation)

    return reduce(aligned, forms)


def product_cost(first: Form, second: Form) -> float:
    """Of multiplying out two kernels, in multiply-adds."""
    multiply_adds = first.weights * second.weights / first.out_channels
    return multiply_adds + MOVED * joined(first, second).weights


def map_cost(form: Form, pixels: int) -> float:
    """Of convolving a map with a kernel, in multiply-adds; pixels: of all outputs together."""
    return form.weights * pixels + MOVED * (form.weights + form.out_channels * pixels)


@remembered
def order(chain: Forms) -> tuple[tuple[int, ...], float]:
    """Which neighbours to multiply out, one pair after the other, the cheapest first; the cost."""
    steps, cost = (), 0.0
    while len(chain) > 1:
        costs = [product_cost(*pair) for pair in pairwise(chain)]
        i = costs.index(min(costs))
        chain = (*chain[:i], joined(*chain[i : i + 2]), *chain[i + 2 :])
        steps, cost = (*steps, i), cost + min(costs)
    return steps, cost


def chains_of(piece: Sum) -> Chains:
    """Per branch its name, the forms of its links, and whether it must be in the kernel."""
    links = {name: flat(branch) for name, branch in piece.branches.items()}
    return tuple(
        (name, tuple(map(form_of, leaves)), any(isinstance(leaf, Sum) for leaf in leaves))
        for name, leaves in links.items()
    )


@remembered
def whole(chains: Chains) -> Form:
    """The form of the sum of some branches."""
    return summed(tuple(reduce(joined, chain) for _, chain, _ in chains))


@remembered
def left_on_map(chains: Chains, before: int, after: int) -> tuple[str, ...]:
    """The branches that are cheaper on a map of so many pixels before and after the stride."""
    form = whole(chains)
    on_map, cheaper, with_kernel = 0.0, [], DECLARED + map_cost(form, after)
    for name, chain, fixed in chains:
        in_kernel = MOVED * form.weights + order(chain)[1]
        last = max([i for i, link in enumerate(chain) if max(link.size) > 1], default=0)
        cost = sum(map_cost(link, after if i >= last else before) for i, link in enumerate(chain))
        cost = float("inf") if fixed else cost + MOVED * after * form.out_channels
        if cost < in_kernel:
            cheaper.append(name)
        on_map, with_kernel = on_map + cost, with_kernel + min(cost, in_kernel)
    return tuple(cheaper if with_kernel < on_map else (name for name, *_ in chains))


# -- the kernel -----------------------------------------------------------------------------------
class Weight(NamedTuple):
    """A weight in the form of its kernel."""

    form: Form
    tensor: Tensor

    def regrouped(self, groups: int) -> Weight:
        if groups == self.form.groups:
            return self
        kernel = kernels.regrouped(self.form.holding(self.tensor), groups)
        return Weight(self.form._replace(groups=groups), kernel.weight)

    def resized(self, form: Form) -> Weight:
        if form[3:] == self.form[3:]:
            return self
        kernel = kernels.resized(self.form.holding(self.tensor), form.size, form.dilation)
        return Weight(self.form._replace(size=form.size, dilation=form.dilation), kernel.weight)


@remembered
def multiplies(first: Form, second: Form) -> bool:
    """Whether two kernels are a batch of matrices: one has a single tap, the groups divide."""
    groups = sorted((first.groups, second.groups))
    return min(max(first.size), max(second.size)) == 1 and groups[1] % groups[0] == 0


class Product:
    """Two kernels that have not been multiplied out yet; at most one of them has several taps.

    Group by group, as a batch of matrices: where one kernel has more groups than the other, no
    zeros are multiplied, except in blocks of a few channels, which are faster than single ones.
    """

    def __init__(self, first: Weight, second: Weight):
        fine, coarse = first.form.groups, second.form.groups
        if fine > coarse and first.form.in_channels // fine < BLOCK:
            first = first.regrouped(fine // gcd(fine // coarse, BLOCK))
        a, b = first.form, second.form
        fine, coarse = max(a.groups, b.groups), min(a.groups, b.groups)
        inside, between, taps = fine // coarse, a.out_channels // fine, prod(b.size)
        self.form = joined(a, b)
        # A group of the product holds `inside` groups of the finer kernel: along its inputs where
        # that is the first one, along its outputs where it is the second.
        along_inputs = a.groups == fine
        outer = (b.out_channels // coarse, inside) if along_inputs else (inside, -1)
        left = second.tensor.reshape(coarse, *outer, between, taps)
        left = left.permute((0, 2, 1, 4, 3) if along_inputs else (0, 1, 2, 4, 3))
        self.split = *left.shape[:4], a.in_channels // a.groups, prod(a.size)
        self.turn = (0, 2, 1, 4, 3, 5) if along_inputs else (0, 1, 2, 4, 3, 5)  # its own inverse
        self.left = left.reshape(fine, -1, between)
        self.right = first.tensor.reshape(fine, between, -1)

    def value(self) -> Tensor:
        out = torch.bmm(self.left, self.right).view(self.split).permute(self.turn)
        # A sum of differently strided tensors takes ten times as long as a copy.
        return out.reshape(self.form.out_channels, -1, *self.form.size).contiguous()

    def gradients(self, grad: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Each factor with its gradient, where `grad` is that of the value."""
        grad = grad.reshape([self.split[axis] for axis in self.turn]).permute(self.turn)
        grad = grad.reshape(len(self.left), self.left.shape[1], -1)
        if self.left.requires_grad:
            yield self.left, torch.bmm(grad, self.right.mT)
        if self.right.requires_grad:
            yield self.right, torch.bmm(self.left.mT, grad)


class Scaled(NamedTuple):
    """A weight, and a factor per output channel that it has not been multiplied with yet."""

    weight: Tensor
    factor: Tensor

    def value(self) -> Tensor:
        return self.weight * self.factor

    def gradients(self, grad: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Each factor with its gradient, where `grad` is that of the value."""
        if self.weight.requires_grad:
            yield self.weight, grad * self.factor
        if self.factor.requires_grad:
            yield self.factor, (grad * self.weight).flatten(1).sum(1).view_as(self.factor)


class Total(NamedTuple):
    """A sum of weights and of products that have not been multiplied out yet, of one form."""

    done: list[Tensor]
    products: list[Product | Scaled]

    def value(self) -> Tensor:
        return reduce(add, [*self.done, *(product.value() for product in self.products)])

    def gradients(self, grad: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Each part with its gradient, where `grad` is that of the value."""
        yield from ((weight, grad) for weight in self.done if weight.requires_grad)
        for product in self.products:
            yield from product.gradients(grad)


def total(piece: Sum, chains: Chains, values: Values) -> Total:
    """The kernel of some branches of a sum, except for the last product of each."""
    form, ones = whole(chains), (1,) * piece.dims
    done, products, filtered = [], [], []
    for name, forms, _ in chains:
        links = zip(flat(piece.branches[name]), forms, strict=True)
        chain = [weight_of(leaf, leaf_form, values) for leaf, leaf_form in links]
        if name != piece.main and piece in values:
            channels = form.out_channels
            rate = values[piece].expand(channels).view(-1, 1, *ones)
            chain.append(Weight(Form(channels, channels, channels, ones, ones), rate))
        for i in order(tuple(weight.form for weight in chain))[0]:
            if len(chain) > 2 or not multiplies(*(weight.form for weight in chain)):
                chain[i : i + 2] = [composed(*chain[i : i + 2])]
        if len(chain) == 1:
            done.append(chain[0].regrouped(form.groups).resized(form).tensor)
            continue
        first, second = chain
        if gcd(first.form.groups, second.form.groups) != form.groups:
            first = first.regrouped(form.groups)
        lighter = max(first.form.size) == 1 and second.form.weights <= first.form.weights
        if max(second.form.size) > 1 or lighter:
            second = second.resized(form)
        else:
            first = first.resized(form)
        if max(first.form.size) == 1 and second.form.depthwise:
            filtered.append((first, second))
        else:
            products.append(product(first, second))
    return Total(done, [*products, Product(*stacked(filtered))] if filtered else products)


def stacked(pairs: list[tuple[Weight, Weight]]) -> tuple[Weight, Weight]:
    """Pairs of a pointwise and a depthwise kernel as one pair, whose product is their sum."""
    firsts, seconds = zip(*pairs, strict=True)
    first, second = firsts[0].form, seconds[0].form
    wide = second.out_channels * len(pairs)
    return (
        Weight(
            first._replace(out_channels=wide),
            torch.stack([weight.tensor for weight in firsts], 1).flatten(0, 1),
        ),
        Weight(
            second._replace(in_channels=wide), torch.cat([weight.tensor for weight in seconds], 1)
        ),
    )


def weight_of(piece: Piece, form: Form, values: Values) -> Weight:
    """The kernel of one link of a chain."""
    if isinstance(piece, Sum):
        return Weight(form, total(piece, chains_of(piece), values).value())
    if isinstance(piece, Scale):
        return Weight(form, values[piece].view(-1, *(1,) * (piece.dims + 1)))
    if isinstance(piece, Convolution):
        stored = values[piece]
        return Weight(form, stored + offset(piece) if piece.offset else piece.effective(stored))
    dtype = next(iter(values.values())).dtype  # what remains is a fixed filter
    exact = piece.kernel(dtype).weight if isinstance(piece, AveragePool) else piece.weight.to(dtype)
    return Weight(form, exact)


def offset(piece: Convolution) -> Tensor:
    """What `Convolution.effective` adds, in two steps where there is one tap."""
    weight = piece.weight
    if max(piece.extent) > 1:
        return piece.identity_weight(weight.dtype)
    return identities(*weight.shape[:2], weight.dtype, weight.device).view(weight.shape)


@remembered
def identities(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Identity matrices one below the other; a constant, which nobody writes to."""
    return torch.eye(columns, dtype=dtype, device=device).repeat(rows // columns, 1)


def product(first: Weight, second: Weight) -> Product | Scaled:
    """`first`, then `second`, not multiplied out yet."""
    if second.form.depthwise and max(second.form.size) == 1:
        return Scaled(first.tensor, second.tensor)
    return Product(first, second)


def composed(first: Weight, second: Weight) -> Weight:
    """`first`, then `second`."""
    if multiplies(first.form, second.form):
        return Weight(joined(first.form, second.form), product(first, second).value())
    kernel = kernels.composed(
        *(
            Kernel(w.tensor, w.tensor.new_zeros(len(w.tensor)), w.form.groups, w.form.dilation)
            for w in (first, second)
        )
    )
    return Weight(joined(first.form, second.form), kernel.weight)


# -- made again -----------------------------------------------------------------------------------
def made(piece: Sum, chains: Chains) -> Tensor:
    """The weight of the summed kernel of some branches, in the dtype of the parameters."""
    dtype = next(piece.parameters()).dtype
    values = {part: value.to(dtype) for part, value in values_in(piece)}

    def kernel(*tensors: Tensor) -> Total:
        return total(piece, chains, dict(zip(values, tensors, strict=True)))

    if torch.compiler.is_compiling():  # it decides itself what is kept and what is made again
        return kernel(*values.values()).value()
    return Made.apply(kernel, *values.values())


def values_in(piece: Sum) -> Iterator[tuple[Piece, Tensor]]:
    """The weight of every leaf inside, and the rate of every sum that weighs its side branches."""
    if type(piece).weighted is not Sum.weighted:
        weight = next(piece.parameters())
        one = torch.ones((), device=weight.device, dtype=weight.dtype)
        yield piece, piece.weighted(torch.zeros_like(one), one)
    for branch in piece.branches.values():
        for leaf in flat(branch):
            if isinstance(leaf, Sum):
                yield from values_in(leaf)
            elif not isinstance(leaf, Filter):
                yield leaf, leaf.weight


class Made(torch.autograd.Function):
    """The value of a `Total`, of which only the weights are kept.

    The backward pass declares it again, folds the scales again, and multiplies nothing out.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(kernel: Callable[..., Total], *tensors: Tensor) -> Tensor:
        weight = kernel(*tensors).value()
        return weight.view_as(weight)  # it may be one of the tensors

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.kernel, *tensors = inputs
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
            declared = ctx.kernel(*tensors)
            with torch.set_grad_enabled(again):
                parts, grads = zip(*declared.gradients(grad), strict=True)
            wanted = [t for t, need in zip(tensors, needed, strict=True) if need]
            found = torch.autograd.grad(parts, wanted, grads, create_graph=again, allow_unused=True)
        found = iter(found)
        return None, *(next(found) if need else None for need in needed)
