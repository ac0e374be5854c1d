"""Bodies by name: BODIES[name](classes=..., in_channels=..., block=...) -> nn.Module.

A body whose layers are fixed (the ResNet teachers) takes no `block`.
"""

from __future__ import annotations

import inspect
from functools import partial

from torch import nn

from replib.blocks import BLOCKS
from replib.models.cifar_repvgg import WIDTH_FACTORS, cifar_repvgg, digits_net

__all__ = ["BODIES", "build"]


def resnet110(*, classes: int, in_channels: int = 3) -> nn.Module:
    """The 110-layer CIFAR ResNet of He et al., CVPR 2016 (1.7 M parameters)."""
    from replib.models.cifar_resnet import CifarResNet  # torchvision is slow to import

    return CifarResNet(18, classes=classes, in_channels=in_channels)


def resnet101(*, classes: int, in_channels: int = 3) -> nn.Module:
    """ResNet-101 with a CIFAR stem (42.7 M parameters)."""
    from replib.models.cifar_resnet import cifar_resnet101

    return cifar_resnet101(classes=classes, in_channels=in_channels)


BODIES = {
    **{f"cifar_repvgg_{name}": partial(cifar_repvgg, name) for name in WIDTH_FACTORS},
    # For processors: the topology of A1 at half its width.
    "cifar_repvgg_a1_half": partial(cifar_repvgg, "a1", 0.5),
    "digits": partial(digits_net, 8),
    "digits_wide": partial(digits_net, 24),
    "cifar_resnet110": resnet110,
    "cifar_resnet101": resnet101,
}


def build(body: str, block: str, *, classes: int, in_channels: int) -> nn.Module:
    """A network by the names of its body and of its block.

    Raises: ValueError for names that are not known.
    """
    for name, value, known in (("body", body, BODIES), ("block", block, BLOCKS)):
        if value not in known:
            raise ValueError(f"{name} (={value!r}) must be one of {', '.join(known)}.")
    make = BODIES[body]
    options = {"block": block} if "block" in inspect.signature(make).parameters else {}
    return make(classes=classes, in_channels=in_channels, **options)
