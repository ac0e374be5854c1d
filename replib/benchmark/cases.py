"""The cases: what is compared, how large, and about how long it takes. The most valuable first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from replib.benchmark import forms, limits, loops, packing, shapes, steps
from replib.benchmark.setting import Setting, Subject, Tier
from replib.benchmark.subjects import (
    BRANCHES,
    SHARED,
    Way,
    body,
    fits_small_images,
    stack,
    torchvision_resnet18,
)
from replib.blocks import BLOCKS
from replib.networks import CONVOLUTIONS

LEADING = ("repvgg", "dbb", "orepa")  # compared in every form; the others shared and not


@dataclass(frozen=True)
class Case:
    """One comparison. seconds: about how long it takes on 2 cores, or on a GPU."""

    id: str
    title: str
    run: Callable[[Setting], dict]
    seconds: dict[str, float]  # by tier; a case is not run in a tier that is not here


# -- the networks ---------------------------------------------------------------------------------
def small(tier: Tier, block: str, batch: int | None = None, few: int = 16) -> Subject:
    """The plain body of blocks on small images: RepVGG-A1 as RepAn has it for CIFAR."""
    make = partial(body, tier.body, block)
    return Subject(make, tier.image, batch or tier.batch, few=few)


def large(tier: Tier, block: str | None, full: bool = False) -> Subject:
    """torchvision's ResNet-18."""
    size = tier.full_image if full else tier.large_image
    batch = tier.full_batch if full else tier.large_batch
    return Subject(partial(torchvision_resnet18, block), size, batch, few=4)


class Plain(nn.Module):
    """A body of convolutions with bias and ReLUs, as one writes it without this library."""

    def __init__(self, convolutions: list[nn.Module], classifier: nn.Linear):
        super().__init__()
        layers: list[nn.Module] = []
        for other in convolutions:
            shape = other.in_channels, other.out_channels, other.kernel_size
            conv = nn.Conv2d(*shape, stride=other.stride, padding=other.padding)
            conv.load_state_dict(other.state_dict())
            layers += [conv, nn.ReLU()]
        self.features, self.fc = nn.Sequential(*layers), nn.Linear(classifier.in_features, 10)
        self.fc.load_state_dict(classifier.state_dict())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.features(x).mean((2, 3)))


def plain_body(deployed: nn.Module) -> nn.Module:
    found = [m for m in deployed.modules() if isinstance(m, CONVOLUTIONS)]
    return Plain(found, next(m for m in deployed.modules() if isinstance(m, nn.Linear)))


def plain_resnet18(deployed: nn.Module) -> nn.Module:
    """torchvision's own, its norms left out; names of layers are the same in both."""
    from torchvision.models import resnet18

    made = resnet18(num_classes=10)
    for name, module in list(made.named_modules()):
        if isinstance(module, nn.Conv2d):
            module.bias = nn.Parameter(torch.zeros(module.out_channels))
        elif isinstance(module, nn.BatchNorm2d):
            place, _, last = name.rpartition(".")
            setattr(made.get_submodule(place), last, nn.Identity())
    made.load_state_dict(deployed.state_dict())
    return made


# -- what each case does --------------------------------------------------------------------------
def a1_leading(block: str, setting: Setting) -> dict:
    """Every form of a step."""
    ways = [
        Way(block, BRANCHES, "contiguous"),
        Way(block, BRANCHES),
        Way(block, SHARED, "contiguous"),
        Way(block),
    ]
    if setting.on_gpu:
        ways += [
            Way(block, BRANCHES, precision="bfloat16"),
            Way(block, precision="bfloat16"),
            Way(block, mode="cudagraphs", precision="bfloat16"),
        ]
    if block == "repvgg":  # compiling takes a minute or two
        ways.append(Way(block, mode="cudagraphs" if setting.on_gpu else "default"))
    if setting.tier.name == "quick":
        ways = [way for way in ways if way.mode == "none"]
    subjects = {block: small(setting.tier, block)}
    pairs = [(Way(block, BRANCHES), Way(block))]
    return steps.steps(setting, subjects, ways, pairs=pairs)[0]


def compiled(block: str, setting: Setting) -> dict:
    """What torch.compile does, with the shared form and alone."""
    ways = [Way(block, BRANCHES, "contiguous"), Way(block, mode="default")]
    if block == "repvgg":
        ways = [ways[0], Way(block, BRANCHES, mode="default")]
    return steps.steps(setting, {block: small(setting.tier, block)}, ways)[0]


