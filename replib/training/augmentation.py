"""All augmentation of the training recipes, per sample, on the device.

Everything random is drawn on the CPU, once per epoch, from a generator; what is drawn is moved to
the device and used there, so a seed gives the same augmentation on every device and for every
batch size. The order is that of the recipes: crop, mirror image, policy, colour jitter, lighting
(uint8); after normalisation erasing, Cutout, then mixup or CutMix and smoothed targets.

Where the numbers come from is said at each field. Pixels are Pillow's (see `pixels`), policies are
in `policies`. The official recipes as fields:

    CIFAR                  crop_padding=4, flip=True                       (DyRep: cutout=16)
    ImageNet               resized_crop=224, flip=True
    DBB's ResNets          ... brightness=0.4, saturation=0.4, hue=0.4, lighting=0.1
    DyRep's ResNets        ... brightness=0.06, contrast=0.06, saturation=0.06
    RepAn                  ... crop_interpolation="bicubic", policy="v0",
                           policy_interpolation="bicubic", fill=(0, 0, 0)
    RepVGGplus, RepMLP     ... policy="raug15", policy_interpolation="random",
                           fill=(128, 128, 128); mixup=0.2, or mixup=0.4 and cutmix=1.0
    RepLKNet               ... policy="rand-m9-mstd0.5-inc1", both interpolations "bicubic",
                           fill=(124, 116, 104), erasing=0.25, mixup=0.8, cutmix=1.0

RepAn's code means to fill with the mean colour, but rounds a mean in [0, 1]: its fill is black.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from replib.errors import UserError
from replib.training.pixels import (
    CODES,
    adjusted,
    cropped,
    inside,
    noise,
    on_rows,
    resized,
    square,
)
from replib.training.policies import policy

JITTER = {
    "brightness": "Brightness", "contrast": "Contrast", "saturation": "Color", "hue": "Hue",
}  # fmt: skip
ATTEMPTS = 10  # of a box to fit into the image, as in torchvision and timm
ERASED_AREA, ERASED_RATIO = (0.02, 1 / 3), (0.3, 1 / 0.3)
# AlexNet's principal components of ImageNet's colours (Krizhevsky et al., 2012), in [0, 1], with
# the numbers that the ImageNet codes of torch and PyTorch have handed on.
EIGENVALUES = (0.2175, 0.0188, 0.0045)
EIGENVECTORS = (
    (-0.5675, 0.7192, 0.4009),
    (-0.5808, -0.0045, -0.8140),
    (-0.5836, -0.6948, 0.4203),
)


@dataclass(frozen=True)
class Augmentation:
    """What is done to a training image; without arguments, nothing."""

    crop_padding: int = 0
    """Random crop of the image's size after so many black pixels on every side."""
    flip: bool = False
    """Mirror image with probability 1/2."""
    resized_crop: int = 0
    """Side, in pixels, of the random resized crop (Szegedy et al., 2015); 0: none."""
    crop_area: tuple[float, float] = (0.08, 1.0)
    """Part of the image's area that the crop takes, uniform."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width by height of the crop, log-uniform."""
    crop_interpolation: str = "bilinear"
    """"bilinear" or "bicubic"; smoothed where it shrinks."""
    policy: str = ""
    """Of `replib.training.policies`; "": none."""
    policy_interpolation: str = "nearest"
    """"nearest" (torchvision's default), "bilinear", "bicubic", or "random": one of the last two
    for every operation, as raug15 and timm's default."""
    fill: tuple[int, ...] = (0,)
    """Colour of what a policy's geometry moves in, 1 level or one per channel."""
    brightness: float = 0.0
    """Colour jitter, in random order: factors are uniform within 1 +- this, at least 0."""
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    """Turns: up to 0.5."""
    lighting: float = 0.0
    """Standard deviation of AlexNet's lighting noise along the colours' principal components.
    Rounded to whole grey levels and cut at 0 and 255; DBB's code adds it to floats, uncut."""
    erasing: float = 0.0
    """Probability that a random box becomes normal noise (Zhong et al., 2020), as timm's mode
    "pixel" with one box."""
    cutout: int = 0
    """Side of a square, cut at the border, that becomes 0 after normalisation, the mean colour
    (DeVries and Taylor, 2017); an odd side counts as the even one below, as in the usual code."""
    mixup: float = 0.0
    """alpha of Beta(alpha, alpha) (Zhang et al., 2018); the partner is the batch in reverse."""
    cutmix: float = 0.0
    """alpha of CutMix (Yun et al., 2019); with mixup too, each of them every other time."""
    mix_each: bool = False
    """Mix every sample with its own weight; else one weight per batch, as timm's default."""
    label_smoothing: float = 0.0
    """Part of the target spread over all classes."""

    def __post_init__(self) -> None:
        for name in ("crop_padding", "resized_crop", "cutout"):
            check(name, getattr(self, name), 0, math.inf, "a whole number")
        for name in ("brightness", "contrast", "saturation", "lighting", "mixup", "cutmix"):
            check(name, getattr(self, name), 0, math.inf, "a finite number")
        check("hue", self.hue, 0, 0.5, "turns")
        check("erasing", self.erasing, 0, 1, "a probability")
        check("label_smoothing", self.label_smoothing, 0, 1, "a part of the target")
        for name, most in (("crop_area", 1.0), ("crop_ratio", math.inf)):
            low, high = pair(name, getattr(self, name))
            if not 0 < low <= high <= most or math.isinf(high):
                raise UserError(
                    f"{name} (={getattr(self, name)}) must be (least, most), above 0"
                    + (" and at most 1." if most == 1 else ".")
                )
        one_of("crop_interpolation", self.crop_interpolation, ("bilinear", "bicubic"))
        ways = ("nearest", "bilinear", "bicubic", "random")
        one_of("policy_interpolation", self.policy_interpolation, ways)
        if len(self.fill) not in (1, 3) or not all(0 <= level <= 255 for level in self.fill):
            raise UserError(f"fill (={self.fill}) must be 1 or 3 levels from 0 to 255.")
        if self.crop_padding and self.resized_crop:
            raise UserError(
                f"crop_padding (={self.crop_padding}) and resized_crop (={self.resized_crop}) "
                "exclude each other: set one of them to 0."
            )
        # Found once, not in `apply`, which torch.compile may trace; not a field.
        object.__setattr__(self, "_policy", policy(self.policy) if self.policy else None)

    @property
    def jitter(self) -> list[str]:
        """The fields of the colour jitter that are not 0."""
        return [name for name in JITTER if getattr(self, name)]

    def draw(
        self,
        n: int,
        generator: torch.Generator,
        size: int | tuple[int, int] | Tensor,
        in_channels: int = 3,
    ) -> dict[str, Tensor]:
        """Everything random for n samples, in order of use: tensors (n, ...) on the CPU.

        size: of the images before augmentation, one side, (height, width), or a tensor (n, 2) of
        these, which `box` needs to be exact where images of a folder differ in shape.
        `box`, with resized_crop: (n, 4), top, left, height, width as fractions of the image. Who
        crops while loading takes it out of the result; `apply` crops where it finds it.

        Raises: UserError where the channels do not fit; where sizes differ without resized_crop.
        """
        if in_channels not in (1, 3) and (self.policy or self.jitter):
            raise UserError(f"policy and colour jitter need 1 or 3 channels, not {in_channels}.")
        if in_channels != 3 and self.lighting:
            raise UserError(
                f"lighting (={self.lighting}) needs 3 channels, not {in_channels}: set it to 0."
            )
        if len(self.fill) > 1 and self.policy and in_channels != len(self.fill):
            raise UserError(
                f"fill (={self.fill}) has {len(self.fill)} levels for images with {in_channels} "
                "channels: give one level."
            )
        sizes = torch.as_tensor(size)
        if sizes.ndim == 2 and not self.resized_crop:
            raise UserError("sizes differ: images become a batch only with resized_crop.")
        sizes = sizes.expand(n, 2).double()
        drawn: dict[str, Tensor] = {}
        if self.resized_crop:
            height = width = self.resized_crop
            drawn["box"] = self.draw_crop(n, generator, sizes)
        else:
            height, width = (int(side) for side in sizes[0]) if n else (1, 1)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(n, *shape, generator=generator, dtype=torch.float64)

        def places() -> Tensor:
            """Row and column of a pixel (n, 2)."""
            return (uniform(2) * torch.tensor([height, width])).long()

        if self.crop_padding:
            limit = 2 * self.crop_padding + 1
            drawn["corner"] = torch.randint(limit, (n, 2), generator=generator)
        if self.flip:
            drawn["flip"] = uniform() < 0.5
        if self.policy:
            kind, value = self._policy.draw(n, generator, (height, width))
            drawn["policy_kind"], drawn["policy_value"] = kind, value
            steps = self._policy.steps
            if self.policy_interpolation == "random":
                drawn["policy_cubic"] = uniform(steps) < 0.5
            if self.policy == "raug15":
                drawn["policy_centre"] = torch.stack([places() for _ in range(steps)], dim=1)
        if self.jitter:
            order = uniform(len(self.jitter)).argsort(dim=1)
            codes = torch.tensor([CODES[JITTER[name]] for name in self.jitter])
            middle = torch.tensor([0.0 if name == "hue" else 1.0 for name in self.jitter])
            reach = torch.tensor([getattr(self, name) for name in self.jitter]).double()
            least = torch.where(middle == 1, (1 - reach).clamp(min=0), -reach)
            factor = least + uniform(len(self.jitter)) * (middle + reach - least)
            drawn["jitter_kind"], drawn["jitter_value"] = codes[order], factor.gather(1, order)
        if self.lighting:
            alpha = self.lighting * torch.randn(n, 3, generator=generator, dtype=torch.float64)
            along = torch.tensor(EIGENVECTORS).double() * torch.tensor(EIGENVALUES).double()
            drawn["light"] = (255 * alpha @ along.T).round().to(torch.int16)
        if self.erasing:
            erased = uniform() < self.erasing
            image = torch.tensor([height, width]).double().expand(n, 2)
            box, fits = random_box(generator, image, ERASED_AREA, ERASED_RATIO, below=True)
            top, left, rows, columns = (box * (erased & fits)[:, None]).long().unbind(1)
            drawn["erase"] = torch.stack([top, top + rows, left, left + columns], dim=1)
            drawn["noise"] = torch.randint(1 << 31, (n,), generator=generator)
        if self.cutout:
            drawn["cutout"] = square(places(), self.cutout)
        if self.mixup or self.cutmix:
            drawn["share"], drawn["patch"] = self.draw_mix(n, generator, height, width)
        return drawn

    def draw_crop(self, n: int, generator: torch.Generator, sizes: Tensor) -> Tensor:
        """(n, 4) float32; a box that never fits becomes the largest central one that does."""
        box, fits = random_box(generator, sizes, self.crop_area, self.crop_ratio, below=False)
        height, width = sizes.unbind(1)
        narrow, wide = self.crop_ratio
        rows = torch.where(width / height < narrow, (width / narrow).round(), height)
        columns = torch.where(width / height > wide, (height * wide).round(), width)
        top, left = ((height - rows) / 2).floor(), ((width - columns) / 2).floor()
        central = torch.stack([top, left, rows, columns], dim=1)
        return (torch.where(fits[:, None], box, central) / sizes.repeat(1, 2)).float()

    def draw_mix(
        self, n: int, generator: torch.Generator, height: int, width: int
    ) -> tuple[Tensor, Tensor]:
        """A sample's own share (n,) float32, and the box (n, 4) int64 that CutMix replaces.

        mixup has an empty box. The share of CutMix is that of the pixels that remain.
        """
        seed = torch.randint(1 << 62, (1,), generator=generator).item()
        beta = np.random.default_rng(seed).beta  # torch's Beta takes no generator
        cut = torch.full((n,), bool(self.cutmix))
        share = torch.zeros(n, dtype=torch.float64)
        if self.mixup:
            share = torch.from_numpy(beta(self.mixup, self.mixup, n))
        if self.cutmix:
            if self.mixup:
                cut = torch.rand(n, generator=generator) < 0.5
            share = torch.where(cut, torch.from_numpy(beta(self.cutmix, self.cutmix, n)), share)
        size = torch.tensor([height, width])
        side = (size * (1 - share).sqrt()[:, None]).long() * cut[:, None]
        centre = (torch.rand(n, 2, generator=generator, dtype=torch.float64) * size).long()
        low = (centre - side // 2).clamp(min=0)
        high = torch.minimum(centre + (side + 1) // 2, size)
        left = 1 - (high - low).prod(1) / (height * width)
        share = torch.where(cut, left, share).float()
        return share, torch.stack([low[:, 0], high[:, 0], low[:, 1], high[:, 1]], dim=1)

    def apply(self, images: Tensor, drawn: dict[str, Tensor]) -> Tensor:
        """uint8 (N, C, H, W) and its rows of what was drawn -> uint8 (N, C, H', W')."""
        if "box" in drawn:
            images = resized(images, drawn["box"], self.resized_crop, self.crop_interpolation)
        if self.crop_padding or self.flip:
            images = cropped(images, self.crop_padding, drawn.get("corner"), drawn.get("flip"))
        if self.policy:
            for step in range(self._policy.steps):
                row = {
                    name: drawn[f"policy_{name}"][:, step]
                    for name in ("kind", "value", "cubic", "centre")
                    if f"policy_{name}" in drawn
                }
                images = adjusted(
                    images,
                    names=self._policy.operations(step),
                    interpolation=self.policy_interpolation,
                    fill=self.fill,
                    **row,
                )
        names = [JITTER[name] for name in self.jitter]
        for step in range(len(names)):
            kind, value = drawn["jitter_kind"][:, step], drawn["jitter_value"][:, step]
            images = adjusted(images, kind, value, names)
        if self.lighting:
            light = drawn["light"][:, :, None, None]
            images = (images.to(torch.int16) + light).clamp(0, 255).to(torch.uint8)
        return images

    def mixed(
        self, x: Tensor, labels: Tensor, classes: int, drawn: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """What happens after normalisation: erasing, Cutout, mixup or CutMix, targets.

        x (N, C, H, W), of any floating dtype; labels (N,) int64. Targets are float32 (N, classes),
        or the labels themselves where nothing mixes or smooths them.
        """
        height, width = x.shape[2:]
        if self.erasing:

            def erase(x: Tensor, box: Tensor, seed: Tensor) -> Tensor:
                random = noise(seed, tuple(x.shape[1:])).to(x.dtype)
                return torch.where(inside(box, height, width), random, x)

            box = drawn["erase"]
            x = on_rows(box[:, 1] > box[:, 0], erase, x, box, drawn["noise"])
        if self.cutout:
            x = x.masked_fill(inside(drawn["cutout"], height, width), 0)
        mixes = bool(self.mixup or self.cutmix)
        if not mixes and not self.label_smoothing:
            return x, labels
        off = self.label_smoothing / classes
        targets = torch.full((len(labels), classes), off, device=x.device)
        targets.scatter_(1, labels[:, None], 1 - self.label_smoothing + off)
        if mixes:
            share, patch = drawn["share"], drawn["patch"]
            if not self.mix_each:
                share, patch = share[:1], patch[:1]
            cut = (patch[:, 1] > patch[:, 0])[:, None, None, None]
            weight = torch.where(cut, 1.0, share[:, None, None, None])
            weight = torch.where(inside(patch, height, width), 0.0, weight).to(x.dtype)
            x = x * weight + x.flip(0) * (1 - weight)
            share = share[:, None]
            targets = targets * share + targets.flip(0) * (1 - share)
        return x, targets


def random_box(
    generator: torch.Generator,
    sizes: Tensor,
    area: tuple[float, float],
    ratio: tuple[float, float],
    *,
    below: bool,
) -> tuple[Tensor, Tensor]:
    """A box of random area and shape at a random place in images of `sizes` (n, 2), float64.

    The first of `ATTEMPTS` that fits, (n, 4) top, left, height, width in pixels, and whether there
    was one. below: it must be smaller than the image on both sides. timm draws height by width,
    torchvision width by height; log-uniform between r and 1/r these are the same.
    """
    n = len(sizes)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator, dtype=torch.float64)

    height, width = sizes[:, :1], sizes[:, 1:]
    pixels = uniform(*area, ATTEMPTS) * (height * width)
    shape = uniform(math.log(ratio[0]), math.log(ratio[1]), ATTEMPTS).exp()
    rows, columns = (pixels / shape).sqrt().round(), (pixels * shape).sqrt().round()
    fits = (rows > 0) & (columns > 0) & (rows <= height) & (columns <= width)
    if below:
        fits &= (rows < height) & (columns < width)
    first = fits.double().argmax(1, keepdim=True)
    rows, columns = rows.gather(1, first), columns.gather(1, first)
    top = (uniform(0, 1, 1) * (height - rows + 1)).floor()
    left = (uniform(0, 1, 1) * (width - columns + 1)).floor()
    return torch.cat([top, left, rows, columns], dim=1), fits.any(1)


def check(name: str, value: float, least: float, most: float, what: str) -> None:
    """A number within limits, or a UserError."""
    whole = what == "a whole number"
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        raise UserError(f"{name} (={value!r}) must be {what}.")
    if not least <= value <= most or math.isinf(value):
        limits = f"at least {least:g}" if math.isinf(most) else f"from {least:g} to {most:g}"
        raise UserError(f"{name} (={value!r}) must be {what}, {limits}.")


def pair(name: str, value: tuple[float, float]) -> tuple[float, float]:
    """Two numbers, or a UserError."""
    if len(value) != 2:
        raise UserError(f"{name} (={value}) must be two numbers, (least, most).")
    return value


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """One of a few words, or a UserError."""
    if value not in allowed:
        raise UserError(f"{name} (={value!r}) must be one of {', '.join(allowed)}.")
