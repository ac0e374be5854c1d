"""The picture of a block, drawn from its tree: an SVG of boxes, no library needed.

Chains run downwards, the branches of a sum stand side by side, and what is inside a block that is
itself a branch is drawn in place. A new block is drawn without a word about it here.
`before_after` puts the one convolution that is deployed beside the tree that is trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from html import escape

from torch import nn

from replib.blocks import RepBlock
from replib.blocks.repmlp import RepMLP
from replib.branches import (
    AveragePool,
    Chain,
    Convolution,
    Filter,
    Norm,
    Piece,
    Scalar,
    Scale,
    Sum,
)

INK, MUTED, LINE = "#1f2933", "#616e7c", "#616e7c"
GAP, COLUMN_GAP, MARGIN = 14, 16, 18  # between boxes, between branches, around the picture
LETTER = 0.56  # width of a letter, of its font size
COLOURS = {
    Convolution: "#cfe3f5",
    Norm: "#e9e4f5",
    Scale: "#fdeccd",
    AveragePool: "#dcefdc",
    Filter: "#e8e8e8",
}
SQUEEZED = ["squeezed into one kernel,", "then one convolution"]


@dataclass(frozen=True)
class Drawing:
    """A part of the picture: its size, and how to draw it with its top centre at (x, y)."""

    width: float
    height: float
    at: Callable[[float, float], str]


# -- pen strokes ----------------------------------------------------------------------------------
def text(
    x: float,
    y: float,
    content: str,
    anchor: str = "middle",
    *,
    bold: bool = False,
    size: float = 12,
    colour: str = INK,
) -> str:
    """One line of text; none for no content."""
    if not content:
        return ""
    weight = ' font-weight="600"' if bold else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size:g}"{weight} '
        f'fill="{colour}" stroke="none">{escape(content)}</text>'
    )


def text_width(content: str, size: float = 12) -> float:
    """Roughly how wide a line of text is, in pixels."""
    return len(content) * size * LETTER


def line(x1: float, y1: float, x2: float, y2: float) -> str:
    """One connection."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    """A connection with a head, along an axis."""
    length = math.hypot(x2 - x1, y2 - y1)
    dx, dy = 5 * (x2 - x1) / length, 5 * (y2 - y1) / length
    left, right = (x2 - dx - dy, y2 - dy - dx), (x2 - dx + dy, y2 - dy + dx)
    head = f"M{left[0]:.1f} {left[1]:.1f}L{x2:.1f} {y2:.1f}L{right[0]:.1f} {right[1]:.1f}"
    return line(x1, y1, x2, y2) + f'<path d="{head}" fill="none"/>'


def svg(width: float, height: float, body: str, title: str) -> str:
    """The whole picture; it shrinks with a narrow page, and stays readable on a dark one."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}" font-family="system-ui, sans-serif" '
        f'stroke-width="1" role="img" aria-label="{escape(title)}" '
        f'style="display:block;background:#fff;max-width:100%;height:auto">{body}</svg>'
    )


# -- boxes and how they are put together ----------------------------------------------------------
def box(lines: list[str], colour: str) -> Drawing:
    """A labelled box; lines after the first are small."""
    sizes = [12] + [10] * (len(lines) - 1)
    width = max(text_width(*pair) for pair in zip(lines, sizes, strict=True)) + 16
    height = 24 + 13 * (len(lines) - 1)

    def at(x: float, y: float) -> str:
        out = (
            f'<rect x="{x - width / 2:.1f}" y="{y:.1f}" width="{width:.1f}" '
            f'height="{height}" rx="4" fill="{colour}"/>'
        )
        for i, (content, size) in enumerate(zip(lines, sizes, strict=True)):
            out += text(x, y + 16 + 13 * i, content, size=size)
        return out

    return Drawing(width, height, at)


