"""Every squeezed block, evaluated in the cheaper order, computes what its plain form does.

`Sum.run` multiplies out the whole kernel and convolves once: it is the reference.
"""

import copy
import pickle

import pytest
import torch
from test_blocks import DEFAULTS, GEOMETRIES, build, close
from torch.utils.flop_counter import FlopCounterMode

from replib import sharing, squeezing
from replib.blocks import BLOCKS
from replib.blocks.block import Geometry, RepBlock
from replib.branches import AveragePool, Chain, Convolution, Sum

torch.set_num_threads(1)
CASES = GEOMETRIES | {
    "kernel 7": {"kernel_size": 7, "out_channels": 9},
    "odd channels": {"in_channels": 5, "out_channels": 7},
    "many groups": {"in_channels": 18, "out_channels": 12, "groups": 6},
    "dilated 5": {"kernel_size": 5, "dilation": 2, "stride": 2},
    "1-D, kernel 7": {"dims": 1, "kernel_size": 7, "stride": 3},
    "one pixel": {"kernel_size": 5, "padding": 0, "stride": 4},
}


class Novel(RepBlock):
    """Nested chains and sums, a sum with a rate in a chain, every kind of leaf, no name known."""

    main_name = "wide"
    post_normed = squeezable = True

    def declare(self, g: Geometry):
        wide = 2 * g.out_channels
        pool = Sum({"mean": g.average_pool(wide), "itself": g.identity(wide)}, "mean")
        deep = Chain(g.conv(1, out_channels=wide), Chain(pool, g.scale(0.5, wide)))
        layers = Chain(g.scale(0.5, g.in_channels), g.conv(), g.scale(), g.scale(0.7))
        many = Sum({"wide": g.conv(), "layers": layers}, "wide", squeezed=True)
        around = g.conv(1, in_channels=wide)
        return {"wide": Chain(g.conv()), "deep": Chain(deep, around), "many": Chain(many)}


def squeezed_sums(block):
    """Those declared so, and a whole block without norms inside: training squeezes it, too."""
    whole = [block] if len(block.branches) > 1 and sharing.norm_free(block) else []
    return whole or [m for m in block.modules() if isinstance(m, Sum) and m.squeezed]


def made(family, case, monkeypatch, seed=0):
    """A scrambled block, its outermost squeezed sum, and an input."""
    monkeypatch.setitem(GEOMETRIES, case, CASES[case])
    monkeypatch.setitem(BLOCKS, "novel", Novel)
    block, x = build(family, case, seed)
    block.set_rate(0.3)
    return block, squeezed_sums(block)[0], x


def squeezable():
    """Every family with a squeezed sum, in every geometry that it has."""
    for family, kind in {**BLOCKS, "novel": Novel}.items():
        for case, geometry in CASES.items():
            try:
                block = kind(**DEFAULTS | geometry)
            except ValueError:
                continue
            if squeezed_sums(block):
                yield pytest.param(family, case, id=f"{family}-{case}")


BOTH = list(squeezable())
ORDERS = {  # the choice, made for it
    "kernel": lambda chains, before, after: (),
    "map": lambda chains, before, after: tuple(name for name, *_ in chains),
    "main in kernel": lambda chains, before, after: tuple(name for name, *_ in chains[1:]),
    "main on map": lambda chains, before, after: tuple(name for name, *_ in chains[:1]),
    "chosen": squeezing.left_on_map,
}


def outcome(run, piece, x, **geometry):
    """The output, the gradient of the input and of every parameter."""
    x = x.detach().clone().requires_grad_()
    inputs = {"x": x} | dict(piece.named_parameters())
    y = run(piece, x, **geometry)
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
    grads = torch.autograd.grad((y * weights).sum(), inputs.values(), allow_unused=True)
    named = zip(inputs, grads, strict=True)
    return {"y": y} | {name: g for name, g in named if g is not None}


def same(ours, theirs, bound):
    assert ours.keys() == theirs.keys()
    for name in ours:
        close(ours[name], theirs[name], bound, name)


