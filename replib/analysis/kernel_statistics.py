"""What the kernels of a trained network look like, block by block and position by position.

    norm_slopes          how large the norms make every branch (DBB, figure 5)
    position_magnitudes  how large kernels are in the middle, along the skeleton, at the corners
                         (ACNet, figure 6)
    zeroed               a copy of a network with weights at such places set to zero, for asking
                         what the accuracy depends on (ACNet, figure 5)
    conversion           a block's kernel as it is trained, with its norm folded in, and with the
                         branches added; `spread`: its deviation (RepOptimizers, table 11)

Sources: Ding et al., "Diverse Branch Block", CVPR 2021; "ACNet: Strengthening the Kernel
Skeletons", ICCV 2019; "Re-parameterizing Your Optimizers rather than Architectures", ICLR 2023.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from replib.blocks import RepBlock
from replib.blocks.ends import links_of
from replib.branches import Convolution, Norm
from replib.networks import CONVOLUTIONS, outermost_blocks

PLACES = ("corners", "skeleton", "anywhere")  # of a kernel of odd size; the first two make it up
PARTS = ("overall", "centre", "surrounding")
STEPS = {
    "trained": "as trained",
    "folded": "norm folded in",
    "deployed": "branches added",
}


def norm_slopes(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """block -> branch -> |slope| of the norm that ends the branch, (channels,).

    Of branches that end in one, in the order of the network.
    """
    found = {
        name: {
            branch: last.norm.weight.detach().abs()
            for branch, piece in block.branches.items()
            if isinstance(last := links_of(piece)[-1], Norm) and last.norm.weight is not None
        }
        for name, block in outermost_blocks(model).items()
    }
    return {name: slopes for name, slopes in found.items() if slopes}


def spatial_convolutions(network: nn.Module) -> dict[str, nn.Module]:
    """The convolutions of a deployed network whose kernels have a centre and corners, by name."""
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, CONVOLUTIONS)
        and len(module.kernel_size) > 1
        and all(side > 1 and side % 2 for side in module.kernel_size)
    }


@torch.no_grad()
def position_magnitudes(network: nn.Module, size: int = 3) -> Tensor:
    """How large the square kernels of a deployed network are by position: (size, size), float64.

    Per layer, the sums of |w| over channels, relative to the largest; then the mean over layers.
    Raises: ValueError where no layer has such a kernel.
    """
    convolutions = spatial_convolutions(network).values()
    square = [conv for conv in convolutions if set(conv.kernel_size) == {size}]
    sums = [conv.weight.double().abs().sum((0, 1)) for conv in square]
    if not sums:
        raise ValueError(f"size (={size}): the network has no such convolution; deploy it first.")
    return torch.stack([layer / layer.max() for layer in sums]).mean(0)


def positions(size: tuple[int, ...], place: str) -> Tensor:
    """Which positions of a kernel are of a place of `PLACES`: (*size,), bool."""
    centred = [torch.arange(side) == side // 2 for side in size]
    axes = torch.meshgrid(*centred, indexing="ij")
    skeleton = torch.stack(axes).any(0)
    masks = (~skeleton, skeleton, torch.ones_like(skeleton))
    return dict(zip(PLACES, masks, strict=True))[place]


@torch.no_grad()
def zeroed(network: nn.Module, place: str, share: float, generator: torch.Generator) -> nn.Module:
    """A copy of a deployed network in whose kernels a share of the weights is set to zero.

    In every convolution with a centre and corners, of weights at the place, drawn at random; share:
    of all weights of the kernel, so that the places can be compared at one sparsity.
    Raises: ValueError for a place that is none, or has fewer weights than that.
    """
    if place not in PLACES:
        raise ValueError(f"place (={place!r}) must be one of {', '.join(PLACES)}.")
    network = copy.deepcopy(network)
    for name, conv in spatial_convolutions(network).items():
        there = positions(conv.kernel_size, place).expand(conv.weight.shape).flatten()
        candidates, count = there.nonzero()[:, 0], round(share * there.numel())
        if not 0 <= count <= len(candidates):
            raise ValueError(
                f"share (={share}) of {name} must be between 0 and "
                f"{len(candidates) / there.numel():.4g}, what there is at the {place}."
            )
        chosen = candidates[torch.randperm(len(candidates), generator=generator)[:count]]
        mask = torch.zeros_like(there)
        mask[chosen] = True
        conv.weight.masked_fill_(mask.view(conv.weight.shape).to(conv.weight.device), 0)
    return network


@torch.no_grad()
def conversion(block: RepBlock) -> dict[str, Tensor]:
    """A block's kernel at the `STEPS` of its deployment, (O, I/groups, *size), float64.

    The first one is of the main branch alone, and is left out where that is not one convolution.
    """
    main = [m for m in block.main_branch.modules() if isinstance(m, Convolution)]
    kernel = block.main_branch.kernel()
    if block.post_norm is not None:
        kernel = block.post_norm.act(kernel)
    trained = {"trained": main[0].effective_weight(torch.float64)} if len(main) == 1 else {}
    return trained | {
        "folded": block.in_own_form(kernel).weight,
        "deployed": block.in_own_form(block.kernel()).weight,
    }


def parts(weight: Tensor) -> dict[str, Tensor]:
    """The weights of a kernel (O, I, *size) of odd size, each a vector: all of them, those in the
    centre and those around it."""
    centre = torch.zeros(weight.shape[2:], dtype=torch.bool, device=weight.device)
    centre[tuple(side // 2 for side in centre.shape)] = True
    found = (weight.flatten(), weight[..., centre].flatten(), weight[..., ~centre].flatten())
    return dict(zip(PARTS, found, strict=True))


def spread(weight: Tensor) -> dict[str, float]:
    """The standard deviation of each of the parts of a kernel."""
    return {name: values.std(unbiased=False).item() for name, values in parts(weight).items()}