def stacked(parts: list[Drawing]) -> Drawing:
    """Parts one below the other, connected."""
    height = sum(part.height for part in parts) + GAP * (len(parts) - 1)

    def at(x: float, y: float) -> str:
        out = ""
        for i, part in enumerate(parts):
            if i:
                out += line(x, y - GAP, x, y)
            out += part.at(x, y)
            y += part.height + GAP
        return out

    return Drawing(max(part.width for part in parts), height, at)


def named(name: str, column: Drawing, bold: bool) -> Drawing:
    """A branch with its name above it."""

    def at(x: float, y: float) -> str:
        return text(x, y + 11, name, bold=bold) + column.at(x, y + 18)

    return Drawing(max(column.width, text_width(name) + 4), column.height + 18, at)


def side_by_side(
    columns: dict[str, Drawing], main: str, note: str = "", factor: str = ""
) -> Drawing:
    """Named columns between a fork and a plus sign with a note beside it; one stands alone.

    The main column's name is bold; the lines of the others carry the factor.
    """
    drawn = [named(name, column, name == main) for name, column in columns.items()]
    if len(drawn) == 1:
        return drawn[0]
    spread = sum(column.width for column in drawn) + COLUMN_GAP * (len(drawn) - 1)
    inner = max(column.height for column in drawn)
    width = max(spread, 2 * (16 + text_width(note, 10)))
    tail = GAP + 8 * bool(factor)  # from the deepest column to the line that joins them
    height = GAP + inner + tail + GAP + 20

    def at(x: float, y: float) -> str:
        left, centres = x - spread / 2, []
        for column in drawn:
            centres.append(left + column.width / 2)
            left += column.width + COLUMN_GAP
        fork, join = y + GAP / 2, y + GAP + inner + tail
        out = line(x, y, x, fork) + line(centres[0], fork, centres[-1], fork)
        for centre, name, column in zip(centres, columns, drawn, strict=True):
            end = y + GAP + column.height
            out += line(centre, fork, centre, fork + 5) + column.at(centre, y + GAP)
            out += line(centre, end, centre, join)
            if factor and name != main:
                out += text(centre + 4, join - 6, factor, "start", size=10, colour=MUTED)
        out += line(centres[0], join, centres[-1], join) + line(x, join, x, join + GAP)
        middle = join + GAP + 10
        return (
            out
            + f'<circle cx="{x:.1f}" cy="{middle:.1f}" r="10" fill="#fff"/>'
            + text(x, middle + 4, "+")
            + text(x + 16, middle + 4, note, "start", size=10, colour=MUTED)
        )

    return Drawing(width, height, at)


def framed(inside: Drawing, caption: list[str]) -> Drawing:
    """A dashed frame around a part of the picture, with small lines of text beside its entry."""
    top = 13 * len(caption) + 8
    width = max(inside.width, *(2 * text_width(each, 10) for each in caption)) + 20
    height = top + inside.height + 8

    def at(x: float, y: float) -> str:
        out = (
            f'<path d="M{x - width / 2:.1f} {y:.1f}h{width:.1f}v{height:.1f}h{-width:.1f}z" '
            'fill="#fafafa" stroke-dasharray="4 3"/>'
        )
        for i, content in enumerate(caption):
            out += text(x + 8, y + 14 + 13 * i, content, "start", size=10, colour=MUTED)
        bottom = y + height
        return out + line(x, y, x, y + top) + inside.at(x, y + top) + line(x, bottom - 8, x, bottom)

    return Drawing(width, height, at)


# -- a tree ---------------------------------------------------------------------------------------
def times(size: tuple[int, ...]) -> str:
    """A size with all its axes."""
    return "×".join(map(str, size))


def per_axis(values: tuple[int, ...]) -> str:
    """One number where all axes agree."""
    return times(values) if len(set(values)) > 1 else str(values[0])


