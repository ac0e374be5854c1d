"""Three toy blocks that compute the same at first, and learn differently.

    single   s (W x)                    one kernel, one scale per channel
    shared   s (W1 x + W2 x + ...)      branches under one scale
    own      s1 W1 x + s2 W2 x + ...    branches with scales of their own

With W = W1 + W2 + ... and equal scales all are one function. Let g be the gradient of the loss at
the merged kernel. In `shared` every branch is given s g, whatever its kernel is: the branches move
alike, and n of them are one kernel that learns n times as fast. In `own` branch i is given s_i g
and its scale <g, W_i>, which differ from branch to branch as soon as the scales have moved once.

Source: Hu et al., "Online Convolutional Re-parameterization", CVPR 2022, supplement.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from replib.branches import Chain, Convolution, Piece, Scale, Sum

FORMS = ("single", "shared", "own")
SIZE, CHANNELS = (3, 3), 4


@dataclass
class Path:
    """What was seen before every step of a training, and the merged kernel after the last, too."""

    kernels: list[Tensor] = field(default_factory=list)  # merged, flat, float64
    losses: list[float] = field(default_factory=list)
    gradients_apart: list[float] = field(default_factory=list)  # of two branches: `apart`
    kernels_alike: list[float] = field(default_factory=list)  # their cosine


def block(form: str, weights: list[Tensor]) -> Piece:
    """A toy block of one of `FORMS`, of kernels (O, I, h, w) and scales of 1; in float64."""

    def convolution(weight: Tensor) -> Convolution:
        made = Convolution(weight.shape[1], len(weight), tuple(weight.shape[2:])).double()
        made.weight.data = weight.clone()
        return made

    def scale() -> Scale:
        return Scale(len(weights[0]), weights[0].dim() - 2).double()

    if form == "single":
        return Chain(convolution(torch.stack(weights).sum(0)), scale())
    if form == "shared":
        branches = {f"branch{i}": convolution(weight) for i, weight in enumerate(weights)}
        return Chain(Sum(branches, "branch0"), scale())
    if form == "own":
        return Sum(
            {f"branch{i}": Chain(convolution(w), scale()) for i, w in enumerate(weights)}, "branch0"
        )
    raise ValueError(f"form (={form!r}) must be one of {', '.join(FORMS)}.")


def apart(first: Tensor, second: Tensor) -> float:
    """|a - b| / (|a| + |b|): 0 for equal ones, 1 for opposite ones."""
    return ((first - second).norm() / (first.norm() + second.norm())).item()


def trained(
    form: str,
    *,
    seed: int = 0,
    branches: int = 2,
    steps: int = 200,
    learning_rate: float = 0.02,
    kernel_factor: float = 1.0,
) -> Path:
    """Train a toy block to be another kernel, by plain gradient descent on random images.

    kernel_factor: on the learning rate of the kernels; scales keep theirs. The seed draws images,
    kernels and what is to be learned, the same for every form.
    """
    drawn = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=drawn, dtype=torch.float64)

    shape = CHANNELS, CHANNELS, *SIZE
    x, wanted = normal(16, CHANNELS, 8, 8), normal(*shape) / 6
    weights = [normal(*shape) / 6 for _ in range(branches)]
    target, model, path = F.conv2d(x, wanted), block(form, weights), Path()
    kernels = [m.weight for m in model.modules() if isinstance(m, Convolution)]
    scales = [m.weight for m in model.modules() if isinstance(m, Scale)]
    optimizer = torch.optim.SGD(
        [{"params": scales}, {"params": kernels, "lr": learning_rate * kernel_factor}],
        lr=learning_rate,
    )

    def see() -> None:
        path.kernels.append(model.kernel().weight.detach().flatten())

    for _ in range(steps):
        see()
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), target)
        loss.backward()
        path.losses.append(loss.item())
        if len(kernels) > 1:
            first, second = kernels[:2]
            path.gradients_apart.append(apart(first.grad, second.grad))
            alike = F.cosine_similarity(first.flatten(), second.flatten(), dim=0)
            path.kernels_alike.append(alike.item())
        optimizer.step()
    see()
    return path


def distances(first: Path, second: Path) -> list[float]:
    """How far apart two merged kernels are, step by step, over the length of the first's way."""
    way = (first.kernels[-1] - first.kernels[0]).norm()
    return [
        ((a - b).norm() / way).item() for a, b in zip(first.kernels, second.kernels, strict=True)
    ]