@pytest.mark.parametrize("family, case", BOTH)
def test_outputs_and_gradients_are_those_of_the_plain_form(family, case, monkeypatch):
    block, piece, x = made(family, case, monkeypatch)
    g = block.geometry
    geometry = {"padding": g.padding, "stride": g.stride}
    theirs = outcome(Sum.run, piece, x, **geometry)
    assert squeezing.known(piece) and theirs["y"].std() > 1e-3
    for order in ORDERS.values():
        monkeypatch.setattr(squeezing, "left_on_map", order)
        same(outcome(squeezing.run, piece, x, **geometry), theirs, 1e-12)


@pytest.mark.parametrize("order", ORDERS)
def test_single_precision_is_kept(order, monkeypatch):
    block, piece, x = made("orepa", "wider", monkeypatch)
    block, x, geometry = block.float(), x.float(), {"padding": (1, 1), "stride": (1, 1)}
    monkeypatch.setattr(squeezing, "left_on_map", ORDERS[order])
    ours = outcome(squeezing.run, piece, x, **geometry)
    theirs = outcome(Sum.run, copy.deepcopy(piece).double(), x.double(), **geometry)
    assert all(value.dtype == torch.float32 for value in ours.values())
    same({k: v.double() for k, v in ours.items()}, theirs, 2e-6)  # ten roundings of 6e-8, summed


def test_channels_come_last_or_first(monkeypatch):
    block, piece, x = made("orepa", "strided", monkeypatch)
    geometry = {"padding": (1, 1), "stride": (2, 2)}
    theirs = outcome(Sum.run, piece, x, **geometry)
    block.to(memory_format=torch.channels_last)
    last = x.to(memory_format=torch.channels_last)
    same(outcome(squeezing.run, piece, last, **geometry), theirs, 1e-12)


def test_a_bias_or_a_norm_inside_takes_the_plain_form(monkeypatch):
    for leaf in (Convolution(4, 4, (3, 3), bias=True), BLOCKS["convbn"](4, 4, 3), Leaf(4)):
        piece = Sum({"a": leaf, "b": Convolution(4, 4, (1, 1))}, "a", squeezed=True).double().eval()
        assert not squeezing.known(piece)
        x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
        theirs = Sum.run(piece, x, (1, 1), (1, 1))
        assert torch.equal(squeezing.run(piece, x, (1, 1), (1, 1)), theirs)


class Leaf(AveragePool.__base__.__base__):
    """A kind of piece that nothing else knows."""

    def __init__(self, channels):
        super().__init__()
        self.in_channels = self.out_channels = channels
        self.extent = (1, 1)
        self.inner = Convolution(channels, channels, (1, 1))

    def kernel(self, dtype=torch.float64):
        return self.inner.kernel(dtype)


# -- which order ----------------------------------------------------------------------------------
def orepa_chains(channels, **options):
    return squeezing.chains_of(BLOCKS["orepa"](channels, channels, 3, **options))


def test_the_order_is_chosen_by_the_number_of_pixels():
    chains = orepa_chains(512)
    names = tuple(name for name, *_ in chains)
    assert squeezing.left_on_map(chains, 16, 16) == names
    assert squeezing.left_on_map(chains, 300, 300) == ("1x1_kxk",)  # alone it costs T channels
    assert squeezing.left_on_map(chains, 10**5, 10**5) == ()
    counts = [len(squeezing.left_on_map(chains, 2**n, 2**n)) for n in range(18)]
    assert counts == sorted(counts, reverse=True)
    # What comes before a stride sees more pixels: less is gained on the map.
    assert squeezing.left_on_map(chains, 4 * 400, 400) == ()
    assert squeezing.left_on_map(chains, 400, 400) == ("1x1_kxk",)
    # A sum inside a chain is a kernel of its own already.
    assert squeezing.left_on_map(squeezing.chains_of(BLOCKS["orepa_stem"](8, 8)), 1, 1) == ()


@pytest.mark.parametrize("groups", [(1, 1), (2, 2), (4, 1), (1, 4), (4, 2), (2, 4)])
@pytest.mark.parametrize("sizes", [(1, 3), (3, 1), (1, 1)])
def test_the_multiply_adds_are_those_counted(groups, sizes):
    """A B / T in any grouping, since no zeros are multiplied."""
    layers = [
        Convolution(16, 32, (k, k), groups=g) if i == 0 else Convolution(32, 24, (k, k), groups=g)
        for i, (k, g) in enumerate(zip(sizes, groups, strict=True))
    ]
    forms = [squeezing.form_of(layer) for layer in layers]
    with FlopCounterMode(display=False) as counter:
        pairs = zip(forms, layers, strict=True)
        product = squeezing.Product(*(squeezing.Weight(f, c.weight) for f, c in pairs))
        weight = product.value()
    moved = squeezing.MOVED * weight.numel()
    assert counter.get_total_flops() == 2 * (squeezing.product_cost(*forms) - moved)
    assert product.form == squeezing.joined(*forms)


