"""Bodies by name: BODIES[name](classes=..., in_channels=..., block=...) -> nn.Module.

`block` is a key of `BLOCKS`; a body whose layers are fixed (the ResNet teachers) takes none.
"""

from __future__ import annotations

import inspect
from functools import partial

from torch import nn

from replib.blocks import BLOCKS
from replib.models.cifar_repvgg import WIDTH_FACTORS, cifar_repvgg, digits_net
from replib.models.ghost import repopt_ghostnet
from replib.models.mobile import MOBILEONE, mobilenet_v1, mobileone
from replib.models.replknet import REPLKNET, replknet
from replib.models.repmlpnet import REPMLPNET, repmlpnet
from replib.models.repvgg import REPOPT_VGG, REPVGG, RepVGGPlus, repopt_vgg, repvgg
from replib.models.resnet import RESNETS, resnet
from replib.models.vgg import cifar_vgg16

__all__ = ["BODIES", "BODY_VERSIONS", "build"]


def cifar_resnet(n: int, *, classes: int, in_channels: int = 3) -> nn.Module:
    """The CIFAR ResNet of He et al., CVPR 2016, with 6 n + 2 layers (110: 1.7 M parameters)."""
    from replib.models.cifar_resnet import CifarResNet  # torchvision is slow to import

    return CifarResNet(n, classes=classes, in_channels=in_channels)


def resnet101(*, classes: int, in_channels: int = 3) -> nn.Module:
    """ResNet-101 with a CIFAR stem (42.7 M parameters)."""
    from replib.models.cifar_resnet import cifar_resnet101

    return cifar_resnet101(classes=classes, in_channels=in_channels)


BODIES = {
    **{f"cifar_repvgg_{name}": partial(cifar_repvgg, name) for name in WIDTH_FACTORS},
    # For processors: the topology of A1 at half its width.
    "cifar_repvgg_a1_half": partial(cifar_repvgg, "a1", 0.5),
    "digits": partial(digits_net, 8),
    "digits_wide": partial(digits_net, 16),
    "cifar_resnet18": partial(resnet, "resnet18", small_images=True),
    "cifar_resnet56": partial(cifar_resnet, 9),
    "cifar_resnet110": partial(cifar_resnet, 18),
    "cifar_resnet101": resnet101,
    "cifar_vgg16": cifar_vgg16,
    **{name: partial(resnet, name) for name in RESNETS},
    "wide_resnet18_2": partial(resnet, "resnet18", width=2),
    "mobilenet_v1": mobilenet_v1,
    **{f"mobileone_{name}": partial(mobileone, name) for name in MOBILEONE},
    **{f"repvgg_{name}": partial(repvgg, name) for name in REPVGG},
    "repvggplus_l2pse": RepVGGPlus,
    **{f"repopt_vgg_{name}": partial(repopt_vgg, name) for name in REPOPT_VGG},
    "repopt_ghostnet_050": partial(repopt_ghostnet, 0.5),
    **{f"replknet_{name}": partial(replknet, name) for name in REPLKNET},
    **{f"repmlpnet_{name}": partial(repmlpnet, name) for name in REPMLPNET},
}


# Raised by hand when the numbers of a body change; a body that is not named is at its first.
BODY_VERSIONS: dict[str, int] = {}


def build(
    body: str, block: str, *, classes: int, in_channels: int, width: float = 1.0
) -> nn.Module:
    """A network by the names of its body and of its block; width multiplies all its widths.

    Raises: ValueError for names that are not known, and where the widths of a body are fixed.
    """
    for name, value, known in (("body", body, BODIES), ("block", block, BLOCKS)):
        if value not in known:
            raise ValueError(f"{name} (={value!r}) must be one of {', '.join(known)}.")
    make = BODIES[body]
    known = inspect.signature(make).parameters
    options: dict = {"block": block} if "block" in known else {}
    if width != 1 and "width" not in known:
        raise ValueError(f"width (={width}) must be 1: the widths of {body} are fixed.")
    if width != 1:
        options["width"] = width * known["width"].default
    return make(classes=classes, in_channels=in_channels, **options)
