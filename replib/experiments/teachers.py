"""Teachers that no cell of ours has trained: from a file, from torchvision, from timm.

The `teacher` of a row is the name of a row, the key of a finished cell, or one of

    FILE.safetensors        a network that replib wrote: the file knows its structure
    BODY=FILE               weights of a body of ours; BODY/BLOCK=FILE where it is made of blocks
    ARCH=FILE               a released checkpoint: any architecture of `replib.official`
    torchvision:NAME        a network of torchvision with its published weights
    timm:NAME               one of timm; NAME may have a tag: efficientnet_b4.ra2_in1k
    torchvision:NAME=FILE   the same with the weights of a file, which is only read as data;
    timm:NAME=FILE          nothing is downloaded

as in `cifar_resnet110=teachers/resnet110.th` or `timm:efficientnet_b4`. It is shown the batch of
its student, in eval mode and without gradients, and computes in the precision of the student's
steps; its blocks of ours are merged. Published weights want the mean and deviation that their
library says, also from a file with as many classes; all others those of the data; `teacher_mean`
and `teacher_deviation` say otherwise. The teacher's name and the SHA-256 of its weights are in the
key of the cell.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from replib import official
from replib.blocks import BLOCKS
from replib.checkpoint import load_model
from replib.errors import UserError
from replib.experiments.params import KEY
from replib.experiments.weights import file_digest, fill, located, state_of
from replib.fusing import deployed_copy
from replib.models import BODIES, build

Shape = tuple[int, int, int]  # of an image, (C, H, W)


@dataclass(frozen=True)
class Teacher:
    """A network in eval mode on the CPU.

    mean, deviation: per channel of images in [0, 1], that its inputs are standardised by; None:
    those of the data. flops: of its forward pass on one image.
    """

    name: str
    digest: str
    network: nn.Module
    mean: tuple[float, ...] | None
    deviation: tuple[float, ...] | None
    flops: int

    @property
    def identity(self) -> str:
        """What stands in the key of a cell."""
        return f"{self.name}:{self.digest}"


class Restandardised(nn.Module):
    """A network behind the affine map from inputs (N, C, H, W) standardised by one mean and
    deviation per channel to those standardised by another:

        (x s + m - m') / s'  =  x (s / s') + (m - m') / s'
    """

    def __init__(
        self,
        network: nn.Module,
        given: tuple[Sequence[float], Sequence[float]],
        wanted: tuple[Sequence[float], Sequence[float]],
    ):
        super().__init__()
        (m, s), (mean, deviation) = (
            torch.tensor(pair, dtype=torch.float64).view(2, 1, -1, 1, 1) for pair in (given, wanted)
        )
        self.network = network
        self.register_buffer("scale", (s / deviation).float())
        self.register_buffer("shift", ((m - mean) / deviation).float())

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x * self.scale + self.shift)


def opened(text: str, *, classes: int, shapes: Sequence[Shape]) -> Teacher:
    """The teacher that a row names, for so many classes and images of these shapes.

    Raises: UserError, in one line, for a name that is not known, a library that is missing, weights
    that are absent, damaged or do not fit, another number of classes, images it cannot take.
    """
    try:
        found = Path(located(text.partition("=")[2] or text)).stat()
        stamp = found.st_size, found.st_mtime_ns
    except (OSError, ValueError):
        stamp = None  # no file, or no name of one
    return _opened(text, stamp, classes, tuple(dict.fromkeys(shapes)))


def absolute(text: str) -> str:
    """The same teacher with the path, meant from this folder, in full."""
    name, sign, path = text.rpartition("=")
    if KEY.fullmatch(text) or (not sign and text.partition(":")[0] in LIBRARIES):
        return text
    return f"{name}{sign}{Path(path).expanduser().absolute()}"


@lru_cache(maxsize=2)
def _opened(text: str, stamp: tuple | None, classes: int, shapes: tuple[Shape, ...]) -> Teacher:
    """The same, once for a file as it is now: all seeds and rows of a table ask for it."""
    name, _, path = text.partition("=")
    library, colon, _ = name.partition(":")
    if colon and library not in LIBRARIES:
        raise refused(text, f"{library!r} must be one of {', '.join(LIBRARIES)}")
    if not colon and not path:
        name, path = "file", text
    digest = file_digest(path, "teacher", text) if path else None
    channels, mean, deviation = shapes[0][0], None, None
    try:
        if colon:
            find = LIBRARIES[library]
            network, mean, deviation = find(name.partition(":")[2], path, classes, channels)
        else:
            network = ours(name, path, classes, channels)
    except UserError:
        raise
    except Exception as error:  # whatever a foreign file or library provokes
        raise refused(text, in_one_line(error)) from None
    network = network.float().eval()
    digest = digest or digest_of(network)
    network = deployed_copy(network).requires_grad_(False)
    flops = probed(text, network, classes, shapes)
    return Teacher(name, digest, network, mean, deviation, flops)


def refused(text: str, reason: str) -> UserError:
    return UserError(f"teacher (={text!r}): {reason.removesuffix('.')}.")


def in_one_line(error: Exception) -> str:
    """What an error says; its class where it says nothing."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def digest_of(network: nn.Module) -> str:
    """SHA-256 of the names, types, shapes and values of all tensors."""
    value = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        value.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        value.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return value.hexdigest()


@torch.no_grad()
def probed(text: str, network: nn.Module, classes: int, shapes: tuple[Shape, ...]) -> int:
    """FLOPs on one image of the first shape, of a network that takes all of them."""
    flops = []
    for shape in shapes:
        try:
            with FlopCounterMode(display=False) as counter:
                out = network(torch.zeros(1, *shape))
        except Exception as error:
            reason = f"it cannot take images of (C, H, W) = {shape}: {in_one_line(error)}"
            raise refused(text, reason) from None
        if not isinstance(out, Tensor) or out.dim() != 2:
            raise refused(text, "it does not return logits (N, classes)")
        if out.shape[1] != classes:
            raise refused(text, f"it has {out.shape[1]} classes, the data have {classes}")
        flops.append(counter.get_total_flops())
    return flops[0]


# -- ours ------------------------------------------------------------------------------------------
def ours(name: str, path: str, classes: int, channels: int) -> nn.Module:
    """A network of this project: a body and its weights, a released one, or one with structure."""
    file = located(path)
    if name == "file":
        if not file.endswith(".safetensors"):
            raise ValueError(
                "this file does not say what network it is of: put BODY= or BODY/BLOCK= before "
                f"it, such as cifar_resnet110={path}"
            )
        return load_model(file)
    if name in official.ARCHITECTURES:
        return official.load_model(file, name)
    body, _, block = name.partition("/")
    for value, kind, known in ((body, "body", BODIES), (block or "repvgg", "block", BLOCKS)):
        if value not in known:
            near = get_close_matches(value, [*known, *official.ARCHITECTURES], n=3)
            raise ValueError(
                f"no {kind} {value!r}" + (f", perhaps {' or '.join(near)} is meant" if near else "")
            )
    model = build(body, block or "repvgg", classes=classes, in_channels=channels)
    fill(model, state_of(file, body, model), classes)
    return model


# -- libraries -------------------------------------------------------------------------------------
Found = tuple[nn.Module, tuple[float, ...] | None, tuple[float, ...] | None]


def known_name(name: str, names: list[str]) -> None:
    """Raises: ValueError for a name that a library does not have, with those that are near."""
    if name not in names:
        near = get_close_matches(name, names, n=3)
        raise ValueError("no such network" + (f"; near are {', '.join(near)}" if near else ""))


def from_torchvision(name: str, path: str, classes: int, channels: int) -> Found:
    """A network of torchvision's classifiers."""
    from torchvision import models  # slow to import

    known_name(name, models.list_models(module=models))
    weights = models.get_model_weights(name).DEFAULT
    given = weights.transforms()
    return found(
        path,
        classes,
        published=len(weights.meta["categories"]),
        statistics=(given.mean, given.std),
        pretrained=lambda: models.get_model(name, weights=weights),
        empty=lambda: models.get_model(name, weights=None, num_classes=classes),
    )


def from_timm(name: str, path: str, classes: int, channels: int) -> Found:
    """A network of timm."""
    try:
        import timm  # not a part of every installation
    except ImportError:
        raise ValueError("timm is not installed: pip install timm") from None
    known_name(name.partition(".")[0], timm.list_models())
    config = timm.get_pretrained_cfg(name) or timm.models.PretrainedCfg()
    if not path and not config.has_weights:
        raise ValueError("timm has no weights for it: give a file, timm:NAME=FILE")
    return found(
        path,
        classes,
        published=config.num_classes,
        statistics=(config.mean, config.std),
        pretrained=lambda: timm.create_model(name, pretrained=True),
        empty=lambda: timm.create_model(name, num_classes=classes, in_chans=channels),
    )


def found(
    path: str,
    classes: int,
    *,
    published: int,
    statistics: tuple[Sequence[float], Sequence[float]],
    pretrained: Callable[[], nn.Module],
    empty: Callable[[], nn.Module],
) -> Found:
    """A library's network with its published weights, or, given a path, with those of the file;
    the mean and deviation it was trained with, where it has the published number of classes."""
    if not path and published != classes:
        raise ValueError(f"it has {published} classes, the data have {classes}")
    if path:
        network = empty()
        fill(network, foreign_state(path), classes)
    else:
        network = downloaded(pretrained)
    mean, deviation = map(tuple, statistics)
    return (network, mean, deviation) if published == classes else (network, None, None)


LIBRARIES = {"torchvision": from_torchvision, "timm": from_timm}


def downloaded(make: Callable[[], nn.Module]) -> nn.Module:
    """A network whose weights its library keeps, or downloads."""
    try:
        return make()
    except Exception as error:  # of a dozen classes, by library and by what failed
        raise ValueError(
            f"its weights are not here and could not be downloaded ({in_one_line(error)}): give "
            "a file, NAME=FILE"
        ) from None


def foreign_state(path: str) -> dict[str, Tensor]:
    """The tensors of a file of weights, read as data."""
    file = located(path)
    if file.endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(file)
    return official.read_state(file)