def shared_against_branches(setting: Setting, subjects: dict[str, Subject]) -> dict:
    """Shared against branch by branch, both channels last."""
    ways = [way for name in subjects for way in (Way(name, BRANCHES), Way(name))]
    return steps.steps(setting, subjects, ways)[0]


def a1_other(block: str, setting: Setting) -> dict:
    subject = small(setting.tier, block, setting.tier.many_batch)
    return shared_against_branches(setting, {block: subject})


def resnet_block(block: str, setting: Setting) -> dict:
    """A family on ResNet-18, and the plain network."""
    tier = setting.tier
    ways = [Way(block, BRANCHES), Way(block), Way("plain", "plain")]
    subjects = {block: large(tier, block), "plain": large(tier, None)}
    return steps.steps(setting, subjects, ways, pairs=[(ways[1], ways[2])])[0]


def resnet_orepa(setting: Setting) -> dict:
    """OREPA's claim on ResNet-18 at the size of its paper."""
    subjects = {name: large(setting.tier, name, full=True) for name in ("dbb", "orepa")}
    fewer = replace(setting.tier, rounds=3)  # a round takes half a minute on a processor
    setting = setting if setting.on_gpu else replace(setting, tier=fewer)
    ways = [Way("dbb", BRANCHES), Way("dbb"), Way("orepa")]
    offline = Way("orepa", "unsqueezed")
    more = [Way("orepa", BRANCHES)]
    if setting.on_gpu:
        ways, more = ways + more, []
    pairs = [(Way("dbb", BRANCHES), Way("orepa")), (Way("dbb"), Way("orepa"))]
    pairs.append((Way("orepa"), offline))
    return steps.steps(setting, subjects, ways, pairs=pairs, untimed=[offline, *more])[0]


def crossover(setting: Setting) -> dict:
    """OREPA against DBB over batches, before and after."""
    tier = setting.tier

    def of(block: str | None) -> Callable[[int], Subject]:
        make = partial(torchvision_resnet18, block)
        return lambda batch: Subject(make, tier.large_image, batch, few=4)

    families = {"dbb": of("dbb"), "orepa": of("orepa"), "plain": of(None)}
    pairs = [("dbb", SHARED, "orepa", SHARED), ("dbb", BRANCHES, "orepa", SHARED)]
    both = (BRANCHES, SHARED)
    return steps.growth(setting, "batch", families, tier.crossover, both, pairs)


def scaled(tier: Tier, *values: int) -> tuple[int, ...]:
    """The first two in the quick tier."""
    return values[:2] if tier.name == "quick" else values


def growth_width(setting: Setting) -> dict:
    tier, xs = setting.tier, scaled(setting.tier, 16, 32, 64, 128)
    side, batch = (8, 4) if tier.name == "quick" else (16, 32)

    def of(block: str) -> Callable[[int], Subject]:
        return lambda x: Subject(partial(stack, block, x, 2), side, batch, channels=x)

    families = {"repvgg": of("repvgg"), "dbb": of("dbb"), "plain": of("convbn")}
    return steps.growth(setting, "width", families, xs, (BRANCHES, SHARED))


def growth_depth(setting: Setting) -> dict:
    tier, xs = setting.tier, scaled(setting.tier, 1, 2, 4, 8)
    side, batch = (8, 4) if tier.name == "quick" else (16, 32)

    def of(block: str) -> Callable[[int], Subject]:
        return lambda x: Subject(partial(stack, block, 32, x), side, batch, channels=32)

    families = {"repvgg": of("repvgg"), "dbb": of("dbb"), "plain": of("convbn")}
    return steps.growth(setting, "depth", families, xs, (BRANCHES, SHARED))


def growth_branches(setting: Setting) -> dict:
    tier, xs = setting.tier, scaled(setting.tier, 1, 2, 4, 8)
    side, batch = (8, 4) if tier.name == "quick" else (16, 32)

    def of(block: str) -> Callable[[int], Subject]:
        return lambda x: Subject(partial(stack, block, 32, 2, n=x), side, batch, channels=32)

    families = {"duplicate": of("duplicate"), "mobileone": of("mobileone")}
    return steps.growth(setting, "branches", families, xs, (BRANCHES, SHARED))


