"""What is measured: networks by name, and the forms in which the same network can be run."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from replib import official
from replib.blocks import BLOCKS
from replib.convert import convert
from replib.models import build
from replib.networks import branch_by_branch, outermost_blocks

CLASSES = 10
FORMATS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}


class LeftOut(Exception):
    """Something is not on this machine; not a failure."""


# -- networks -------------------------------------------------------------------------------------
def body(name: str, block: str, in_channels: int = 3) -> nn.Module:
    """A body of the library, its parameters no longer special."""
    return scrambled(lambda: build(name, block, classes=CLASSES, in_channels=in_channels))


def torchvision_resnet18(block: str | None = None) -> nn.Module:
    """torchvision's ResNet-18, plain or with its 3x3 convolutions as blocks.

    A family of 1x1 blocks takes the shortcuts' convolutions, one of stems the first as well.
    """
    from torchvision.models import resnet18  # slow to import

    size = BLOCKS[block].default_kernel_size if block else 0

    def wanted(name: str, conv: nn.Module) -> bool:
        kernel = max(conv.kernel_size)
        return kernel == 1 if size == 1 else kernel == 3 or (kernel > 3 and size == 7)

    def make() -> nn.Module:
        plain = resnet18(num_classes=CLASSES)
        return convert(plain, block, where=wanted, init="paper") if block else plain

    return scrambled(make)


def stack(block: str, channels: int, depth: int, **options) -> nn.Module:
    """Blocks of one width, a ReLU behind each, a linear classifier."""

    def make() -> nn.Module:
        layers = []
        for _ in range(depth):
            layers += [BLOCKS[block](channels, channels, 3, **options), nn.ReLU()]
        head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES)
        return nn.Sequential(*layers, *head)

    return scrambled(make)


def scrambled(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A network whose scales and shifts are not those of a fresh norm, which would hide faults."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.mul_(torch.empty_like(parameter).uniform_(0.7, 1.3))
                    parameter.add_(torch.empty_like(parameter).uniform_(-0.1, 0.1))
    return model.train()


def fits_small_images(block: str) -> bool:
    """Whether a family can be every 3x3 block of a plain body."""
    try:
        BLOCKS[block](3, 4, 3, stride=2)
    except ValueError:
        return False
    return True


# -- forms of one network -------------------------------------------------------------------------
def unsqueezed(model: nn.Module) -> nn.Module:
    """OREPA's branches each on the images, as if it had no online form. In place."""
    for block in outermost_blocks(branch_by_branch(model)).values():
        for module in block.modules():
            if getattr(module, "squeezed", False):
                module.squeezed = False
    return model


def timm_repvgg(model: nn.Module, name: str) -> nn.Module:
    """timm's network of that name with our weights."""
    theirs = timm_model(name)
    theirs.load_state_dict(official.export(model, f"dyrep_{name}")["model"])
    return theirs


def timm_mobileone(model: nn.Module, name: str) -> nn.Module:
    """The same for MobileOne; timm numbers the k x k branches of a block, as we do."""
    theirs = timm_model(name)
    ours = list(outermost_blocks(model).values())
    others = [m for m in theirs.modules() if type(m).__name__ == "MobileOneBlock"]
    with torch.no_grad():
        for block, other in zip(ours, others, strict=True):
            units = {f"conv{i}": unit for i, unit in enumerate(other.conv_kxk)}
            units |= {"scale": other.conv_scale, "skip": other.identity}
            for branch, piece in block.branches.items():
                copied(piece, units[branch])
        theirs.head.fc.load_state_dict(model.linear.state_dict())
    return theirs


def copied(ours: nn.Module, theirs: nn.Module) -> None:
    """Tensors of one module into another that has the same shapes in the same order."""
    for target, source in zip(
        theirs.state_dict().values(), ours.state_dict().values(), strict=True
    ):
        target.copy_(source)


def timm_model(name: str) -> nn.Module:
    if importlib.util.find_spec("timm") is None:
        raise LeftOut("timm is not installed (it is in the extra `dev`)")
    import timm

    return timm.create_model(name, num_classes=CLASSES).train()


BRANCHES, SHARED = "branch by branch", "shared"
FORMS: dict[str, Callable[[nn.Module], nn.Module]] = {  # each changes a copy, or makes another
    BRANCHES: branch_by_branch,
    SHARED: lambda model: model,
    "plain": lambda model: model,  # a network without blocks
    "unsqueezed": unsqueezed,
    "timm repvgg_a0": partial(timm_repvgg, name="repvgg_a0"),
    "timm mobileone_s0": partial(timm_mobileone, name="mobileone_s0"),
}


@dataclass(frozen=True)
class Way:
    """One way to run a training step.

    network: ways of one network must agree, and are compared as the same; others as different.
    mode: of `replib.training.step.MODES`.
    """

    network: str
    form: str = SHARED
    layout: str = "channels last"
    mode: str = "none"
    precision: str = "float32"

    @property
    def name(self) -> str:
        modes = {"none": "", "default": "compiled", "cudagraphs": "compiled, CUDA graph"}
        lower = "" if self.precision == "float32" else self.precision
        parts = (self.network, "" if self.form == "plain" else self.form, self.layout)
        return ", ".join(filter(None, (*parts, modes[self.mode], lower)))

    def model(self, reference: nn.Module, device: str) -> nn.Module:
        """A network in this form with the weights of the reference."""
        made = FORMS[self.form](copy.deepcopy(reference))
        return made.to(device, memory_format=FORMATS[self.layout])
