"""The picture of the kernels that a block merges: branch + branch + ... = one kernel, as an SVG.

Every branch is shown as the kernel that it contributes, in the size of the block: with its norms
folded in, times λ, and times the factor of a norm after the sum. Hence the numbers add up. Below
them stands how large the taps are on average over all channels, the quantity of the pictures of
ACNet (Ding et al., ICCV 2019) and DBB (Ding et al., CVPR 2021).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import chain, product

import torch
from torch import Tensor

from replib.blocks import RepBlock
from replib.kernels import Kernel, scaled
from replib.report.diagram import (
    INK,
    LINE,
    MARGIN,
    MUTED,
    per_axis,
    svg,
    text,
    text_width,
    title_of,
)

DIVERGING = ("#2166ac", "#92c5de", "#f7f7f7", "#f4a582", "#b2182b")  # ColorBrewer RdBu, reversed
MAGNITUDE = ("#fcfbfd", "#dadaeb", "#9e9ac8", "#6a51a3", "#3f007d")  # ColorBrewer Purples
SHIFT = "shift of the norm"  # the part of the bias that belongs to no branch
MERGED = "merged"
MAP, LARGEST, SMALLEST = 90, 26, 3  # width of a map; bounds of the side of a tap, in pixels
ROOM_FOR_NUMBERS = 18  # the least side of a tap in which its value is printed
SIGN, GUTTER, BETWEEN = 24, 92, 12  # width of a sign and of the row's label; height between rows


@torch.no_grad()
def branch_kernels(block: RepBlock) -> dict[str, Kernel]:
    """What every branch contributes to `block.merged()`, main first; float64, they add up to it.

    Each has the size, dilation and groups of the block. A norm after the sum multiplies all of
    them; its shift is one more entry, of weight 0 and named `SHIFT`.
    """
    if not isinstance(block, RepBlock):
        raise TypeError(
            f"block (={type(block).__name__}) must be a RepBlock: others merge into no convolution."
        )
    rates = dict.fromkeys(block.side_branches, block.rate.double())
    found = {
        name: block.in_own_form(block.branches[name].kernel()) * rates.get(name, 1.0)
        for name in (block.main, *block.side_branches)
    }
    if block.post_norm is not None:
        factor, shift = block.post_norm.affine()
        found = {name: scaled(kernel, factor) for name, kernel in found.items()}
        found[SHIFT] = scaled(found[block.main] * 0, factor, shift)
    return found


def channel_pairs(
    block: RepBlock, outputs: Sequence[int] | None = None, inputs: Sequence[int] | None = None
) -> list[tuple[int, int]]:
    """(output, input) channels that are connected; by default the first two of each.

    The inputs default to the first two of the group of each output.
    Raises: ValueError for channels that the block does not have, and where none are connected.
    """
    g = block.geometry
    per_group = {"in": g.in_channels // g.groups, "out": g.out_channels // g.groups}
    outputs = range(min(2, g.out_channels)) if outputs is None else outputs
    for name, chosen, count in (
        ("outputs", outputs, g.out_channels),
        ("inputs", inputs or (), g.in_channels),
    ):
        if any(not 0 <= channel < count for channel in chosen):
            raise ValueError(f"{name} (={tuple(chosen)}) must be channels from 0 to {count - 1}.")
    pairs = []
    for output in outputs:
        first = output // per_group["out"] * per_group["in"]
        group = range(first, first + per_group["in"])
        pairs += [(output, i) for i in (group[:2] if inputs is None else inputs) if i in group]
    if not pairs:
        raise ValueError(
            f"outputs (={tuple(outputs)}) and inputs (={tuple(inputs or ())}) have no pair in one "
            f"group: there are {g.groups} groups of {per_group['in']} inputs and "
            f"{per_group['out']} outputs each."
        )
    return pairs


# -- colours and numbers --------------------------------------------------------------------------
@dataclass(frozen=True)
class ColourScale:
    """Colours, evenly spread over the values from `low` to `high`."""

    colours: tuple[str, ...]
    low: float
    high: float

    @classmethod
    def of(cls, colours: tuple[str, ...], tensors: Iterable[Tensor], signed: bool) -> ColourScale:
        """The common scale of some tensors, from 0 or, with a sign, centred at 0.

        Raises: ValueError where one is not finite.
        """
        largest = torch.stack([tensor.abs().max() for tensor in tensors]).max().item() or 1.0
        if not math.isfinite(largest):
            raise ValueError("the kernels of the block are not finite: the network has diverged.")
        return cls(colours, -largest if signed else 0.0, largest)

    def rgb(self, value: float) -> list[int]:
        """The colour of a value: linear between the neighbouring ones of the scale."""
        place = (value - self.low) / (self.high - self.low) * (len(self.colours) - 1)
        i = min(int(place), len(self.colours) - 2)
        ends = [[int(c[k : k + 2], 16) for k in (1, 3, 5)] for c in self.colours[i : i + 2]]
        return [round(a + (b - a) * (place - i)) for a, b in zip(*ends, strict=True)]

    def colour(self, value: float) -> str:
        """The same for an attribute."""
        return "#" + bytes(self.rgb(value)).hex()

    def ink(self, value: float) -> str:
        """A colour for words on top of a value's colour."""
        red, green, blue = self.rgb(value)
        return INK if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else "#fff"

    @property
    def unit(self) -> float:
        """The power of ten in which the largest value is a number from 20 to 199."""
        return 10.0 ** (math.floor(math.log10(self.high / 2)) - 1)


