"""One convolution and its norm: the plain network, written as a block of one branch."""

from __future__ import annotations

from dataclasses import asdict

import torch

from replib.blocks.block import Geometry, RepBlock
from replib.branches import Chain, Convolution, Piece


class ConvBN(RepBlock):
    """k x k convolution and norm; nothing to merge, so it is the baseline of every comparison.

    drawn_as: a family of `BLOCKS`, a random block of which, merged, is the kernel at first: its
    initialisation without its branches (DBB's table 4).
    """

    main_name = "conv"

    def declare(self, g: Geometry, drawn_as: str | None = None) -> dict[str, Piece]:
        conv = g.conv()
        if drawn_as is not None:
            self.draw_as(drawn_as, conv, g)
        return {"conv": Chain(conv, g.norm())}

    @staticmethod
    @torch.no_grad()
    def draw_as(family: str, conv: Convolution, g: Geometry) -> None:
        """Give it the kernel of a random block. Raises: ValueError for a wrong name."""
        from replib.blocks import BLOCKS  # which this module is a part of

        if family not in BLOCKS:
            raise ValueError(f"drawn_as (={family!r}) must be one of {', '.join(BLOCKS)}.")
        block = BLOCKS[family](**asdict(g)).eval()
        if not conv.weight.is_meta:  # which has no values
            conv.put(block.merged())
