"""What every comparison is told, how large it is, and the plain data that it returns.

ways       [{"way", "network", "milliseconds", "saved_mib", ...}]
ratios     [{"of", "over", "what", "median", "low", "high", "rounds"}], of / over, or
           {"of", "over", "what", "refused"} where the two do not compute the same thing
agreement  [{"way", "equal", "errors", "allowed"}]
left_out   {way: reason}
numbers    {name: a number, or a spread}
profiles   {way: rows of `timing.profile`}
limits     {way: {"products_ms", "times", "over"}}
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from replib.benchmark.timing import Action, alternate


@dataclass(frozen=True)
class Subject:
    """A network, and the images (batch, channels, size, size) that it is trained on.

    few: images on which ways are checked; None: all. A compiled step is checked on all, too.
    """

    make: Callable[[], nn.Module]
    size: int
    batch: int
    channels: int = 3
    few: int | None = 16


@dataclass(frozen=True)
class Tier:
    """How large the cases are. Image sizes in pixels, batches in images."""

    name: str
    rounds: int
    body: str  # a plain body of blocks for small images
    in_channels: int
    image: int
    batch: int
    many_batch: int  # where every family of blocks is measured
    large_image: int  # ResNet-18
    large_batch: int
    full_image: int  # ResNet-18 at the size of OREPA's paper
    full_batch: int
    crossover: tuple[int, ...]  # batches
    epoch_images: int
    epochs: int
    workers: tuple[int, ...]  # packed cells
    gigabytes: float  # of the arrays whose copying is timed
    matrix: int  # rows of the matrices whose product is timed


TIERS = {
    "quick": Tier(
        "quick", 3, "digits", 3, 8, 8, 8, 64, 4, 64, 4, (1, 2), 32, 3, (1, 2), 0.002, 64
    ),
    "cpu": Tier(
        "cpu", 4, "cifar_repvgg_a1", 3, 32, 128, 32, 112, 4, 224, 64, (1, 2, 4, 8), 640, 3,
        (1, 2, 4, 8), 0.25, 2048,
    ),
    "cuda": Tier(
        "cuda", 9, "cifar_repvgg_a1", 3, 32, 128, 128, 224, 32, 224, 64, (1, 4, 16, 64, 128),
        20_000, 3, (1, 2, 4, 8), 2.0, 8192,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """Where and how large a case is measured."""

    tier: Tier
    device: str = "cpu"
    deadline: float = math.inf  # of the case, on the clock of time.monotonic()
    profiled: frozenset[str] = field(default_factory=frozenset)  # ways whose profile is wanted
    vectors: Path | None = None  # a folder of official numbers

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")


def images(setting: Setting, batch: int, channels: int, size: int) -> tuple[Tensor, Tensor]:
    """Random images and labels, the same on every device."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, channels, size, size, generator=generator)
    return x.to(setting.device), torch.randint(10, (batch,), generator=generator).to(setting.device)


def timed(setting: Setting, actions: Mapping[str, Action]) -> dict[str, list[float]]:
    """Seconds in every round."""
    options = {"device": setting.device, "rounds": setting.tier.rounds}
    return alternate(dict(actions), **options, deadline=setting.deadline)
