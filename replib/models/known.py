"""Networks of torchvision that are trained and counted as they are."""

from __future__ import annotations

from torch import nn

KNOWN = (
    "vgg16",
    "vgg16_bn",
    "mobilenet_v2",
    *(f"efficientnet_b{size}" for size in (0, 2, 3, 4, 5)),
)


def from_torchvision(name: str, *, classes: int, in_channels: int = 3) -> nn.Module:
    """A network of `KNOWN`, as it begins: (N, in_channels, H, W) -> (N, classes).

    Its first convolution is made anew where images have other than 3 channels.
    """
    from torchvision.models import get_model  # slow to import

    model = get_model(name, weights=None, num_classes=classes)
    if in_channels != 3:
        path, first = next((p, m) for p, m in model.named_modules() if isinstance(m, nn.Conv2d))
        shape = (in_channels, first.out_channels, first.kernel_size, first.stride, first.padding)
        model.set_submodule(path, nn.Conv2d(*shape, bias=first.bias is not None))
    return model
