"""RepVGG: Ding et al., "RepVGG: Making VGG-style ConvNets Great Again", CVPR 2021, section 3.3."""

from __future__ import annotations

from replib.blocks.block import OFF_CENTRE, Geometry, RepBlock
from replib.branches import Chain, Piece


class RepVGG(RepBlock):
    """k x k, 1x1 and, where shapes allow, identity; each with its own norm.

    identity=False leaves the third branch out, as RepAn's networks do in the first block of
    every stage; identity_norm=False leaves its norm out (table 7 of the paper).
    """

    main_name = "dense"
    norm_at_restore = "keep"
    cannot = OFF_CENTRE

    def declare(
        self, g: Geometry, identity: bool = True, identity_norm: bool = True
    ) -> dict[str, Piece]:
        branches = {"dense": Chain(g.conv(), g.norm()), "1x1": Chain(g.conv(1), g.norm())}
        if identity and g.keeps_shape:
            branches["identity"] = g.norm() if identity_norm else g.identity()
        return branches
