"""One convolution and its norm: the plain network, written as a block of one branch."""

from __future__ import annotations

from replib.blocks.block import Geometry, RepBlock
from replib.branches import Chain, Piece


class ConvBN(RepBlock):
    """k x k convolution and norm; nothing to merge, so it is the baseline of every comparison."""

    main_name = "conv"

    def declare(self, g: Geometry) -> dict[str, Piece]:
        return {"conv": Chain(g.conv(), g.norm())}
