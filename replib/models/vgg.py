"""VGG-16 for 32x32 images, as DyRep trains it.

Sources: Simonyan and Zisserman, "Very Deep Convolutional Networks", ICLR 2015, table 1 D; the head
is that of Huang et al., "DyRep", CVPR 2022 (released code).
"""

from __future__ import annotations

from torch import nn

from replib.models.layers import drawn_by_fan_out, layer, sequence

VGG16 = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # width, depth


def cifar_vgg16(*, classes: int, block: str | None = "convbn", in_channels: int = 3) -> nn.Module:
    """(N, in_channels, 32, 32) -> (N, classes). block None: plain layers, to grow blocks in."""
    features: dict[str, nn.Module] = {}
    channels, index = in_channels, 0
    for i, (width, depth) in enumerate(VGG16):
        for _ in range(depth):
            features[f"conv{index}"] = layer(block, channels, width, 3)
            channels, index = width, index + 1
        features[f"pool{i}"] = nn.MaxPool2d(2, 1 if i == len(VGG16) - 1 else 2)
    head = {"flatten": nn.Flatten(), "fc": nn.Linear(channels, 512), "act": nn.ReLU()}
    model = sequence(features=sequence(**features, **head), classifier=nn.Linear(512, classes))
    return drawn_by_fan_out(model)