def growth_batch(setting: Setting) -> dict:
    tier, xs = setting.tier, scaled(setting.tier, 4, 16, 64, 256)
    side = 8 if tier.name == "quick" else 16

    def of(block: str) -> Callable[[int], Subject]:
        return lambda x: Subject(partial(stack, block, 32, 2), side, x, channels=32)

    names = {"repvgg": "repvgg", "dbb": "dbb", "orepa": "orepa", "plain": "convbn"}
    families = {name: of(block) for name, block in names.items()}
    return steps.growth(setting, "batch", families, xs, (BRANCHES, SHARED))


def peer(name: str, block: str, setting: Setting) -> dict:
    """A network of timm, with the same weights."""
    tier = setting.tier
    size = 64 if tier.name == "quick" else tier.large_image
    subjects = {name: Subject(partial(body, name, block), size, max(4, tier.large_batch), few=4)}
    # Contiguous: oneDNN's backward pass of a strided 1x1 convolution of 3 channels, channels
    # last, writes past its memory (uxlfoundation/oneDNN issue 6035), and timm's stem has one.
    names = (f"timm {name}", BRANCHES, SHARED)
    ways = [Way(name, form, "contiguous") for form in names]
    return steps.steps(setting, subjects, ways)[0]


def epoch_small(setting: Setting) -> dict:
    tier = setting.tier
    ways = [("float32", "none")]
    if setting.on_gpu:
        ways = [("bfloat16", "cudagraphs"), ("float32", "cudagraphs")]
    return loops.epochs(setting, partial(body, tier.body, "repvgg"), ways)


def epoch_resnet(setting: Setting) -> dict:
    """ResNet-18 with DBB for CIFAR."""
    ways = [("bfloat16", "cudagraphs")]
    return loops.epochs(setting, partial(body, "cifar_resnet18", "dbb"), ways)


def cycle(setting: Setting) -> dict:
    return forms.cycle(setting, small(setting.tier, "repvgg"))


def deployed_small(setting: Setting) -> dict:
    return forms.deployed(setting, small(setting.tier, "repvgg"), plain_body)


def deployed_resnet(setting: Setting) -> dict:
    tier = setting.tier
    subject = Subject(partial(torchvision_resnet18, "dbb"), tier.large_image, 8)
    batches = (1, 64) if setting.on_gpu else (1, 16)
    return forms.deployed(setting, subject, plain_resnet18, batches)


def share_small(setting: Setting) -> dict:
    subjects = {name: small(setting.tier, name) for name in ("repvgg", "convbn")}
    ways = [Way("repvgg", BRANCHES), Way("repvgg"), Way("convbn")]
    if setting.on_gpu:
        ways += [Way("repvgg", mode="cudagraphs")]
    return limits.share(setting, subjects, ways)


def share_resnet(setting: Setting) -> dict:
    tier = setting.tier
    subjects = {"plain": large(tier, None, full=setting.on_gpu)}
    subjects["dbb"] = large(tier, "dbb", full=setting.on_gpu)
    kinds = {"precision": "bfloat16"} if setting.on_gpu else {}
    ways = [Way("plain", "plain", **kinds), Way("dbb", **kinds)]
    if setting.on_gpu:
        ways += [
            Way("plain", "plain", mode="default", **kinds),
            Way("dbb", mode="default", **kinds),
        ]
    return limits.share(setting, subjects, ways)


