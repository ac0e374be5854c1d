"""Learned and random policies of colour and geometry, drawn for many samples at once.

A policy has steps; a step is an operation, how likely it is applied, and a level, which a scale
turns into what the operation takes (a factor, degrees, pixels, ...).

    imagenet, cifar10, svhn   AutoAugment (Cubuk et al., CVPR 2019) as torchvision has it: 25 pairs
    v0                        the 25 pairs of Google's EfficientNet code for TPUs, as timm has it;
                              RepAn's ImageNet runs. Its Posterize keeps 0 to 4 bits.
    randaugment, randaugment-n2-m9    RandAugment (Cubuk et al., 2020) as torchvision has it:
                              n of 14 operations, all at level m of 30
    raug15                    of the RepVGG code, used by RepOptimizer and RepMLP too: 2 of 16
                              operations, each at its own whole level from 0 to 14. The scale is
                              made for 0 to 10 and is not cut there: rotations reach 42 degrees,
                              colour factors 2.62, and from 11 on Solarize changes nothing.
    rand-m9-mstd0.5[-inc1]    timm's RandAugment: n (2) of 15 operations, each applied with
                              probability p (0.5), level normal around m with deviation mstd, cut
                              to 0..10; inc1: every operation grows with the level

timm's string takes m, n, p, mstd, inc. DyRep's code has a string of the same name, but its own
list: four more operations (distort, zoom, blur, skew), levels that are not cut, and rotations that
are always bicubic. Here the name means timm's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from replib.errors import UserError
from replib.training.pixels import CODES

AUTO_AUGMENT = ("imagenet", "cifar10", "svhn")
SIGNED = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")
V0 = (  # (operation, probability, level) twice
    ("Equalize", 0.8, 1, "ShearY", 0.8, 4),
    ("Color", 0.4, 9, "Equalize", 0.6, 3),
    ("Color", 0.4, 1, "Rotate", 0.6, 8),
    ("Solarize", 0.8, 3, "Equalize", 0.4, 7),
    ("Solarize", 0.4, 2, "Solarize", 0.6, 2),
    ("Color", 0.2, 0, "Equalize", 0.8, 8),
    ("Equalize", 0.4, 8, "SolarizeAdd", 0.8, 3),
    ("ShearX", 0.2, 9, "Rotate", 0.6, 8),
    ("Color", 0.6, 1, "Equalize", 1.0, 2),
    ("Invert", 0.4, 9, "Rotate", 0.6, 0),
    ("Equalize", 1.0, 9, "ShearY", 0.6, 3),
    ("Color", 0.4, 7, "Equalize", 0.6, 0),
    ("Posterize", 0.4, 6, "AutoContrast", 0.4, 7),
    ("Solarize", 0.6, 8, "Color", 0.6, 9),
    ("Solarize", 0.2, 4, "Rotate", 0.8, 9),
    ("Rotate", 1.0, 7, "TranslateY", 0.8, 9),
    ("ShearX", 0.0, 0, "Solarize", 0.8, 4),
    ("ShearY", 0.8, 0, "Color", 0.6, 4),
    ("Color", 1.0, 0, "Rotate", 0.6, 2),
    ("Equalize", 0.8, 4, "Equalize", 0.0, 8),
    ("Equalize", 1.0, 4, "AutoContrast", 0.6, 2),
    ("ShearY", 0.4, 7, "SolarizeAdd", 0.6, 7),
    ("Posterize", 0.8, 2, "Solarize", 0.6, 10),
    ("Solarize", 0.6, 8, "Equalize", 0.6, 1),
    ("Color", 0.8, 6, "Rotate", 0.4, 5),
)
TIMM = (
    "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd",
    "Color", "Contrast", "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY",
)  # fmt: skip
TORCHVISION = (
    "Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color",
    "Contrast", "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize",
)  # fmt: skip


@dataclass(frozen=True)
class Policy:
    """What can be drawn, and how.

    pairs: rows of one sub-policy each, steps of (operation, probability, level); one is chosen.
    Without pairs every step chooses one of `names`, applied with `probability`, at a level that is
    normal around `level` with `deviation`, cut to 0 .. `most`; or any of 0 .. `levels` - 1.
    """

    steps: int
    scale: str  # "torchvision", "timm", or "increasing": timm's inc1
    bins: int = 0  # of torchvision's scale
    pairs: tuple[tuple[tuple[str, float, int], ...], ...] = ()
    names: tuple[str, ...] = ()
    probability: float = 1.0
    level: float = 0.0
    deviation: float = 0.0
    most: float = 10.0
    levels: int = 0

    def operations(self, step: int) -> tuple[str, ...]:
        """The names that can occur in a step."""
        names = [row[step][0] for row in self.pairs] or self.names
        return tuple(sorted(set(names), key=CODES.__getitem__))

    def draw(
        self, n: int, generator: torch.Generator, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Kind (n, steps) int64, value (n, steps) float64; size: height, width of the images."""
        shape = (n, self.steps)
        if self.pairs:
            table = torch.tensor(
                [[(CODES[name], p, level) for name, p, level in row] for row in self.pairs],
                dtype=torch.float64,
            )
            chosen = torch.randint(len(self.pairs), (n,), generator=generator)
            kind, probability, level = table[chosen].unbind(2)
            kind = kind.long()
        else:
            codes = torch.tensor([CODES[name] for name in self.names])
            kind = codes[torch.randint(len(codes), shape, generator=generator)]
            probability = self.probability
            level = torch.randn(shape, generator=generator, dtype=torch.float64)
            level = (self.level + self.deviation * level).clamp(0, self.most)
            if self.levels:
                level = torch.randint(self.levels, shape, generator=generator).double()
        on = torch.rand(shape, generator=generator, dtype=torch.float64) < probability
        kind = torch.where(on, kind, CODES["Identity"])
        sign = torch.randint(2, shape, generator=generator) * 2.0 - 1
        value = torch.zeros(shape, dtype=torch.float64)
        names = {name for step in range(self.steps) for name in self.operations(step)}
        for name in sorted(names, key=CODES.__getitem__):
            here = kind == CODES[name]
            scaled = self.scaled(name, level[here], sign[here].double(), size)
            if scaled is not None:
                value[here] = scaled
        return kind, value

    def scaled(
        self, name: str, level: Tensor, sign: Tensor, size: tuple[int, int]
    ) -> Tensor | None:
        """What the operation takes at a level; None where it takes nothing."""
        if self.scale == "torchvision":
            return torchvision_scale(name, level, sign, size, self.bins)
        return timm_scale(name, level, sign, size, increasing=self.scale == "increasing")


