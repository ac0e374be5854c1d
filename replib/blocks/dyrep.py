"""DyRep: Huang et al., "DyRep: Bootstrapping Training with Dynamic Re-parameterization",
CVPR 2022, section 3: branches that come and go in training.
"""

from __future__ import annotations

from collections.abc import Sequence

from replib.blocks.block import OFF_CENTRE, Geometry, RepBlock
from replib.branches import Chain, Piece

BRANCHES = ("1x1", "1x1_kxk", "1x1_avg", "kxk", "1xk", "kx1", "id")  # the official order of flags


class DyRep(RepBlock):
    """Seven branches, each with its own norm, any of which but k x k may be absent.

    branches: a flag per name of `BRANCHES`. The k x k convolution has a bias, so that it can
    take the place of any convolution; the first piece of a branch may be such a block itself.
    Generalised to one kernel per axis: "1xk" lies along the last axis, "kx1" along the first.
    """

    main_name = "kxk"
    norm_at_restore = "reset"
    cannot = OFF_CENTRE

    def declare(self, g: Geometry, branches: Sequence[int] = (1,) * 7) -> dict[str, Piece]:
        if len(branches) != len(BRANCHES) or not branches[BRANCHES.index("kxk")]:
            raise ValueError(
                f"branches (={branches}) must be {len(BRANCHES)} flags, one each for "
                f"{', '.join(BRANCHES)}, and kxk must be among them."
            )
        ones = (1,) * (g.dims - 1)
        pool = (g.average_pool(), g.norm())
        if g.groups < g.out_channels:
            pool = (g.conv(1), g.norm(), *pool)
        inner = g.conv(1, out_channels=g.in_channels)
        made = {
            "1x1": lambda: Chain(g.conv(1), g.norm()),
            "1x1_kxk": lambda: Chain(inner, g.norm(g.in_channels), g.conv(), g.norm()),
            "1x1_avg": lambda: Chain(*pool),
            "kxk": lambda: Chain(g.conv(bias=True), g.norm()),
            "1xk": lambda: Chain(g.conv((*ones, g.kernel_size[-1])), g.norm()),
            "kx1": lambda: Chain(g.conv((g.kernel_size[0], *ones)), g.norm()),
            "id": g.norm,
        }
        active = {name for name, flag in zip(BRANCHES, branches, strict=True) if flag}
        active -= set() if g.keeps_shape else {"id"}
        return {name: make() for name, make in made.items() if name in active}