def packed(mode: str, setting: Setting) -> dict:
    """Cells of the small body at once."""
    tier = setting.tier
    batch = tier.batch if setting.on_gpu else max(8, tier.batch // 4)
    count = {"quick": 1, "cpu": 2}.get(tier.name, 50)
    subject = small(tier, "repvgg", batch)
    return packing.packed(setting, subject, Way("repvgg", mode=mode), count)


def accuracy(setting: Setting) -> dict:
    seeds = 2 if setting.tier.name == "quick" else 3
    make = partial(body, setting.tier.body, "repvgg")
    return loops.accuracy_by_precision(setting, make, seeds)


# -- the list -------------------------------------------------------------------------------------
def seconds(quick: float | None, cpu: float | None, cuda: float | None) -> dict[str, float]:
    times = {"quick": quick, "cpu": cpu, "cuda": cuda}
    return {tier: value for tier, value in times.items() if value is not None}


SMALL = [name for name in BLOCKS if name not in LEADING and fits_small_images(name)]
A1 = "RepVGG-A1 for CIFAR"

CASES: dict[str, Case] = {
    case.id: case
    for case in [
        Case(
            "vectors",
            "The branch-by-branch reference against the official implementations",
            steps.vectors,
            seconds(2, 3, 10),
        ),
        Case("machine", "What this machine can do at most", limits.machine, seconds(1, 8, 5)),
        Case(
            "epoch/a1",
            f"An epoch of {A1}: our loop against DataLoader and eager float32",
            epoch_small,
            seconds(4, 35, 90),
        ),
        Case(
            "epoch/resnet18-dbb",
            "An epoch of ResNet-18 with DBB for CIFAR, likewise",
            epoch_resnet,
            seconds(None, None, 110),
        ),
        *(
            Case(
                f"a1/{name}",
                f"A training step of {A1} with {name} blocks, in every form",
                partial(a1_leading, name),
                seconds(2, {"repvgg": 100, "dbb": 50, "orepa": 45}[name], 60),
            )
            for name in LEADING
        ),
        Case(
            "packed",
            f"Several cells of {A1} at once",
            partial(packed, "none"),
            seconds(8, 40, 40),
        ),
        Case(
            "resnet18/orepa-full",
            "OREPA and DBB on ResNet-18 at 224x224, batch 64",
            resnet_orepa,
            seconds(30, 360, 40),
        ),
        Case(
            "share/resnet18",
            "ResNet-18: the share of the memory bandwidth and of the arithmetic rate",
            share_resnet,
            seconds(4, 15, 40),
        ),
        Case(
            "share/a1",
            f"{A1}: the share of the memory bandwidth and of the arithmetic rate",
            share_small,
            seconds(3, 20, 15),
        ),
        Case(
            "shape/kernel-size",
            "One convolution by the size of its kernel (RepVGG, table 1)",
            shapes.kernel_sizes,
            seconds(1, 10, 40),
        ),
        Case(
            "shape/shortcut",
            "Maps in memory at once, with shortcuts and without (RepVGG, figure 3)",
            shapes.shortcut,
            seconds(1, 2, 3),
        ),
        Case("cycle", f"Merge, restore, verify {A1}, in training steps", cycle, seconds(3, 20, 15)),
        Case(
            "deployed/a1",
            f"Inference of {A1}: training form, deployed, plain",
            deployed_small,
            seconds(2, 8, 8),
        ),
        Case(
            "deployed/resnet18",
            "Inference of ResNet-18 with DBB: training form, deployed, plain",
            deployed_resnet,
            seconds(3, 12, 8),
        ),
        Case(
            "accuracy/bfloat16",
            f"Accuracy of {A1} trained in bfloat16 and in float32",
            accuracy,
            seconds(8, None, 45),
        ),
        Case(
            "crossover",
            "OREPA and DBB on ResNet-18 over the batch, before and after",
            crossover,
            seconds(60, 120, 25),
        ),
        *(
            Case(
                f"a1/{name}",
                f"A training step of {A1} with {name} blocks",
                partial(a1_other, name),
                seconds(2, 12, 5),
            )
            for name in SMALL
        ),
        Case(
            "packed/graphs",
            f"Several cells of {A1} at once, each compiled and a CUDA graph",
            partial(packed, "cudagraphs"),
            seconds(None, None, 90),
        ),
        Case("growth/width", "Growth with the width", growth_width, seconds(3, 15, 10)),
        Case("growth/depth", "Growth with the depth", growth_depth, seconds(3, 10, 10)),
        Case(
            "growth/branches",
            "Growth with the number of branches",
            growth_branches,
            seconds(3, 10, 10),
        ),
        Case("growth/batch", "Growth with the batch", growth_batch, seconds(3, 12, 10)),
        Case(
            "peers/repvgg",
            "RepVGG-A0 of timm",
            partial(peer, "repvgg_a0", "repvgg"),
            seconds(5, 12, 8),
        ),
        Case(
            "peers/mobileone",
            "MobileOne-S0 of timm",
            partial(peer, "mobileone_s0", "mobileone"),
            seconds(8, 15, 12),
        ),
        *(
            Case(
                f"resnet18/{name}",
                f"A training step of ResNet-18 with {name} blocks",
                partial(resnet_block, name),
                seconds(8, 12, 6),
            )
            for name in BLOCKS
        ),
        *(
            Case(
                f"compiled/{name}",
                f"A training step of {A1} with {name} blocks, compiled",
                partial(compiled, name),
                seconds(None, {"dbb": 110, "orepa": 110, "repvgg": 80}[name], None),
            )
            for name in ("dbb", "orepa", "repvgg")
        ),
    ]
}
