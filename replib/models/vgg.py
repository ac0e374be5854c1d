"""VGG-16 for 32x32 images, and AlexNet, both with a norm behind every convolution.

Sources: Simonyan and Zisserman, "Very Deep Convolutional Networks", ICLR 2015, table 1 D, with the
head of Huang et al., "DyRep", CVPR 2022 (released code); Krizhevsky et al., "ImageNet
Classification with Deep Convolutional Neural Networks", 2012, section 3.5, in the widths of
torchvision.
"""

from __future__ import annotations

from torch import nn

from replib.models.layers import Block, drawn_by_fan_out, layer, sequence

VGG16 = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # width, depth
ALEXNET = ((64, 11, 4, 2), (192, 5, 1, 2), (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1))


def cifar_vgg16(
    *, classes: int, block: Block | None = "convbn", in_channels: int = 3, width: float = 1.0
) -> nn.Module:
    """(N, in_channels, 32, 32) -> (N, classes). block None: plain layers, to grow blocks in.

    Smaller images work too: a map of one pixel is pooled to itself.
    """
    features: dict[str, nn.Module] = {}
    channels, index = in_channels, 0
    for i, (base, depth) in enumerate(VGG16):
        for _ in range(depth):
            wide = int(base * width)
            features[f"conv{index}"] = layer(block, channels, wide, 3)
            channels, index = wide, index + 1
        features[f"pool{i}"] = nn.MaxPool2d(2, ceil_mode=True)
    hidden = int(512 * width)
    head = {"flatten": nn.Flatten(), "fc": nn.Linear(channels, hidden), "act": nn.ReLU()}
    model = sequence(features=sequence(**features, **head), classifier=nn.Linear(hidden, classes))
    return drawn_by_fan_out(model)


def alexnet(
    largest: int,
    *,
    classes: int,
    block: Block = "convbn",
    in_channels: int = 3,
    width: float = 1.0,
) -> nn.Module:
    """(N, in_channels, 224, 224) -> (N, classes).

    largest: kernel that becomes a block: all of them, up to 11, in ACNet; up to 5 in DBB. Other
    sides from 63 pixels on work too: the last map is stretched to its 6x6.
    """
    stem: dict[str, nn.Module] = {}
    channels = in_channels
    for i, (base, kernel, stride, padding) in enumerate(ALEXNET):
        here = block if kernel <= largest else "convbn"
        wide = int(base * width)
        stem[f"conv{i}"] = layer(here, channels, wide, kernel, stride, padding=padding)
        channels = wide
        if i in (0, 1, 4):
            stem[f"pool{i}"] = nn.MaxPool2d(3, 2)
    hidden = int(4096 * width)
    return sequence(
        stem=sequence(**stem),
        fit=nn.Upsample(6),
        flatten=nn.Flatten(),
        drop1=nn.Dropout(0.5),
        fc1=nn.Linear(36 * channels, hidden),
        act1=nn.ReLU(),
        drop2=nn.Dropout(0.5),
        fc2=nn.Linear(hidden, hidden),
        act2=nn.ReLU(),
        linear=nn.Linear(hidden, classes),
    )
