"""RepLKNet: Ding et al., "Scaling Up Your Kernels to 31x31", CVPR 2022, section 3 guideline 3."""

from __future__ import annotations

from replib.blocks.block import OFF_CENTRE, Geometry, RepBlock
from replib.branches import Chain, Piece


class RepLK(RepBlock):
    """A large kernel and a small one beside it (small=None: none); each with its own norm."""

    main_name = "large"
    default_kernel_size = 31
    cannot = OFF_CENTRE

    def declare(self, g: Geometry, small: int | None = 5) -> dict[str, Piece]:
        branches = {"large": Chain(g.conv(), g.norm())}
        if small is not None:
            if small < 1 or small % 2 == 0:
                raise ValueError(f"small (={small}) must be odd, to lie at the centre, or None.")
            size = tuple(min(small, k) for k in g.kernel_size)
            branches["small"] = Chain(g.conv(size), g.norm())
        return branches
