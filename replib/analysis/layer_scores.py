"""How much the training loss depends on the kernels of every block, branch by branch.

For a kernel w and the gradient g of the loss of one batch at w:

    snip       sum |g w|   what removing single weights would change, to first order; of one sign
    synflow    sum g w     what scaling the whole kernel would change: 0 before a batch norm
    grad_norm  |g|

RepAn's released code (runner/grad.py) adds up `snip` over a block's k x k and 1 x 1 kernels, under
the name of synflow, and logs the mean of `synflow` for the k x k ones. DyRep (Huang et al., CVPR
2022, section 3.2) grows where a score is highest; its code has all three under these names.
`snip` is the connection sensitivity of Lee et al., ICLR 2019; the data-free score of Tanaka et
al., NeurIPS 2020, from which `synflow` has its name, is another one.

A batch norm divides by the deviation of its batch, so in train mode the loss does not change when
a kernel right before it is scaled, and `synflow` is 0 up to the norm's eps and rounding
(`replib.analysis.scale_invariance`): its sign and its ranking then say nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from replib.branches import Convolution
from replib.methods.dyrep import SCORES
from replib.networks import outermost_blocks

VERSION = 1  # raise when the numbers change


def layer_scores(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor],
) -> list[dict]:
    """Scores of every branch that has kernels: means over the batches, in train mode.

    batches: (inputs, targets) on the model's device; an epoch, as RepAn's code, or a part of one.
    loss: (outputs, targets) -> scalar. The model itself is left as it is.
    A record: {block, branch, role, weights, snip, synflow, grad_norm}, in the order of the
    network; role: "main" or "side"; weights: how many the branch's kernels have. Several kernels
    of one branch count as one vector. A kernel that is stored as a difference from the identity
    (DBB) counts with the identity. Add up the branches of a block for RepAn's score of it.
    Raises: ValueError for a model without blocks, and without batches.
    """
    twin = copy.deepcopy(model).train().requires_grad_(False)
    branches = kernels_of(twin)
    if not branches:
        raise ValueError(f"{type(model).__name__} has no block with kernels: see replib.convert.")
    weights = [
        kernel.weight.requires_grad_() for kernels in branches.values() for kernel in kernels
    ]
    total, count = 0.0, 0
    for inputs, targets in batches:
        value = loss(twin(inputs), targets)
        found = torch.autograd.grad(value, weights, allow_unused=True, materialize_grads=True)
        total, count = total + scored(list(branches.values()), iter(found)), count + 1
    if not count:
        raise ValueError("batches is empty: at least one is needed.")
    blocks, records = outermost_blocks(twin), []
    for (block, branch), values in zip(branches, (total / count).tolist(), strict=True):
        role = "main" if blocks[block].branches[branch] is blocks[block].main_branch else "side"
        size = sum(kernel.weight.numel() for kernel in branches[block, branch])
        record = {"block": block, "branch": branch, "role": role, "weights": size}
        records.append(record | dict(zip(SCORES, values, strict=True)))
    return records


def kernels_of(model: nn.Module) -> dict[tuple[str, str], list[Convolution]]:
    """(block, branch) -> its convolutions, for all branches that have any."""
    found = {
        (block_name, branch_name): [m for m in branch.modules() if isinstance(m, Convolution)]
        for block_name, block in outermost_blocks(model).items()
        for branch_name, branch in block.branches.items()
    }
    return {names: kernels for names, kernels in found.items() if kernels}


@torch.no_grad()
def scored(branches: list[list[Convolution]], gradients: Iterable[Tensor]) -> Tensor:
    """(branches, scores) of one batch, float64, where the model is: nothing waits for it."""
    rows = []
    for kernels in branches:
        weight = torch.cat([kernel.effective_weight().flatten() for kernel in kernels]).double()
        gradient = torch.cat([next(gradients).flatten() for _ in kernels]).double()
        rows.append(torch.stack([score(weight, gradient) for score in SCORES.values()]))
    return torch.stack(rows)
