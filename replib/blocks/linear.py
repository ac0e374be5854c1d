"""Blocks of linear branches with one shared norm, other than OREPA's."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from replib.blocks.block import OFF_CENTRE, Geometry, RepBlock
from replib.branches import Chain, Convolution, Piece


class CSLA(RepBlock):
    """k x k, 1x1 and, where shapes allow, identity; scaled, summed, then one norm.

    Constant-scale linear addition. With trainable_scales=True it is the network of the
    hyper-search; otherwise the scales of the convolutions are constants (the identity's is not).
    initial: both scales at first (official: 1, later in a stage sqrt(2 / i)).
    pointwise=False leaves the 1x1 out, as in RepOpt-GhostNet.
    Source: Ding et al., "Re-parameterizing Your Optimizers", ICLR 2023, section 3.1.
    """

    main_name = "conv"
    post_normed = True
    cannot = OFF_CENTRE

    def declare(
        self,
        g: Geometry,
        trainable_scales: bool = True,
        initial: float = 1.0,
        pointwise: bool = True,
    ) -> dict[str, Piece]:
        branches: dict[str, Piece] = {
            name: Chain(g.conv(size), g.scale(initial, trainable=trainable_scales))
            for name, size in (("conv", None), ("1x1", 1))
            if pointwise or name == "conv"
        }
        return branches | ({"identity": g.scale()} if g.keeps_shape else {})


class QARepVGG(RepBlock):
    """RepVGG for quantization: the norms of the 1x1 and of the identity moved behind the sum.

    Source: Chu et al., "Make RepVGG Greater Again", AAAI 2024, section 3.
    """

    main_name = "dense"
    post_normed = True
    cannot = OFF_CENTRE

    def declare(self, g: Geometry) -> dict[str, Piece]:
        branches = {"dense": Chain(g.conv(), g.norm()), "1x1": g.conv(1)}
        return branches | ({"identity": g.identity()} if g.keeps_shape else {})


class UnitFilters(Convolution):
    """A convolution by its weight's directions: every filter is divided by its length."""

    put = Piece.put  # a direction alone cannot be any kernel

    def effective(self, weight: Tensor) -> Tensor:
        return F.normalize(weight.flatten(1)).view_as(weight)


class Dirac(RepBlock):
    """a identity + b W / |W|, where shapes allow, behind one norm; it cannot be inverted.

    a and b are factors per channel, W / |W| the filters of unit length.
    Source: Zagoruyko and Komodakis, "DiracNets: Training Very Deep Neural Networks Without
    Skip-Connections", 2017, section 3 (initial factors: released code).
    """

    main_name = "conv"
    post_normed = True
    cannot = OFF_CENTRE

    def declare(self, g: Geometry) -> dict[str, Piece]:
        shape = {"dilation": g.dilation, "groups": g.groups}
        conv = UnitFilters(g.in_channels, g.out_channels, g.kernel_size, **shape)
        branches: dict[str, Piece] = {"conv": Chain(conv, g.scale(0.1))}
        return branches | ({"identity": g.scale()} if g.keeps_shape else {})


class ExpandNet(RepBlock):
    """1x1, k x k, 1x1 with more channels in between, and one norm; it cannot be inverted.

    Source: Guo et al., "ExpandNets", NeurIPS 2020, section 3.
    """

    main_name = "layers"
    post_normed = squeezable = True

    def declare(self, g: Geometry, expansion: int = 4) -> dict[str, Piece]:
        wide_in, wide_out = expansion * g.in_channels, expansion * g.out_channels
        first = g.conv(1, out_channels=wide_in)
        middle = g.conv(in_channels=wide_in, out_channels=wide_out)
        return {"layers": Chain(first, middle, g.conv(1, in_channels=wide_out))}