def test_scales_are_folded_into_the_smaller_side():
    """Into the fixed filters, not into a kernel; into the second convolution, not the product."""
    for name, chain, _ in orepa_chains(64):
        steps, _ = squeezing.order(chain)
        if len(steps) > 1:
            assert steps[0] == 1, name


# -- what is kept and what is made again ----------------------------------------------------------
def kept(piece, x, *geometry):
    """The sizes of what is saved for the backward pass, besides parameters and x."""
    own = {t.untyped_storage().data_ptr() for t in [*piece.parameters(), x]}
    sizes = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        squeezing.run(piece, x, *geometry)
    return sorted(size for size in sizes.values() if size > x.itemsize)  # lambda is one number


@pytest.mark.parametrize("family", ["orepa", "orepa_stem", "expandnet"])
def test_only_the_weights_and_the_kernel_are_kept(family, monkeypatch):
    monkeypatch.setattr(squeezing, "left_on_map", ORDERS["kernel"])
    piece = BLOCKS[family](8, 12, 5).double()
    x = torch.randn(2, 8, 9, 9, dtype=torch.float64, requires_grad=True)
    assert kept(piece, x, (2, 2), (1, 1)) == [12 * 8 * 25 * x.itemsize]


def test_the_backward_pass_multiplies_nothing_out_again(monkeypatch):
    _, piece, x = made("orepa", "plain", monkeypatch)
    monkeypatch.setattr(squeezing, "left_on_map", ORDERS["kernel"])
    y = squeezing.run(piece, x, (1, 1), (1, 1))
    monkeypatch.setattr(squeezing.Total, "value", None)
    y.sum().backward()


def test_weights_changed_before_the_backward_pass_are_noticed(monkeypatch):
    _, piece, x = made("orepa", "plain", monkeypatch)
    monkeypatch.setattr(squeezing, "left_on_map", ORDERS["kernel"])
    y = squeezing.run(piece, x, (1, 1), (1, 1))
    with torch.no_grad():
        piece.main_branch[0].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_frozen_weights_take_no_gradient(monkeypatch):
    _, piece, x = made("orepa", "plain", monkeypatch)
    monkeypatch.setattr(squeezing, "left_on_map", ORDERS["kernel"])
    plain = outcome(Sum.run, piece, x, padding=(1, 1), stride=(1, 1))

    def multiply_adds():
        y = squeezing.run(piece, x, (1, 1), (1, 1))
        with FlopCounterMode(display=False) as counter:
            (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
        return counter.get_flop_counts()["Global"][torch.ops.aten.bmm]

    every = multiply_adds()
    piece.zero_grad()
    piece.branches.requires_grad_(False)
    assert not squeezing.run(piece, x, (1, 1), (1, 1)).requires_grad
    free = piece.branches["separable"][0].weight.requires_grad_()
    assert multiply_adds() < every / 3
    close(free.grad, plain["branches.separable.0.weight"])
    assert [p for p in piece.parameters() if p.grad is not None] == [free]


@pytest.mark.parametrize("order", ["kernel", "main on map"])
def test_second_derivatives(order, monkeypatch):
    """Of a block behind itself: its input depends on the same weights."""
    _, piece, x = made("orepa", "plain", monkeypatch)
    monkeypatch.setattr(squeezing, "left_on_map", ORDERS[order])

    def second(run):
        start = x.clone().requires_grad_()
        inputs = [start, *piece.parameters()]
        y = run(piece, run(piece, start, (1, 1), (1, 1)), (1, 1), (1, 1))
        first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True, allow_unused=True)
        length = sum(grad.square().sum() for grad in first if grad is not None)
        return torch.autograd.grad(length, inputs, allow_unused=True)

    for ours, theirs in zip(second(squeezing.run), second(Sum.run), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            close(ours, theirs, 1e-12)


def test_second_derivatives_stop_at_the_weights():
    """Where one weight is computed from another, each gradient counts its own part only."""

    def second(product):
        first = torch.linspace(-1, 2, 12, dtype=torch.float64).view(4, 3).requires_grad_()
        y = product(first, first.sin().sum(1, keepdim=True))
        (grad,) = torch.autograd.grad(y.square().sum(), first, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), first)[0]

    def made(weight, factor):
        return squeezing.Made.apply(
            lambda *tensors: squeezing.Total([], [squeezing.Scaled(*tensors)]), weight, factor
        )

    close(second(made), second(torch.mul))


