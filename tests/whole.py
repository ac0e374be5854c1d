"""What the tests of whole networks share: an input that is not square, and scrambled norms."""

import torch
from torch import nn

X = torch.randn(2, 3, 33, 40, generator=torch.Generator().manual_seed(0))
RANGES = dict(weight=(0.5, 1.5), bias=(-0.3, 0.3), running_mean=(-0.3, 0.3), running_var=(0.5, 2))


def scrambled(model):
    """Eval mode, with norms that are no identities."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if getattr(module, "running_var", None) is not None:
            for name, (low, high) in RANGES.items():
                tensor = getattr(module, name).data
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)
    return model.eval()


def net(*layers):
    return scrambled(nn.Sequential(*layers))


def error(a, b):
    return ((a - b).abs().max() / a.abs().max()).item()
