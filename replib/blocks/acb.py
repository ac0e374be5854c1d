"""ACB: Ding et al., "ACNet: Strengthening the Kernel Skeletons", ICCV 2019, section 3."""

from __future__ import annotations

import torch

from replib.blocks.block import OFF_CENTRE, Geometry, RepBlock
from replib.branches import Chain, Filter, Piece


class ACB(RepBlock):
    """The full kernel and, for every axis, a kernel along it; each with its own norm.

    In 2-D, "axis0" is the paper's vertical kernel (k x 1) and "axis1" the horizontal one.
    reach: how long these kernels are, by default as the full one (3 in the paper's AlexNet).
    slope: of all norms at first (1/3 in the released recipes for CIFAR).
    border: they lie on the last column and row, not on the skeleton; the paper's comparison in its
    figures 5 and 6.
    """

    main_name = "square"
    cannot = OFF_CENTRE | {"1-D": "along the only axis lies the full kernel itself; use duplicate"}

    def declare(
        self, g: Geometry, reach: int | None = None, slope: float = 1.0, border: bool = False
    ) -> dict[str, Piece]:
        if reach is not None and (reach < 1 or reach % 2 == 0):
            raise ValueError(f"reach (={reach}) must be odd: its kernels lie on the centre.")
        branches = {"square": Chain(g.conv(), g.norm(initial=slope))}
        for axis, k in enumerate(g.kernel_size):
            length = k if reach is None else min(k, reach)
            size = tuple(length if a == axis else 1 for a in range(g.dims))
            shift = [to_the_border(g, axis)] if border else []
            branches[f"axis{axis}"] = Chain(g.conv(size), *shift, g.norm(initial=slope))
        return branches


def to_the_border(g: Geometry, axis: int) -> Filter:
    """A filter that moves what lies along an axis to the end of all the others."""
    size = tuple(1 if a == axis else k for a, k in enumerate(g.kernel_size))
    weight = torch.zeros(g.out_channels, *size)
    weight.flatten(1)[:, -1] = 1.0
    return Filter(weight, g.dilation)
