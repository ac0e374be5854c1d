"""Convolutions before a norm: their length does not matter, and so it sets the learning rate.

A batch norm divides by the deviation of its batch, so in train mode the loss L does not change
when a filter w before it is multiplied by a number (exactly so without the norm's eps). Then, for
the gradient g of L at w,

    w . g = 0,    g(c w) = g(w) / c,    and a step of SGD turns w by about lr |g| / |w|,

that is, by lr / |w|^2 times the gradient at length 1: the effective learning rate. With weight
decay wd the length settles where both balance, 2 lr wd |w|^2 = lr^2 |g|^2, and the angle per step
is sqrt(2 lr wd) there, whatever the gradients are (plain SGD).

Sources: van Laarhoven, "L2 regularization versus batch and weight normalization", 2017, section 2;
Zhang et al., "Three mechanisms of weight decay regularization", ICLR 2019; the angle: Wan et al.,
"Spherical motion dynamics", NeurIPS 2021.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from replib.branches import Chain, Convolution, Norm
from replib.networks import norms_after


def normalised_convolutions(model: nn.Module) -> dict[str, nn.Module]:
    """The convolutions, by name, whose output goes to a norm and nowhere else.

    In the branches of blocks, and plain ones that a trace of the network finds. A convolution that
    is summed with others before one norm (OREPA, CSLA) is not among them: only their sum is free of
    scale.
    """
    found = {id(conv) for conv in norms_after(model)}
    for module in model.modules():
        if isinstance(module, Chain):
            for piece, after in pairwise(module):
                if isinstance(piece, Convolution) and isinstance(after, Norm):
                    found.add(id(piece))
    return {name: module for name, module in model.named_modules() if id(module) in found}


def filters(conv: nn.Module) -> Tensor:
    """The filters of a convolution as vectors, (O, numbers per filter).

    Those that it convolves with: a piece that stores a difference from the identity has it added.
    """
    weight = conv.effective_weight() if isinstance(conv, Convolution) else conv.weight
    return weight.detach().flatten(1)


def effective_learning_rate(model: nn.Module, learning_rate: float) -> dict[str, Tensor]:
    """lr / |w|^2 for every filter of the normalised convolutions: {name: (O,)}."""
    return {
        name: learning_rate / filters(conv).square().sum(1)
        for name, conv in normalised_convolutions(model).items()
    }


def radial_share(conv: nn.Module) -> Tensor:
    """|w . g| / (|w| |g|) per filter, (O,): 0 where the loss does not depend on its length.

    Call after backward. A filter without gradient counts as 0.
    """
    w, g = filters(conv), conv.weight.grad.flatten(1)
    return (w * g).sum(1).abs() / (w.norm(dim=1) * g.norm(dim=1)).clamp_min(
        torch.finfo(w.dtype).tiny
    )


def equilibrium_length(unit_gradient: float, learning_rate: float, weight_decay: float) -> float:
    """Where weight decay and gradient balance: |w|^4 = lr |g1|^2 / (2 wd).

    unit_gradient: |g1|, the gradient's length for a filter of length 1, that is |g| |w|.
    """
    return (learning_rate * unit_gradient**2 / (2 * weight_decay)) ** 0.25


def equilibrium_angle(learning_rate: float, weight_decay: float) -> float:
    """The angle, in radians, by which a step of plain SGD turns a filter at equilibrium."""
    return math.sqrt(2 * learning_rate * weight_decay)


def against_theory(rows: Sequence[dict], learning_rate: float, weight_decay: float) -> list[dict]:
    """Lengths and angles as they were last, beside where they tend to; weight_decay above 0.

    rows: of `Watch`, in the order of time. {convolution, length, predicted_length, angle,
    predicted_angle}: means over the last third of the rows, predictions from its gradients.
    """
    out = []
    for name in dict.fromkeys(row["convolution"] for row in rows):
        seen = [row for row in rows if row["convolution"] == name]
        seen = seen[-max(1, len(seen) // 3) :]
        mean = {
            k: root_mean_square([r[k] for r in seen]) for k in ("length", "unit_gradient", "angle")
        }
        length = equilibrium_length(mean["unit_gradient"], learning_rate, weight_decay)
        row = {"convolution": name, "length": mean["length"], "predicted_length": length}
        row |= {"angle": mean["angle"]}
        out.append(row | {"predicted_angle": equilibrium_angle(learning_rate, weight_decay)})
    return out


def root_mean_square(values: Sequence[float]) -> float:
    return math.sqrt(math.fsum(value * value for value in values) / len(values))


class Watch:
    """What the steps of an optimizer do to every normalised convolution.

        watch = Watch(model)
        ...
            loss.backward()
            watch.step(optimizer)  # instead of optimizer.step()
        rows += watch.rows()       # means since the last call

    A row: {convolution, length, unit_gradient, angle, effective}; root mean squares over filters
    and steps of |w|, |g| |w| and the angle per step in radians, and the mean of lr / |w|^2.
    """

    def __init__(self, model: nn.Module):
        self.convolutions = normalised_convolutions(model)
        self.seen: dict[str, list[Tensor]] = {name: [] for name in self.convolutions}

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Do one step, and note it."""
        before = {name: self.state(conv) for name, conv in self.convolutions.items()}
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        optimizer.step()
        for name, conv in self.convolutions.items():
            old, slope = before[name]
            new, length = filters(conv), old.norm(dim=1)
            angle = torch.atan2(rejection(new, old), (new * old).sum(1) / length)
            effective = rates.get(id(conv.weight), 0.0) / length.square()
            squares = (length.square(), (slope * length).square(), angle.square())
            self.seen[name].append(torch.stack([*squares, effective]).mean(1))

    @staticmethod
    def state(conv: nn.Module) -> tuple[Tensor, Tensor]:
        """The filters and the lengths of their gradients; a gradient that is None counts as 0."""
        old, gradient = filters(conv).clone(), conv.weight.grad
        return old, (torch.zeros_like(old) if gradient is None else gradient.flatten(1)).norm(dim=1)

    def rows(self) -> list[dict]:
        """One row per convolution over the steps since the last call."""
        out = []
        for name, seen in self.seen.items():
            if seen:
                *squares, rate = torch.stack(seen).double().mean(0).tolist()
                length, gradient, angle = map(math.sqrt, squares)
                row = {"convolution": name, "length": length, "unit_gradient": gradient}
                out.append(row | {"angle": angle, "effective": rate})
                seen.clear()
        return out


def rejection(new: Tensor, old: Tensor) -> Tensor:
    """The length of what is in `new` at right angles to `old`, per row; exact for tiny angles."""
    unit = old / old.norm(dim=1, keepdim=True)
    return (new - (new * unit).sum(1, keepdim=True) * unit).norm(dim=1)
