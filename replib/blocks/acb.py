"""ACB: Ding et al., "ACNet: Strengthening the Kernel Skeletons", ICCV 2019, section 3."""

from __future__ import annotations

from replib.blocks.block import OFF_CENTRE, Geometry, RepBlock
from replib.branches import Chain, Piece


class ACB(RepBlock):
    """The full kernel and, for every axis, a kernel along it; each with its own norm.

    In 2-D, "axis0" is the paper's vertical kernel (k x 1) and "axis1" the horizontal one.
    """

    main_name = "square"
    cannot = OFF_CENTRE | {"1-D": "along the only axis lies the full kernel itself; use duplicate"}

    def declare(self, g: Geometry) -> dict[str, Piece]:
        branches = {"square": Chain(g.conv(), g.norm())}
        for axis, k in enumerate(g.kernel_size):
            size = tuple(k if a == axis else 1 for a in range(g.dims))
            branches[f"axis{axis}"] = Chain(g.conv(size), g.norm())
        return branches
