"""What a step on the branches does to the merged kernel: a step with another metric.

The merged kernel K is a function of the block's parameters p. One small step of SGD on them,
p - lr J^T g with J = dK/dp and g = dL/dK, moves K by

    -lr (J J^T) g + O(lr^2):

gradient descent on K itself, preconditioned by the positive semidefinite P = J J^T. Where K is
linear in p (convolutions side by side: RepVGG, ACB, CSLA) there is no O(lr^2). With P = 1 the
branches would change nothing. Norms are taken with their running statistics, as in eval mode; in
train mode the statistics move with the weights, which this leaves out.

Sources: Arora et al., "On the optimization of deep networks: implicit acceleration by
overparameterization", ICML 2018, for chains; Ding et al., "Re-parameterizing your optimizers rather
than architectures", ICLR 2023, for sums with constant scales, where P is a diagonal.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from replib.blocks.block import RepBlock
from replib.branches import Convolution

PARAMETERS = {
    "convolutions": "the kernels of the convolutions; slopes and scales stand still",
    "all": "everything that is trained",
}


class MergedWeight(nn.Module):
    """A block whose call returns the weight of its merged kernel, (O, I/G, *k), in float64."""

    def __init__(self, block: RepBlock):
        super().__init__()
        self.block = block

    def forward(self) -> Tensor:
        return self.block.in_own_form(self.block.kernel()).weight


def weight_of(
    block: RepBlock, which: str
) -> tuple[Callable[[dict[str, Tensor]], Tensor], dict[str, Tensor]]:
    """The merged weight as a function of parameters, and their values by name.

    Raises: ValueError where `which` is not a key of `PARAMETERS`.
    """
    if which not in PARAMETERS:
        raise ValueError(f"which (={which!r}) must be one of {', '.join(PARAMETERS)}.")
    model = MergedWeight(block)
    kernels = {id(m.weight) for m in block.modules() if isinstance(m, Convolution)}
    values = {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (which == "all" or id(parameter) in kernels)
    }
    return lambda values: torch.func.functional_call(model, values, ()), values


def preconditioned(block: RepBlock, gradient: Tensor, which: str = "convolutions") -> Tensor:
    """P g: one step of SGD on the branches moves the merged weight by -lr times this.

    gradient: dL/dK, (O, I/G, *k), in float64.
    """
    weight, values = weight_of(block, which)
    _, pull = torch.func.vjp(weight, values)
    (tangent,) = pull(gradient)
    _, moved = torch.func.jvp(weight, (values,), (tangent,))
    return moved.detach()


def multiplier(block: RepBlock, which: str = "convolutions") -> Tensor:
    """The diagonal of P, (O, I/G, *k): how much faster every number of the kernel learns.

    Where the scales of the branches are constants it is all of P, and what RepOptimizers multiply
    the gradient with. Time and memory grow as the square of the kernel: for small blocks.
    """
    weight, values = weight_of(block, which)
    value, pull = torch.func.vjp(weight, values)
    basis = torch.eye(value.numel(), dtype=value.dtype, device=value.device)
    (rows,) = torch.func.vmap(pull)(basis.view(-1, *value.shape))  # J, a row per number of K
    return sum(row.flatten(1).square().sum(1) for row in rows.values()).view(value.shape).detach()


def by_tap(values: Tensor) -> Tensor:
    """The mean over channels of what belongs to the numbers of a kernel: (O, I/G, *k) -> (*k)."""
    return values.mean((0, 1))
