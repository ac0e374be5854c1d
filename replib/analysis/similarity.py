"""How alike the branches of a block are: their kernels, and what they make of images.

Branches that end up alike are one branch trained twice. Three measures of a pair, block by block:

    kernels   the cosine of the two kernels, as they add up in the merged one
    outputs   the cosine of the two feature maps, over all images, channels and places
    cka       linear centred kernel alignment of the two maps: 1 where the images are told apart
              alike, whatever the basis, the size and the offset of the features

CKA is a ratio of HSICs. The unbiased estimator of HSIC (Song et al., "Feature Selection via
Dependence Maximization", JMLR 2012) may be averaged over batches before the ratio is taken, so that
no matrix of all images is needed: Nguyen, Raghu and Kornblith, "Do Wide and Deep Networks Learn the
Same Things?", ICLR 2021, equations 2 to 4. Kernels per layer: Hu et al., "Online Convolutional
Re-parameterization", CVPR 2022, figure 7.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from replib.blocks import RepBlock
from replib.networks import outermost_blocks

MEASURES = ("kernels", "outputs", "cka")
LEAST = 4  # images in a batch: the unbiased estimator divides by n - 3


def unbiased_hsic(grams: Tensor) -> Tensor:
    """The unbiased HSIC of every pair of Gram matrices (B, n, n) of the same n images: (B, B).

    Raises: ValueError for fewer than four images.
    """
    n = grams.shape[-1]
    if n < LEAST:
        raise ValueError(f"a batch (of {n} images) must have at least {LEAST}.")
    grams = grams - torch.diag_embed(grams.diagonal(dim1=-2, dim2=-1))
    rows = grams.sum(-1)
    whole = rows.sum(-1)
    traces = torch.einsum("iab,jab->ij", grams, grams)
    apart = whole[:, None] * whole / ((n - 1) * (n - 2))
    return (traces + apart - 2 / (n - 2) * rows @ rows.T) / (n * (n - 3))


def over_norms(products: Tensor) -> Tensor:
    """Inner products (B, B) over the norms that are on the diagonal; nan where one is not > 0."""
    norms = products.diagonal().clamp(min=0).sqrt()
    norms = torch.where(norms > 0, norms, torch.nan)
    return products / (norms[:, None] * norms)


def kernel_cosines(block: RepBlock) -> Tensor:
    """The cosines of the branches' kernels in eval mode, norms folded in: (B, B), float64."""
    weights = [block.in_own_form(b.kernel()).weight.flatten() for b in block.branches.values()]
    stacked = torch.stack(weights)
    return over_norms(stacked @ stacked.T)


@torch.no_grad()
def branch_similarity(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, dict]:
    """block -> {"branches": their names, and a (B, B) tensor in float64 for each of `MEASURES`}.

    For every block of the network with two branches or more; in eval mode, where a branch is a
    convolution. batches: images (N, C, *space) where the model is, four or more in each. nan
    stands where a branch is zero.
    Raises: ValueError in train mode, without images, and for batches that are too small.
    """
    if training := [name or "the model" for name, m in model.named_modules() if m.training]:
        raise ValueError(f"{training[0]} is in train mode: call model.eval() first.")
    blocks = {n: b for n, b in outermost_blocks(model).items() if len(b.branches) > 1}
    sums: dict[str, list[Tensor]] = {name: [] for name in blocks}

    def see(name: str, block: RepBlock, x: Tensor) -> None:
        maps = torch.stack([out.flatten(1) for out in block.branch_outputs(x).values()])
        flat = maps.flatten(1)
        found = [(flat @ flat.T).double(), unbiased_hsic((maps @ maps.mT).double())]
        before = sums[name] or [torch.zeros_like(part) for part in found]
        sums[name] = [a + b for a, b in zip(before, found, strict=True)]

    hooks = [
        block.register_forward_pre_hook(lambda block, given, name=name: see(name, block, given[0]))
        for name, block in blocks.items()
    ]
    try:
        for batch in batches:
            model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    if unseen := [name for name, seen in sums.items() if not seen]:
        raise ValueError(f"no image has reached {unseen[0]}: batches must hold some.")
    return {
        name: {
            "branches": list(block.branches),
            "kernels": kernel_cosines(block),
            "outputs": over_norms(sums[name][0]),
            "cka": over_norms(sums[name][1]),
        }
        for name, block in blocks.items()
    }
