"""ACB: Ding et al., "ACNet: Strengthening the Kernel Skeletons", ICCV 2019, section 3."""

from __future__ import annotations

from replib.blocks.block import OFF_CENTRE, Geometry, RepBlock
from replib.branches import Chain, Piece


class ACB(RepBlock):
    """The full kernel and, for every axis, a kernel along it; each with its own norm.

    In 2-D, "axis0" is the paper's vertical kernel (k x 1) and "axis1" the horizontal one.
    reach: how long these kernels are, by default as the full one (3 in the paper's AlexNet).
    slope: of all norms at first (1/3 in the released recipes for CIFAR).
    """

    main_name = "square"
    cannot = OFF_CENTRE | {"1-D": "along the only axis lies the full kernel itself; use duplicate"}

    def declare(
        self, g: Geometry, reach: int | None = None, slope: float = 1.0
    ) -> dict[str, Piece]:
        if reach is not None and (reach < 1 or reach % 2 == 0):
            raise ValueError(f"reach (={reach}) must be odd: its kernels lie on the centre.")
        branches = {"square": Chain(g.conv(), g.norm(initial=slope))}
        for axis, k in enumerate(g.kernel_size):
            length = k if reach is None else min(k, reach)
            size = tuple(length if a == axis else 1 for a in range(g.dims))
            branches[f"axis{axis}"] = Chain(g.conv(size), g.norm(initial=slope))
        return branches
