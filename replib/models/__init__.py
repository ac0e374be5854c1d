"""Bodies by name: BODIES[name](classes=..., in_channels=..., block=...) -> nn.Module.

`block` is a key of `BLOCKS`, or a `Family`: the same with options for every block of the network.
A body whose layers are fixed (the ResNet teachers) takes none.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from functools import partial

from torch import nn

from replib.blocks import BLOCKS
from replib.blocks.convbn import ConvBN
from replib.models.acnet import cifar_quick, densenet40, projected_resnet, wide_resnet16
from replib.models.cifar_repvgg import WIDTH_FACTORS, cifar_repvgg, digits_net
from replib.models.ghost import repopt_ghostnet
from replib.models.known import KNOWN, from_torchvision
from replib.models.layers import Family
from replib.models.mobile import MOBILEONE, mobilenet_v1, mobileone
from replib.models.replknet import REPLKNET, replknet
from replib.models.repmlpnet import REPMLPNET, repmlpnet, resmlp12
from replib.models.repvgg import (
    REPOPT_VGG,
    REPVGG,
    RepVGGPlus,
    repopt_vgg,
    repvgg,
    repvgg_with_relus,
    residual_repvgg,
)
from replib.models.resnet import RESNETS, resnet
from replib.models.vgg import alexnet, cifar_vgg16

__all__ = ["BODIES", "BODY_VERSIONS", "build", "options_of"]


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
    "cifar_quick": cifar_quick,
    **{f"projected_resnet{6 * n + 2}": partial(projected_resnet, n) for n in (3, 9, 18)},
    "wide_resnet16_8": partial(wide_resnet16, 8),
    "densenet40": densenet40,
    "alexnet": partial(alexnet, 5),
    "alexnet_with_11": partial(alexnet, 11),  # its first layer is a block too
    **{name: partial(resnet, name) for name in RESNETS},
    "wide_resnet18_2": partial(resnet, "resnet18", width=2),
    "mobilenet_v1": mobilenet_v1,
    **{f"mobileone_{name}": partial(mobileone, name) for name in MOBILEONE},
    **{f"repvgg_{name}": partial(repvgg, name) for name in REPVGG},
    "repvgg_b0_with_relus": partial(repvgg_with_relus, "b0"),
    "repvgg_b0_residual": partial(residual_repvgg, "b0"),
    "repvggplus_l2pse": RepVGGPlus,
    **{f"repopt_vgg_{name}": partial(repopt_vgg, name) for name in REPOPT_VGG},
    "repopt_ghostnet_050": partial(repopt_ghostnet, width=0.5),
    **{name: partial(from_torchvision, name) for name in KNOWN},
    # Without blocks, for its own weights.
    "torchvision_resnet50": partial(from_torchvision, "resnet50"),
    **{f"replknet_{name}": partial(replknet, name) for name in REPLKNET},
    **{f"repmlpnet_{name}": partial(repmlpnet, name) for name in REPMLPNET},
    "cifar_repmlpnet": partial(repmlpnet, "cifar"),
    "resmlp12": resmlp12,
}


def options_of(body: str) -> list[str]:
    """The names of what can be chosen of a body, beside its width and its blocks."""
    given = ("classes", "in_channels", "block", "width")
    parameters = inspect.signature(BODIES[body]).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in given]


# Raised by hand when the numbers of a body change; a body that is not named is at its first.
BODY_VERSIONS: dict[str, int] = {}


def build(
    body: str,
    block: str,
    *,
    classes: int,
    in_channels: int,
    width: float = 1.0,
    block_options: Mapping[str, object] | None = None,
    plain_sizes: Collection[int] = (),
    body_options: Mapping[str, object] | None = None,
) -> nn.Module:
    """A network by the names of its body and of its block; width multiplies all its widths.

    block_options: of the family, for every block of the network.
    body_options: of the body itself, see `options_of`.
    plain_sizes: kernel sizes whose convolutions stay plain.
    Raises: ValueError for names that are not known, and for what is fixed in a body.
    """
    for name, value, known in (("body", body, BODIES), ("block", block, BLOCKS)):
        if value not in known:
            raise ValueError(f"{name} (={value!r}) must be one of {', '.join(known)}.")
    make = BODIES[body]
    known = inspect.signature(make).parameters
    own = block_options or {}
    options: dict = {"block": Family(block, own, plain_sizes)} if "block" in known else {}
    if own and not options:
        raise ValueError(f"block_options (={own}) must be empty: the layers of {body} are fixed.")
    if unknown := sorted(own.keys() - set(BLOCKS[block].options())):
        have = ", ".join(BLOCKS[block].options()) or "none"
        raise ValueError(
            f"block_options (={own}): {block} has no option {unknown[0]!r}; its options: {have}."
        )
    if width != 1 and "width" not in known:
        raise ValueError(f"width (={width}) must be 1: the widths of {body} are fixed.")
    if width != 1:
        options["width"] = width * known["width"].default
    if unknown := sorted((body_options or {}).keys() - set(options_of(body))):
        have = ", ".join(options_of(body)) or "none"
        raise ValueError(
            f"body_options (={dict(body_options)}): {body} has no option {unknown[0]!r}; its "
            f"options: {have}."
        )
    options |= body_options or {}
    model = make(classes=classes, in_channels=in_channels, **options)
    plain = (module for module in model.modules() if isinstance(module, ConvBN))
    if unused := set(plain_sizes) - {max(module.geometry.kernel_size) for module in plain}:
        raise ValueError(
            f"plain_sizes (={sorted(plain_sizes)}): {body} has no convolution of {min(unused)}."
        )
    return model