def minus(number: str) -> str:
    """A number with a true minus sign, and none on a zero."""
    return number.replace("-", "\N{MINUS SIGN}") if float(number) else number.lstrip("-")


# -- one kernel -----------------------------------------------------------------------------------
def in_slices(values: tuple[int, ...], fill: int) -> tuple[int, int, int]:
    """(slice, row, column) of a size or an index per axis, in 1-D, 2-D or 3-D."""
    return ((fill, fill, *values))[-3:]


def side_of(size: tuple[int, ...]) -> int:
    """The side of a tap, in pixels; the slices of a 3-D kernel stand side by side."""
    slices, height, width = in_slices(size, 1)
    return max(SMALLEST, min(LARGEST, MAP // max(slices * width, height)))


def map_size(size: tuple[int, ...]) -> tuple[int, int]:
    """(width, height) of a heat map in pixels."""
    (slices, height, width), side = in_slices(size, 1), side_of(size)
    return slices * width * side + (slices - 1) * side // 2, height * side


def heat_map(x: float, y: float, values: Tensor, scale: ColourScale, name: str) -> str:
    """A kernel (*size) with its top left corner at (x, y): a coloured tap for each but zeros."""
    side, (slices, height, width) = side_of(values.shape), in_slices(values.shape, 1)
    pitch = width * side + side // 2  # from slice to slice
    out = f"<title>{escape(name)}</title>"
    for i in range(slices):
        frame = f"M{x + i * pitch:.1f} {y:.1f}h{width * side}v{height * side}h{-width * side}z"
        out += f'<path d="{frame}" fill="#fff" stroke="{LINE}" stroke-opacity="0.5"/>'
    for index in product(*map(range, values.shape)):
        value = values[index].item()
        if value == 0:
            continue
        depth, row, column = in_slices(index, 0)
        left, top = x + depth * pitch + column * side, y + row * side
        out += (
            f'<rect x="{left:.1f}" y="{top:.1f}" width="{side}" height="{side}" '
            f'fill="{scale.colour(value)}">'
            f"<title>({', '.join(map(str, index))}): {value:.4g}</title></rect>"
        )
        if side >= ROOM_FOR_NUMBERS:
            said, size = minus(f"{value / scale.unit:.0f}"), min(9, int(0.4 * side))
            middle = left + side / 2, top + side / 2 + 0.36 * size
            out += text(*middle, said, size=size, colour=scale.ink(value))
    return f'<g class="kernel">{out}</g>'


def legend(x: float, y: float, scale: ColourScale, caption: str) -> str:
    """A bar of the colours between its caption and its values."""
    steps, step = 24, 6
    out = small(x, y, caption)
    for i in range(steps):
        colour = scale.colour(scale.low + (scale.high - scale.low) * (i + 0.5) / steps)
        out += f'<path d="M{x + i * step:.1f} {y + 6:.1f}h{step}v9h{-step}z" fill="{colour}"/>'
    for place, anchor in ((0, "start"), (0.5, "middle"), (1, "end")):
        value = minus(f"{scale.low + (scale.high - scale.low) * place:.3g}")
        out += small(x + place * steps * step, y + 26, value, anchor)
    return out


def small(x: float, y: float, content: str, anchor: str = "start") -> str:
    """A line of small grey text."""
    return text(x, y, content, anchor, size=10, colour=MUTED)


# -- the sum --------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Column:
    """A term of the sum, or the sum: its kernel, the sign before it, and where it stands."""

    name: str
    kernel: Kernel
    sign: str
    left: float
    width: float

    @property
    def centre(self) -> float:
        return self.left + self.width / 2

    def sign_at(self, y: float) -> str:
        """The sign before the column, centred at y."""
        return text(self.left - SIGN / 2, y + 5, self.sign, size=15)


def columns_of(block: RepBlock) -> list[Column]:
    """The terms from left to right, then what they merge into."""
    terms = branch_kernels(block) | {MERGED: block.in_own_form(block.kernel())}
    found, left = [], MARGIN + GUTTER
    map_width, _ = map_size(block.geometry.kernel_size)
    for name, kernel in terms.items():
        kernel = kernel.to("cpu")
        sign = "=" if name == MERGED else "+" if found else ""
        width = max(text_width(name), 0 if name == SHIFT else map_width)
        found.append(Column(name, kernel, sign, left, width))
        left += width + SIGN
    return found


@torch.no_grad()
def kernel_picture(
    block: RepBlock,
    outputs: Sequence[int] | None = None,
    inputs: Sequence[int] | None = None,
    title: str | None = None,
) -> str:
    """The SVG of the kernels of a block's branches and of the one that they add up to.

    outputs, inputs: the channels of which every connected pair is a row; by default the first two.
    All pairs have one colour scale. In 3-D the slices along the first axis stand side by side.
    Show it in a notebook with `IPython.display.SVG(kernel_picture(block))`.
    Raises: TypeError for what is no RepBlock; ValueError for channels that it does not have, and
    for kernels that are not finite.
    """
    columns, pairs = columns_of(block), channel_pairs(block, outputs, inputs)
    maps = [column for column in columns if column.name != SHIFT]
    map_width, map_height = map_size(block.geometry.kernel_size)
    slots = block.in_channels // block.geometry.groups
    taps = {(o, i): [c.kernel.weight[o, i % slots] for c in maps] for o, i in pairs}
    means = [column.kernel.weight.abs().mean((0, 1)) for column in maps]
    signed = ColourScale.of(DIVERGING, chain.from_iterable(taps.values()), True)
    unsigned = ColourScale.of(MAGNITUDE, means, False)

    def row(y: float, label: list[str], values: list[Tensor], scale: ColourScale) -> str:
        out = row_label(y + map_height / 2, label)
        for column, value in zip(maps, values, strict=True):
            left = column.centre - map_width / 2
            out += heat_map(left, y, value, scale, f"{column.name}, {' '.join(label)}")
        return out

    title = f"{title_of(block)}. The kernels that it merges" if title is None else title
    body, y = text(MARGIN, 20, title, "start", bold=True, size=13), 58
    for column in columns:
        body += text(column.centre, y - 8, column.name, bold=column.name in (block.main, MERGED))
    for (o, i), values in taps.items():
        body += row(y, [f"input {i} →", f"output {o}"], values, signed)
        body += "".join(column.sign_at(y + map_height / 2) for column in maps)
        y += map_height + BETWEEN
    for o in dict.fromkeys(o for o, _ in pairs):
        body += row_label(y + 8, [f"bias, output {o}"])
        for column in columns:
            number = minus(f"{column.kernel.bias[o].item():.3g}")
            body += column.sign_at(y + 8) + text(column.centre, y + 12, number, size=10)
        y += 20
    y += 18
    body += row(y, ["mean |K| over", "all channels"], means, unsigned)
    y += map_height + 30
    body += legend(MARGIN, y, signed, "K, the taps of a pair")
    body += legend(MARGIN + 200, y, unsigned, "mean |K| (these do not add up)")
    said = notes(block, signed, unsigned)
    for i, line in enumerate(said):
        body += small(MARGIN, y + 48 + 14 * i, line)
    widths = [*(text_width(line, 10) for line in said), text_width(title, 13), 340]
    width = max(columns[-1].left + columns[-1].width, *(MARGIN + each for each in widths))
    return svg(width + MARGIN, y + 48 + 14 * len(said), body, title)


def row_label(y: float, lines: list[str]) -> str:
    """What a row is, in the left margin, centred at y."""
    start = y + 4 - 6.5 * (len(lines) - 1)
    return "".join(small(MARGIN, start + 13 * i, line) for i, line in enumerate(lines))


def notes(block: RepBlock, signed: ColourScale, unsigned: ColourScale) -> list[str]:
    """What a reader must know of the numbers."""
    g, folded = block.geometry, "Every kernel has the norms and scales of its branch folded in"
    if block.side_branches:
        folded += f"; all but {block.main} are times λ = {block.rate.item():g}"
    if block.post_norm is not None:
        folded += "; the norm after the sum scales them all"
    said = [folded + ".", "Blank taps are zero."]
    if max(g.dilation) > 1:
        said[1] += f" Dilation {per_axis(g.dilation)}: that many pixels from tap to tap."
    if side_of(g.kernel_size) >= ROOM_FOR_NUMBERS:
        units = f"{signed.unit:g} for K, {unsigned.unit:g} for mean |K|"
        said.append(f"Printed numbers are rounded, in units of {units}.")
    return said