@pytest.mark.parametrize("order", ["kernel", "main on map"])
def test_gradients_of_every_image_at_once(order, monkeypatch):
    _, piece, x = made("orepa", "plain", monkeypatch)
    monkeypatch.setattr(squeezing, "left_on_map", ORDERS[order])
    weights = {name: p.detach() for name, p in piece.branches.named_parameters()}

    def loss(weights, image):
        y = torch.func.functional_call(Runs(piece), weights, (image[None],))
        return y.square().mean()

    gradients = torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, x)
    for i, image in enumerate(x):
        piece.zero_grad()
        Sum.run(piece, image[None], (1, 1), (1, 1)).square().mean().backward()
        for name, p in piece.branches.named_parameters():
            close(gradients[name][i], p.grad, 1e-12, name)


class Runs(torch.nn.Module):
    """A sum as a module of its own, so that its weights can be replaced for one call."""

    def __init__(self, piece):
        super().__init__()
        object.__setattr__(self, "piece", piece)
        self._modules = piece.branches._modules

    def forward(self, x):
        return squeezing.run(self.piece, x, (1, 1), (1, 1))


def test_the_kernel_is_made_in_full_precision_under_autocast(monkeypatch):
    block, piece, _ = made("orepa", "plain", monkeypatch)
    block, x = block.float(), torch.randn(1, 6, 3, 3)  # so small that the map would be chosen
    names = squeezing.left_on_map(squeezing.chains_of(piece), 9, 9)
    assert names == tuple(piece.branches)
    copied = copy.deepcopy(piece).double()
    exact = copied.branches_kernel().weight
    weights = torch.linspace(-1, 2, exact.numel()).view(exact.shape)
    (exact * weights).sum().backward()
    monkeypatch.setattr(squeezing.kernels, "convolve", lambda x, kernel, *rest: kernel.weight)
    with torch.autocast("cpu", torch.bfloat16):
        kernel = squeezing.run(piece, x, (1, 1), (1, 1))
        (kernel * weights).sum().backward()
    close(kernel.double(), exact, 1e-6)
    for ours, theirs in zip(piece.parameters(), copied.parameters(), strict=True):
        if ours.grad is not None:
            close(ours.grad.double(), theirs.grad, 1e-6)


def test_copies_pickles_and_meta_tensors(monkeypatch):
    _, piece, x = made("orepa", "grouped", monkeypatch)
    y = squeezing.run(piece, x, (1, 1), (1, 1))
    for other in (copy.deepcopy(piece), pickle.loads(pickle.dumps(piece))):
        assert torch.equal(squeezing.run(other, x, (1, 1), (1, 1)), y)
    for order in ORDERS.values():
        monkeypatch.setattr(squeezing, "left_on_map", order)
        shape = squeezing.run(copy.deepcopy(piece).to("meta"), x.to("meta"), (1, 1), (1, 1)).shape
        assert shape == y.shape


@pytest.mark.slow
@pytest.mark.filterwarnings("error:Dynamo detected")
def test_it_compiles_as_one_graph(monkeypatch):
    block, piece, x = made("orepa", "plain", monkeypatch)
    block.float()
    some = ("prior", "1x1_kxk")
    monkeypatch.setattr(squeezing, "left_on_map", lambda chains, before, after: some)

    def plain(piece, x, padding, stride):
        return Sum.run(piece, x, padding, stride)

    def compiled(piece, x, padding, stride):
        def run(x):
            return squeezing.run(piece, x, padding, stride)

        # One graph, forward and backward; what a compiler makes of it is the compiler's.
        return torch.compile(run, fullgraph=True, backend="aot_eager")(x)

    geometry = {"padding": (1, 1), "stride": (1, 1)}
    ours, theirs = (outcome(run, piece, x.float(), **geometry) for run in (compiled, plain))
    same(ours, theirs, 1e-5)
