"""DBB: Ding et al., "Diverse Branch Block", CVPR 2021, section 3.3."""

from __future__ import annotations

from replib.blocks.block import OFF_CENTRE, Geometry, RepBlock
from replib.branches import Chain, Piece


class DBB(RepBlock):
    """k x k, 1x1, 1x1 then average pooling, 1x1 then k x k; a norm after every convolution.

    inner_channels: between the two convolutions of the last branch; by default those of the
    input (its 1x1 then starts as the identity), twice as many for a depthwise block, which
    also has no other 1x1 convolutions.
    """

    main_name = "origin"
    cannot = OFF_CENTRE

    def declare(self, g: Geometry, inner_channels: int | None = None) -> dict[str, Piece]:
        depthwise = g.groups == g.out_channels
        inner = inner_channels or g.in_channels * (2 if depthwise else 1)
        first = g.conv(1, out_channels=inner, offset=inner == g.in_channels)
        branches = {"origin": Chain(g.conv(), g.norm())}
        if depthwise:
            branches["avg"] = Chain(g.average_pool(), g.norm())
        else:
            branches["1x1"] = Chain(g.conv(1), g.norm())
            branches["avg"] = Chain(g.conv(1), g.norm(), g.average_pool(), g.norm())
        branches["1x1_kxk"] = Chain(first, g.norm(inner), g.conv(in_channels=inner), g.norm())
        return branches


class Rep(RepBlock):
    """k x k and 1x1, each with its own norm: RepAn's plainest block (RepVGG without identity)."""

    main_name = "origin"
    cannot = OFF_CENTRE

    def declare(self, g: Geometry) -> dict[str, Piece]:
        return {"origin": Chain(g.conv(), g.norm()), "1x1": Chain(g.conv(1), g.norm())}