def label(piece: Piece) -> list[str]:
    """What a leaf is, in the words of the field: its kind, then what is particular about it."""
    if isinstance(piece, Norm):
        return ["norm"]
    if isinstance(piece, Scale):
        kind = "one factor" if isinstance(piece, Scalar) else "scale"
        return [kind] if piece.parameter.requires_grad else [f"constant {kind}"]
    if isinstance(piece, Convolution):
        parts = convolution_parts(piece.in_channels, piece.out_channels, piece.groups)
        parts += ["+ identity"] * piece.offset + ["bias"] * (piece.bias is not None)
        size = piece.weight.shape[2:]
        return [f"{times(size)} conv", *parts, *dilation_part(size, piece.dilation)]
    if isinstance(piece, AveragePool) and max(piece.extent) == 1:
        return ["identity"]
    if isinstance(piece, Filter):
        kind = "average" if isinstance(piece, AveragePool) else "fixed filter"
        size = piece.weight.shape[2:]
        return [f"{times(size)} {kind}", *dilation_part(size, piece.dilation)]
    return [type(piece).__name__]


def convolution_parts(in_channels: int, out_channels: int, groups: int) -> list[str]:
    """What is particular about the channels of a convolution."""
    parts = [f"{in_channels} → {out_channels}"] if in_channels != out_channels else []
    if groups > 1:
        parts.append("depthwise" if groups == in_channels else f"{groups} groups")
    return parts


def dilation_part(size: tuple[int, ...], dilation: tuple[int, ...]) -> list[str]:
    """The dilation, where there is one: a single tap has none."""
    real = tuple(d if k > 1 else 1 for k, d in zip(size, dilation, strict=True))
    return [f"dilation {per_axis(dilation)}"] if max(real) > 1 else []


def drawing(piece: Piece, squeezed: bool = False) -> Drawing:
    """The picture of any piece of a tree; squeezed: it is inside one whose kernel is made first."""
    if isinstance(piece, Chain):
        return stacked([nested(part, squeezed) for part in piece])
    if not isinstance(piece, Sum):
        colour = next((c for kind, c in COLOURS.items() if isinstance(piece, kind)), "#fff")
        return box(label(piece), colour)
    inside = squeezed or piece.squeezed
    names = [piece.main, *piece.side_branches]
    columns = {name: nested(piece.branches[name], inside) for name in names}
    rated = (f"λ = {piece.rate.item():g}", "× λ") if isinstance(piece, RepBlock) else ()
    body = side_by_side(columns, piece.main, *rated)
    if piece.squeezed and not squeezed:
        body = framed(body, SQUEEZED)
    post_norm = getattr(piece, "post_norm", None)
    return body if post_norm is None else stacked([body, drawing(post_norm)])


def nested(piece: Piece, squeezed: bool) -> Drawing:
    """A part of a tree; a block in a block has a frame and its family's name."""
    inner = drawing(piece, squeezed)
    return framed(inner, [type(piece).__name__]) if isinstance(piece, RepBlock) else inner


def repmlp_drawing(block: RepMLP) -> Drawing:
    """A RepMLP: a dense map beside convolutions, then the gate if any (RepMLPNet, section 3)."""
    dense = ["fully connected", f"on {block.h}×{block.w} windows", f"{block.sets} sets"]
    pieces = [box(dense + ["bias"] * (block.dense.bias is not None), "#f9d9d4")]
    pieces += [drawing(block.norm)] * isinstance(block.norm, Norm)
    columns = {"dense": stacked(pieces)}
    columns |= {f"conv {size}×{size}": drawing(chain) for size, chain in block.local.items()}
    gate = [box(["× gate", "average, 1×1, ReLU,", "1×1, sigmoid"], "#fff")] * block.gated
    return stacked([side_by_side(columns, "dense"), *gate])


