"""What DyRep's default score is of a convolution that a batch norm follows.

The score is the sum of g w over a kernel w with gradient g: the derivative of the loss L in the
length of the kernel. A norm divides by the deviation of the batch, so that length would not matter
at all, were it not for the norm's eps. Scaling filter o by c turns its normalised output
x = (z - mean) / sqrt(v + eps) into c (z - mean) / sqrt(c^2 v + eps), whose derivative at c = 1 is
x eps / (v + eps); hence, with gamma the norm's slope,

    sum of g w = sum over filters of eps / (v + eps) gamma dL/dgamma.

Every term is a share of order eps of something else, and by its sign it may add or take away: what
has the highest sum is where v, the variance of a filter's output, is small, and chance besides; in
float32 much of the sum is rounding. Sources: Huang et al., "DyRep", CVPR 2022, section 3.2, for the
score; van Laarhoven, 2017, for the lengths that do not matter.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from replib.branches import Chain, Convolution, Norm
from replib.methods.dyrep import SCORES, sites, unfit
from replib.networks import norms_after


def norms_of(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Convolution -> the batch norm that alone consumes its output."""
    found = dict(norms_after(model))
    for module in model.modules():
        if isinstance(module, Chain):
            for piece, after in pairwise(module):
                if isinstance(piece, Convolution) and isinstance(after, Norm):
                    found[piece] = after.norm
    return found


def signed_sums(
    model: nn.Module, x: Tensor, y: Tensor, loss: Callable[[Tensor, Tensor], Tensor]
) -> list[dict]:
    """The scores of one batch for every convolution that may grow and that a norm follows.

    x (N, C, H, W), y: inputs and targets; loss: (outputs, targets) -> scalar. In train mode; the
    model is left as it is. A record: {convolution, snip, single, double, predicted}; single and
    double: sum of g w in float32 and in float64; predicted: the sum over filters above, of what
    was computed in float64. `snip` is sum |g w|.
    """
    rows: dict[str, dict] = {}
    for precision, name in ((torch.float32, "single"), (torch.float64, "double")):
        twin = copy.deepcopy(model).to(precision).train()
        twin.zero_grad()
        norms = norms_of(twin)
        chosen = {
            path: (site.module, norms[site.module])
            for path, site in sites(twin).items()
            if unfit(twin, site) is None and site.module in norms
        }
        variance: dict[nn.Module, Tensor] = {}

        def see(norm: nn.Module, inputs: tuple[Tensor, ...], seen=variance) -> None:
            seen[norm] = inputs[0].detach().var((0, *range(2, inputs[0].dim())), correction=0)

        for _, norm in chosen.values():
            norm.register_forward_pre_hook(see)
        loss(twin(x.to(precision)), y).backward()
        for path, (conv, norm) in chosen.items():
            row = rows.setdefault(path, {"convolution": path})
            row[name] = SCORES["synflow"](conv.weight.detach(), conv.weight.grad).item()
            row["snip"] = SCORES["snip"](conv.weight.detach(), conv.weight.grad).item()
            share = norm.eps / (variance[norm] + norm.eps)
            row["predicted"] = (share * norm.weight.detach() * norm.weight.grad).sum().item()
    return list(rows.values())
