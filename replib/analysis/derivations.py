"""The identities of the field, derived with symbols: both sides, and their difference.

Every function computes the same thing twice: from the definitions (layers one after the other,
written as sums over pixels) and by the code that replib trains and deploys with. The sizes are
small; the values are arbitrary.

Sources: Ding et al., "Diverse Branch Block", CVPR 2021, section 3.2 (transforms I to VI); Fei et
al., "RepAn", CVPR 2024 (inversion and restoration).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import sympy
import torch
import torch.nn.functional as F

from replib import kernels
from replib.analysis.symbolic import LONGEST, Symbolic, channels, formula, places, with_symbols
from replib.blocks import BLOCKS, RepBlock
from replib.branches import AveragePool, Chain, Convolution, Norm, Sum
from replib.kernels import Kernel

Layers = Callable[[Symbolic, tuple[int, ...]], Symbolic]  # of an input and a padding


@dataclass(frozen=True)
class Derivation:
    """Things computed in two ways: what -> (one side, the other), as the headings say."""

    title: str
    pairs: dict[str, tuple[Symbolic, Symbolic]]
    headings: tuple[str, str] = "by the definitions", "by replib's code"

    def differences(self) -> dict[str, Symbolic]:
        """The second side less the first, entry by entry; all 0 proves the identity."""
        return {what: self.difference(what) for what in self.pairs}

    def difference(self, what: str) -> Symbolic:
        """The difference of one pair."""
        first, second = self.pairs[what]
        return (second - first).simplified()

    @property
    def holds(self) -> bool:
        """Whether both sides are the same for all values of their symbols."""
        return not any(self.difference(what).any() for what in self.pairs)

    def _repr_html_(self) -> str:
        """Of every pair: where the sides agree, and one entry of both, one below the other."""
        rows = ""
        for what, difference in self.differences().items():
            everywhere = list(places(difference.shape))
            wrong = [place for place in everywhere if difference.values[place] != 0]
            verdict = f"difference 0<br>in all {len(everywhere)} entries"
            if wrong:
                verdict = f"<b>difference not 0</b><br>in {len(wrong)} of {len(everywhere)} entries"
            place = telling(self.pairs[what], wrong or everywhere)
            formulas = [formula(side.values[place]) for side in self.pairs[what]]
            shown = dict(zip(self.headings, formulas, strict=True))
            if formulas[0] == formulas[1]:
                shown = {"both": formulas[0]}
            lines = (f"<div><small>{side}</small><br>{f}</div>" for side, f in shown.items())
            rows += f"<tr><td>{what} at {list(place)}<br><small>{verdict}</small></td>"
            rows += f"<td>{''.join(lines)}</td></tr>"
        return f'<div class="wide"><table class="formulas">{rows}</table></div>'


def telling(sides: tuple[Symbolic, Symbolic], candidates: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The place with the richest formula that is still short enough to be read."""

    def operations(place: tuple[int, ...]) -> int:
        most = max(side.values[place].count_ops() for side in sides)
        return most if most <= LONGEST else -most

    return max(candidates, key=operations)


# -- DBB's six transforms -------------------------------------------------------------------------
def transform(
    title: str, layers: Layers, kernel: Kernel, image: tuple[int, ...], padding: tuple[int, ...]
) -> Derivation:
    """Layers against the one convolution that replib makes of them.

    The kernel is also read off the layers: an image of one window gives one pixel, whose
    derivative by an input pixel is a weight, and whose value at 0 is the bias.
    """
    dense = kernels.regrouped(kernel, 1)
    weight, bias = dense.weight.zeros_like(), dense.bias.zeros_like()
    window = Symbolic.named("x", 1, kernel.in_channels, *kernel.size)
    pixel = layers(window, (0,) * kernel.dims).values.reshape(-1)
    dark = dict.fromkeys(window.values.flat, 0)
    for o, i, *tap in places(weight.shape):
        weight[(o, i, *tap)] = sympy.diff(pixel[o], window.values[(0, i, *tap)])
        bias[o] = pixel[o].subs(dark)
    x = Symbolic.named("x", 1, kernel.in_channels, *image)
    maps = layers(x, padding), kernels.convolve(x, kernel, padding)
    pairs = {"weight": (weight, dense.weight), "bias": (bias, dense.bias), "output": maps}
    return Derivation(title, pairs)


def normed(x: Symbolic, piece: Norm) -> Symbolic:
    """A norm in eval mode, by its definition."""
    layer = piece.norm
    return F.batch_norm(
        x, layer.running_mean, layer.running_var, layer.weight, layer.bias, eps=layer.eps
    )


