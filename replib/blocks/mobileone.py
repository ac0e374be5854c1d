"""MobileOne: Vasu et al., "MobileOne", CVPR 2023, section 3; and plain duplication."""

from __future__ import annotations

from replib.blocks.block import OFF_CENTRE, Geometry, RepBlock
from replib.branches import Chain, Piece


class MobileOne(RepBlock):
    """n times k x k, a 1x1 where k > 1, identity where shapes allow; each with its own norm."""

    main_name = "conv0"
    cannot = OFF_CENTRE

    def declare(self, g: Geometry, n: int = 4) -> dict[str, Piece]:
        if n < 1:
            raise ValueError(f"n (={n}) must be at least 1: one branch takes the kernel.")
        branches = {f"conv{i}": Chain(g.conv(), g.norm()) for i in range(n)}
        if max(g.kernel_size) > 1:
            branches["scale"] = Chain(g.conv(1), g.norm())
        return branches | ({"skip": g.norm()} if g.keeps_shape else {})


class Duplicate(RepBlock):
    """The same k x k convolution n times, each with its own norm (an ablation of DBB)."""

    main_name = "conv0"

    def declare(self, g: Geometry, n: int = 2) -> dict[str, Piece]:
        if n < 1:
            raise ValueError(f"n (={n}) must be at least 1: one branch takes the kernel.")
        return {f"conv{i}": Chain(g.conv(), g.norm()) for i in range(n)}
