"""The picture of a block, drawn from its tree: an SVG of boxes, no library needed.

Chains run downwards, the branches of a sum stand side by side, and what is inside a block that is
itself a branch is drawn in place. A new block is drawn without a word about it here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from html import escape

from replib.blocks import RepBlock
from replib.branches import AveragePool, Chain, Convolution, Filter, Norm, Piece, Scale, Sum

BOX_HEIGHT, GAP, COLUMN_GAP, LETTER, PADDING = 24, 14, 16, 6.6, 18
COLOURS = {
    Convolution: "#cfe3f5",
    Norm: "#e9e4f5",
    Scale: "#fdeccd",
    AveragePool: "#dcefdc",
    Filter: "#e8e8e8",
}


@dataclass(frozen=True)
class Drawing:
    """A part of the picture: its size, and how to draw it with its top centre at (x, y)."""

    width: float
    height: float
    at: Callable[[float, float], str]


def label(piece: Piece) -> str:
    """What a leaf is, in the words of the field."""
    size = "×".join(map(str, getattr(piece, "weight", piece).shape[2:])) if has_size(piece) else ""
    if isinstance(piece, Convolution):
        groups = f", {piece.groups} groups" if piece.groups > 1 else ""
        dilation = f", dilation {max(piece.dilation)}" if max(piece.dilation) > 1 else ""
        return f"{size} conv{' + identity' if piece.offset else ''}{groups}{dilation}"
    if isinstance(piece, AveragePool):
        return "identity" if max(piece.extent) == 1 else f"{size} average"
    if isinstance(piece, Filter):
        return f"{size} fixed filter"
    if isinstance(piece, Norm):
        return "norm"
    if isinstance(piece, Scale):
        return "scale" if piece.weight.requires_grad else "constant scale"
    return type(piece).__name__


def has_size(piece: Piece) -> bool:
    """Whether a leaf has a kernel size."""
    return isinstance(piece, Convolution | Filter)


def text(x: float, y: float, content: str, anchor: str = "middle", bold: bool = False) -> str:
    """One line of text."""
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{weight}>{escape(content)}</text>'


def line(x1: float, y1: float, x2: float, y2: float) -> str:
    """One connection."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def box(content: str, colour: str) -> Drawing:
    """A labelled box."""
    width = len(content) * LETTER + PADDING

    def at(x: float, y: float) -> str:
        return (
            f'<rect x="{x - width / 2:.1f}" y="{y:.1f}" width="{width:.1f}" '
            f'height="{BOX_HEIGHT}" rx="4" fill="{colour}"/>'
        ) + text(x, y + BOX_HEIGHT / 2 + 4, content)

    return Drawing(width, BOX_HEIGHT, at)


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


def side_by_side(columns: dict[str, Drawing], main: str, plus: str) -> Drawing:
    """Named columns between a fork and a plus sign; the main one's name is bold."""
    widths = [max(c.width, len(name) * LETTER + 4) for name, c in columns.items()]
    width = sum(widths) + COLUMN_GAP * (len(columns) - 1)
    inner = max(column.height for column in columns.values())
    top, bottom = 2 * GAP + 6, 2 * GAP
    height = top + inner + bottom + 20

    def at(x: float, y: float) -> str:
        left, centres = x - width / 2, []
        for w in widths:
            centres.append(left + w / 2)
            left += w + COLUMN_GAP
        fork, join = y + GAP / 2, y + top + inner + GAP
        out = line(x, y, x, fork) + line(centres[0], fork, centres[-1], fork)
        for centre, (name, column) in zip(centres, columns.items(), strict=True):
            out += line(centre, fork, centre, fork + 6)
            out += text(centre, fork + 18, name, bold=name == main)
            start = y + top
            out += column.at(centre, start) + line(centre, start + column.height, centre, join)
        out += line(centres[0], join, centres[-1], join) + line(x, join, x, join + GAP)
        middle = join + GAP + 10
        return (
            out
            + f'<circle cx="{x:.1f}" cy="{middle:.1f}" r="10" fill="#fff"/>'
            + text(x, middle + 4, "+")
            + text(x + 16, middle + 4, plus, "start")
        )

    return Drawing(width, height, at)


def drawing(piece: Piece) -> Drawing:
    """The picture of any piece of a tree."""
    if isinstance(piece, Chain):
        return stacked([drawing(part) for part in piece])
    if not isinstance(piece, Sum):
        colour = next((c for kind, c in COLOURS.items() if isinstance(piece, kind)), "#fff")
        return box(label(piece), colour)
    names = [piece.main, *piece.side_branches]
    columns = {name: drawing(piece.branches[name]) for name in names}
    rated = isinstance(piece, RepBlock) and piece.side_branches
    plus = "main + λ · others" if rated else ""
    if piece.squeezed:
        plus = "kernels added, one convolution"
    body = side_by_side(columns, piece.main, plus)
    post_norm = getattr(piece, "post_norm", None)
    return body if post_norm is None else stacked([body, drawing(post_norm)])


def diagram(block: Piece, title: str | None = None) -> str:
    """The SVG of a block or of any piece; `title` defaults to its family and channels.

    Show it in a notebook with `IPython.display.SVG(diagram(block))`.
    """
    picture = drawing(block)
    if title is None:
        title = f"{type(block).__name__}: {block.in_channels} → {block.out_channels} channels"
    note = 150  # room to the right of the plus sign
    width = max(picture.width, len(title) * LETTER, 2 * note) + 2 * PADDING
    height = picture.height + 58
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}" font-family="system-ui, sans-serif" '
        f'font-size="12" fill="#1f2933" role="img" aria-label="{escape(title)}">'
        f'<g stroke="#616e7c" stroke-width="1">{picture.at(width / 2, 36)}</g>'
        f"{text(width / 2, 18, title, bold=True)}</svg>"
    ).replace("<text", '<text stroke="none"')