def convolution_and_norm() -> Derivation:
    """I: a convolution, then a norm."""
    chain, _ = with_symbols(Chain(Convolution(2, 2, (3,)), Norm(2, 1)).eval())
    conv, norm = chain

    def layers(x, padding):
        return normed(F.conv1d(x, conv.weight, padding=padding), norm)

    return transform("I. convolution, norm", layers, chain.kernel(), (4,), (1,))


def branch_addition() -> Derivation:
    """II: two convolutions side by side, added."""
    both = {name: Convolution(2, 2, (3,), bias=True) for name in "ab"}
    block, _ = with_symbols(Sum(both, main="a"))
    a, b = block.branches.values()

    def layers(x, padding):
        return F.conv1d(x, a.weight, a.bias, 1, padding) + F.conv1d(x, b.weight, b.bias, 1, padding)

    return transform("II. branch addition", layers, block.kernel(), (4,), (1,))


def symbolic_sequence() -> Chain:
    """1x1, norm, k x k, norm of symbols."""
    pieces = Convolution(2, 2, (1,)), Norm(2, 1), Convolution(2, 2, (3,)), Norm(2, 1)
    return with_symbols(Chain(*pieces).eval())[0]


def sequence_layers(chain: Chain, border: str) -> Layers:
    """The four layers one by one; border: where the zeros are put.

    "input": around the image, so that the first two layers see them as well. "between": around
    the map that enters the k x k, as two padded layers of a framework do.
    """
    first, inner, second, last = chain

    def layers(x, padding):
        x = F.pad(x, padding * 2) if border == "input" else x
        x = normed(F.conv1d(x, first.weight), inner)
        x = F.pad(x, padding * 2) if border == "between" else x
        return normed(F.conv1d(x, second.weight), last)

    return layers


def sequence(border: str = "input") -> Derivation:
    """III: 1x1, norm, k x k, norm. With the zeros "between" it is no convolution."""
    chain = symbolic_sequence()
    layers = sequence_layers(chain, border)
    one = transform("III. 1x1, norm, k x k, norm", layers, chain.kernel(), (3,), (1,))
    x = Symbolic.named("x", 1, 2, 3)
    branch = {"as replib trains it": (layers(x, (1,)), chain.run(x, (1,), (1,)))}
    return Derivation(one.title, one.pairs | branch)


def border_error() -> Derivation:
    """What zeros between the layers leave out: the taps outside, times the first layers' bias."""
    chain, x = symbolic_sequence(), Symbolic.named("x", 1, 2, 3)
    right, wrong = (sequence_layers(chain, b)(x, (1,)) for b in ("input", "between"))
    second, bias = chain[3].act(chain[2].kernel()), chain.value_at_zero(2)
    missing = {
        "left pixel": (right[0, :, 0] - wrong[0, :, 0], second.weight[..., 0] @ bias),
        "middle pixel": (right[0, :, 1] - wrong[0, :, 1], bias.zeros_like()),
        "right pixel": (right[0, :, 2] - wrong[0, :, 2], second.weight[..., 2] @ bias),
    }
    missing = {at: (difference.simplified(), side) for at, (difference, side) in missing.items()}
    headings = "zeros at the input less zeros between", "taps outside times bias"
    return Derivation("the border of III", missing, headings)


def depth_concatenation() -> Derivation:
    """IV: convolutions of different input channels, outputs one behind the other.

    That is one convolution with two groups, or with a single group and zeros in between.
    """
    conv, _ = with_symbols(Convolution(2, 2, (3,), groups=2, bias=True))

    def layers(x, padding):
        halves = slice(0, 1), slice(1, 2)
        return torch.cat(
            [F.conv1d(x[:, h], conv.weight[h], conv.bias[h], 1, padding) for h in halves], 1
        )

    return transform("IV. depth concatenation", layers, conv.kernel(), (4,), (1,))


def average_pooling() -> Derivation:
    """V: average pooling."""
    made = AveragePool(2, (3,)).kernel()
    kernel = Kernel(Symbolic(made.weight), Symbolic(made.bias), made.groups)

    def layers(x, padding):
        return F.avg_pool1d(x, (3,), (1,), padding)

    return transform("V. average pooling", layers, kernel, (4,), (1,))


def multi_scale() -> Derivation:
    """VI: 1x1, 1x3 and 3x1 beside a 3x3."""
    sizes = (3, 3), (1, 3), (3, 1), (1, 1)
    branches = {f"{h}x{w}": Convolution(1, 1, (h, w), bias=True) for h, w in sizes}
    block, _ = with_symbols(Sum(branches, main="3x3"))

    def layers(x, padding):
        x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))

        def branch(conv, size):
            rows, columns = (slice(1, -1) if k == 1 else slice(None) for k in size)
            return F.conv2d(x[..., rows, columns], conv.weight, conv.bias)

        return reduce(add, map(branch, block.branches.values(), sizes))

    return transform("VI. several kernel sizes", layers, block.kernel(), (3, 3), (1, 1))