def deployed_lines(conv: nn.Module) -> list[str]:
    """What a plain convolution is, for its box."""
    return [
        f"{times(conv.kernel_size)} conv, bias",
        *convolution_parts(conv.in_channels, conv.out_channels, conv.groups),
        f"stride {per_axis(conv.stride)}",
        f"padding {per_axis(conv.padding)}",
        *dilation_part(conv.kernel_size, conv.dilation),
        *[conv.padding_mode] * (conv.padding_mode != "zeros"),
    ]


def form(name: str, module: nn.Module, inside: Drawing) -> Drawing:
    """What a module looks like, below its name and the count of its parameters."""
    count = sum(parameter.numel() for parameter in module.parameters())
    said = f"{count:,} parameters".replace(",", "\u202f")
    top, tail = 50, 16  # room for the words and the arrow that enters, and for the one that leaves

    def at(x: float, y: float) -> str:
        end = y + top + inside.height
        words = text(x, y + 12, name, bold=True) + text(x, y + 26, said, size=10, colour=MUTED)
        arrows = arrow(x, y + top - tail, x, y + top) + arrow(x, end, x, end + tail)
        return words + inside.at(x, y + top) + arrows

    width = max(inside.width, text_width(name), text_width(said, 10))
    return Drawing(width, top + inside.height + tail, at)


# -- whole pictures -------------------------------------------------------------------------------
def title_of(block: Piece | RepMLP) -> str:
    """The family, its channels and its stride."""
    if isinstance(block, RepMLP):
        return f"RepMLP: {block.channels} channels"
    stride = block.geometry.stride if isinstance(block, RepBlock) else (1,)
    strided = f", stride {per_axis(stride)}" if max(stride) > 1 else ""
    return f"{type(block).__name__}: {block.in_channels} → {block.out_channels} channels{strided}"


def diagram(block: Piece, title: str | None = None) -> str:
    """The SVG of a block or of any piece; `title` defaults to its family and channels.

    Show it in a notebook with `IPython.display.SVG(diagram(block))`.
    """
    picture = drawing(block)
    title = title_of(block) if title is None else title
    width = max(picture.width, text_width(title)) + 2 * MARGIN
    body = f'<g stroke="{LINE}">{picture.at(width / 2, 36)}</g>'
    return svg(
        width, picture.height + 36 + MARGIN, body + text(width / 2, 18, title, bold=True), title
    )


def before_after(block: RepBlock | RepMLP, title: str | None = None) -> str:
    """The SVG of what is trained, beside the one layer that computes the same when deployed.

    The right side is drawn from `block.deploy()` itself. `title` defaults to the family, its
    channels and its stride. Raises: TypeError for what is no block.
    """
    if not isinstance(block, RepBlock | RepMLP):
        raise TypeError(
            f"block (={type(block).__name__}) must be a RepBlock or a RepMLP; draw other pieces "
            "with `diagram`."
        )
    title, plain = title_of(block) if title is None else title, block.deploy()
    if isinstance(block, RepMLP):
        inside = repmlp_drawing(block), repmlp_drawing(plain)
    else:
        inside = drawing(block), box(deployed_lines(plain), COLOURS[Convolution])
    before, after = form("in training", block, inside[0]), form("deployed", plain, inside[1])
    bridge, top, height = 90, 34, max(before.height, after.height)
    left = MARGIN + before.width
    strokes = before.at(MARGIN + before.width / 2, top + (height - before.height) / 2)
    strokes += after.at(left + bridge + after.width / 2, top + (height - after.height) / 2)
    middle = top + height / 2 + 17  # of the boxes: a form has more above them than below
    strokes += arrow(left + 16, middle, left + bridge - 16, middle)
    strokes += text(left + bridge / 2, middle - 7, "merge", size=11)
    width = max(left + bridge + after.width, MARGIN + text_width(title, 13)) + MARGIN
    words = text(MARGIN, 20, title, "start", bold=True, size=13)
    return svg(width, top + height + 12, f'<g stroke="{LINE}">{strokes}</g>' + words, title)
