"""CIFAR ResNets: the teachers of RepAn's distillation, and bodies of the other papers.

Sources: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2
(6 n + 2 layers, parameter-free shortcuts); torchvision for the bottleneck networks.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import resnet101


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and an option-A shortcut: subsampled, zero channels on both sides."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride, self.added_channels = stride, out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.added_channels or self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
            before = self.added_channels // 2
            x = F.pad(x, (0, 0, 0, 0, before, self.added_channels - before))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """6 n + 2 layers, widths 16, 32, 64: (N, in_channels, 32, 32) -> (N, classes)."""

    def __init__(self, n: int, *, classes: int, in_channels: int = 3):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        channels = 16
        for stage, width in enumerate((16, 32, 64), start=1):
            blocks = nn.Sequential()
            for i in range(n):
                stride = 2 if stage > 1 and i == 0 else 1
                blocks.append(BasicBlock(channels, width, stride))
                channels = width
            setattr(self, f"layer{stage}", blocks)
        self.linear = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def cifar_resnet101(*, classes: int, in_channels: int = 3) -> nn.Module:
    """torchvision's ResNet-101 with a 3x3 stem and no max-pool, for 32x32 images."""
    model = resnet101(num_classes=classes)
    model.conv1 = nn.Conv2d(in_channels, 64, 3, 1, 1, bias=False)
    model.maxpool = nn.Identity()
    return model