TRANSFORMS: dict[str, Callable[[], Derivation]] = {
    "I": convolution_and_norm,
    "II": branch_addition,
    "III": sequence,
    "IV": depth_concatenation,
    "V": average_pooling,
    "VI": multi_scale,
}


# -- whole blocks ---------------------------------------------------------------------------------
def symbolic_block(family: str, **options) -> RepBlock:
    """A block of symbols in eval mode; one channel, 1-D, 3 taps unless told otherwise."""
    defaults = {"in_channels": 1, "out_channels": 1, "kernel_size": 3, "dims": 1}
    return with_symbols(BLOCKS[family](**defaults | options).eval())[0]


def merged(family: str, **options) -> Derivation:
    """The branches of a block, run one by one and added, against its one kernel."""
    block = symbolic_block(family, **options)
    g = block.geometry
    x = Symbolic.named("x", 1, g.in_channels, *(3,) * g.dims)
    single = kernels.convolve(x, block.kernel(), g.padding, g.stride)
    block.squeezed = False  # or else it would sum its kernels, too, before it convolves
    return Derivation(f"{family}, merged", {"output": (block(x), single)})


def target_of(block: RepBlock) -> Kernel:
    """A kernel of symbols K, B in the form of the block."""
    form = block.kernel()
    weight, bias = Symbolic.named("K", *form.weight.shape), Symbolic.named("B", len(form.bias))
    return Kernel(weight, bias, form.groups, form.dilation)


def restored(
    family: str, fidelity: str = "preserving", norm: str = "unit", **options
) -> Derivation:
    """What a block computes in eval mode once K, B were put into it.

    preserving: K, B. official: K, B and the side branches on top (RepAn as released).
    """
    block = symbolic_block(family, **options)
    target, side = target_of(block), block.side_kernel()
    statistics = Symbolic.named("m", len(target.bias)), Symbolic.named("q", len(target.bias))
    block.restore(target, fidelity, norm, lambda kernel: statistics)
    wanted, kernel = target, block.kernel()
    if fidelity == "official" and side is not None and not block.squeezed:
        side = side * block.rate
        if block.post_norm is not None:
            side = kernels.scaled(side, block.post_norm.affine()[0])
        wanted = target + side
    pairs = {"weight": (wanted.weight, kernel.weight), "bias": (wanted.bias, kernel.bias)}
    return Derivation(f"{family}, {fidelity} restoration", pairs)


# -- train mode -----------------------------------------------------------------------------------
def predicted_in_train_mode(y: Any, bias: Any, layer: Any) -> Any:
    """What a convolution and a norm compute in train mode once a kernel was put into them.

        |gamma| (y - m) / sqrt(q + eps gamma^2 / s^2) + bias + mu gamma / s

    and not y + bias, which is what they compute in eval mode. For a norm with slope gamma, running
    mean mu and deviation s = sqrt(v + eps), as the restoration left them.
    y: the kernel's own output without bias (N, O, *space), of mean m and biased variance q per
    channel over the batch; bias (O,); layer: the norm. Tensors of numbers or of symbols.
    """
    axes = (0, *range(2, y.dim()))
    centred = y - channels(y.sum(axes) / (y.numel() // y.shape[1]), y)
    var = (centred * centred).sum(axes) / (y.numel() // y.shape[1])
    ratio = layer.weight / (layer.running_var + layer.eps).sqrt()
    slope = layer.weight.abs() / (var + layer.eps * ratio * ratio).sqrt()
    return centred * channels(slope, y) + channels(bias + layer.running_mean * ratio, y)


def in_train_mode(norm: str = "unit", pixels: int = 3) -> Derivation:
    """A kernel K, B put into a convolution and a norm, and what these compute in train mode.

    That is y + B with y = K x only after "match" with the statistics of this very batch; else it
    is `predicted_in_train_mode`.
    """
    block = symbolic_block("convbn", kernel_size=1)
    target, x = target_of(block), Symbolic.named("x", 1, 1, pixels)
    y = F.conv1d(x, target.weight)
    mean = y.sum((0, 2)) / pixels
    var = (y * y).sum((0, 2)) / pixels - mean * mean
    block.restore(target, "preserving", norm, lambda kernel: (mean, var))
    if norm == "match":
        wanted = y + channels(target.bias, y)
    else:
        wanted = predicted_in_train_mode(y, target.bias, block.main_branch[1].norm)
    return Derivation(f"{norm}, in train mode", {"output": (wanted, block.train()(x))})
