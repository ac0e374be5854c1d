"""Why a plain stack of 3 x 3 layers: one convolution by the size of its kernel, and the maps that a
shortcut keeps.

Source: Ding et al., "RepVGG: Making VGG-style ConvNets Great Again", CVPR 2021, table 1 and
figure 3.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from replib.benchmark.setting import Setting, timed
from replib.benchmark.steps import peak_mib
from replib.benchmark.timing import quotients, rounded, spread

SIZES = (1, 3, 5, 7)
SHAPES = {"quick": (2, 8, 8), "cpu": (4, 256, 28), "cuda": (32, 2048, 56)}  # images, channels, side
DEPTH = 4  # pairs of layers, with a shortcut around each pair or with none


def operations(shape: tuple[int, int, int], size: int) -> int:
    """Of one convolution of stride 1 that keeps channels and map, two for a multiply-add."""
    images, channels, side = shape
    return 2 * images * (channels * side * size) ** 2


@torch.no_grad()
def kernel_sizes(setting: Setting) -> dict:
    """The time of one convolution by its kernel's size, and the operations that it does in it."""
    shape = images, channels, side = SHAPES[setting.tier.name]
    layout = {"device": setting.device, "memory_format": torch.channels_last}
    x = torch.randn(images, channels, side, side).to(**layout)
    layers = {
        f"{k} × {k}": nn.Conv2d(channels, channels, k, padding=k // 2, bias=False).to(**layout)
        for k in SIZES
    }
    times = timed(setting, {name: lambda layer=layer: layer(x) for name, layer in layers.items()})
    work = {name: operations(shape, k) for name, k in zip(layers, SIZES, strict=True)}
    first, note = next(iter(layers)), f"{channels} channels, {side} × {side}, {images} images"
    return {
        "ways": [
            {"way": name, "note": note, "milliseconds": spread(seconds, 1000)}
            | {"gflop": rounded(work[name] / 1e9)}
            for name, seconds in times.items()
        ],
        "ratios": [
            {"of": name, "over": first, "what": "time"} | quotients(seconds, times[first])
            for name, seconds in times.items()
            if name != first
        ],
        "numbers": {
            f"{name}, GFLOP/s": spread([work[name] / s / 1e9 for s in seconds])
            for name, seconds in times.items()
        },
    }


class Watched(TorchDispatchMode):
    """Sees every tensor that is made, and how many bytes of them are there at once.

    within: at most, while a layer computes and has both its input and its output; between: when
    none does. What was made outside, as weights are, is not counted.
    """

    def __init__(self):
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.within = self.between = 0

    def there(self) -> int:
        """Bytes of what has been made and is still used."""
        self.made = {key: one for key, one in self.made.items() if not one[0].expired()}
        return sum(size for _, size in self.made.values())

    def __torch_dispatch__(self, function: Callable, types: list, given=(), options=None):
        self.between = max(self.between, self.there())
        out = function(*given, **(options or {}))
        if isinstance(out, Tensor):
            storage = out.untyped_storage()
            self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.within = max(self.within, self.there())
        return out


class Source(nn.Module):
    """Makes the first map, so that nobody outside of the network holds it."""

    def __init__(self, shape: tuple[int, ...], device: str):
        super().__init__()
        self.shape, self.device = shape, device

    def forward(self, _: None) -> Tensor:
        return torch.ones(self.shape, device=self.device)


class Residual(nn.Module):
    """Two layers, whose input is added to what they compute."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).add_(x)


def stacks(channels: int) -> dict[str, list[nn.Module]]:
    """The layers of a plain stack, and of one with a shortcut around every two."""

    def convolutions() -> list[nn.Module]:
        return [nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2)]

    plain, residual = [], []
    for _ in range(DEPTH):
        (first, second), (third, fourth) = convolutions(), convolutions()
        plain += [first, nn.ReLU(inplace=True), second, nn.ReLU(inplace=True)]
        residual += [Residual(third, nn.ReLU(inplace=True), fourth), nn.ReLU(inplace=True)]
    return {"plain": plain, "residual": residual}


@torch.no_grad()
def shortcut(setting: Setting) -> dict:
    """How many maps are in memory at once in inference, with shortcuts and without."""
    images, channels, side = SHAPES[setting.tier.name]
    channels = min(channels, 256)  # more would only take longer
    shape = images, channels, side, side
    one, numbers, ways = 4 * images * channels * side**2, {}, []
    for name, layers in stacks(channels).items():
        network = nn.Sequential(Source(shape, setting.device), *layers).to(setting.device)
        with Watched() as watched:
            network(None)
        numbers[f"{name}: maps at once, between layers"] = {"median": watched.between / one}
        numbers[f"{name}: maps at once, within a layer"] = {"median": watched.within / one}
        if setting.on_gpu:  # work space of the layers included
            ways.append({"way": name, "peak_mib": peak_mib(lambda n=network: n(None))})
    return {"numbers": numbers, "ways": ways}