def torchvision_scale(
    name: str, level: Tensor, sign: Tensor, size: tuple[int, int], bins: int
) -> Tensor | None:
    """Levels 0 .. bins - 1, from no change to the most."""
    if name == "Posterize":
        return 8 - (level / ((bins - 1) / 4)).round()
    if name == "Solarize":
        return at(255.0, 0.0, bins, level)
    if name.startswith("Translate"):
        side = size[1] if name == "TranslateX" else size[0]
        return -sign * at(0.0, 150 / 331 * side, bins, level).trunc()
    if name.startswith("Shear"):
        return sign * at(0.0, 0.3, bins, level)
    if name == "Rotate":
        return sign * at(0.0, 30.0, bins, level)
    if name in ("Brightness", "Color", "Contrast", "Sharpness"):
        return 1 + sign * at(0.0, 0.9, bins, level)
    return None


def at(first: float, last: float, bins: int, level: Tensor) -> Tensor:
    """torch.linspace, in float32 as torchvision has it, at whole levels."""
    return torch.linspace(first, last, bins).double()[level.long()]


def timm_scale(
    name: str, level: Tensor, sign: Tensor, size: tuple[int, int], *, increasing: bool
) -> Tensor | None:
    """Levels 0 .. 10; larger ones go on."""
    part = level / 10
    if name == "Rotate":
        return sign * (part * 30)
    if name.startswith("Shear"):
        return sign * (part * 0.3)
    if name.startswith("Translate"):
        return sign * (part * 0.45) * (size[1] if name == "TranslateX" else size[0])
    if name == "Posterize":
        return 4 - (part * 4).trunc() if increasing else (part * 4).trunc()
    if name == "Solarize":
        return 256 - (part * 256).trunc() if increasing else (part * 256).trunc()
    if name == "SolarizeAdd":
        return (part * 110).trunc()
    if name == "Cutout":
        return (part * 40).clamp(min=2).trunc()
    if name in ("Brightness", "Color", "Contrast", "Sharpness"):
        return (1 + sign * (part * 0.9)).clamp(min=0.1) if increasing else part * 1.8 + 0.1
    return None


@lru_cache
def policy(text: str) -> Policy:
    """The policy of a name; see the module.

    Raises: UserError for any other text.
    """
    if text in AUTO_AUGMENT:
        from torchvision.transforms import AutoAugment, AutoAugmentPolicy  # slow to import

        pairs = AutoAugment(AutoAugmentPolicy(text)).policies
        rows = tuple(tuple((name, p, level or 0) for name, p, level in row) for row in pairs)
        return Policy(2, "torchvision", bins=10, pairs=rows)
    if text == "v0":
        return Policy(2, "timm", pairs=tuple((row[:3], row[3:]) for row in V0))
    if text == "raug15":
        return Policy(2, "timm", names=(*TIMM, "Cutout"), levels=15)
    if text == "randaugment" or re.fullmatch(r"randaugment(-n[1-9])?(-m\d+)?", text):
        given = dict(re.findall(r"-([nm])(\d+)", text))
        level = int(given.get("m", 9))
        if level <= 30:
            steps = int(given.get("n", 2))
            return Policy(steps, "torchvision", bins=31, names=TORCHVISION, level=level, most=30)
    number = r"\d+(?:\.\d+)?"
    if re.fullmatch(rf"rand(-(m{number}|n[1-9]|p{number}|mstd{number}|inc[01]))*", text):
        given = dict(re.findall(rf"-(m|n|p|mstd|inc)({number})", text))
        probability = float(given.get("p", 0.5))
        if probability <= 1:
            return Policy(
                int(given.get("n", 2)),
                "increasing" if given.get("inc") == "1" else "timm",
                names=TIMM,
                probability=probability,
                level=float(given.get("m", 10)),
                deviation=float(given.get("mstd", 0)),
            )
    raise UserError(
        f"policy (={text!r}) must be {', '.join(AUTO_AUGMENT)}, v0, raug15, randaugment, "
        "randaugment-n2-m9 (m up to 30), or timm's rand-m9-mstd0.5-inc1 with m, n, p, mstd, inc."
    )
