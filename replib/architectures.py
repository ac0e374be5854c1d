"""How the released networks are laid out; data for `replib.official`.

A row is a body of ours, what names its blocks, and what its layers are called there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial

from torch import nn

from replib.models import BODIES
from replib.models.cifar_repvgg import WIDTH_FACTORS
from replib.models.mobile import MOBILEONE
from replib.models.replknet import REPLKNET
from replib.models.repmlpnet import REPMLPNET
from replib.models.repvgg import REPOPT_VGG, REPVGG
from replib.sources import Renames


def no_options(keys: Collection[str]) -> dict:
    return {}


@dataclass(frozen=True)
class Architecture:
    """How a released network is laid out.

    build: classes -> our body;
    sources: family -> what names its blocks;
    renames: (pattern of our module path, official path), the first that matches whole counts;
    classifier: the official weight whose rows are the classes;
    wrapper: the key under which the original script looks for the state, None for a bare one;
    options: the official keys of a file -> further arguments of `build`;
    grows: whether plain convolutions may have become DyRep blocks.
    """

    build: Callable[..., nn.Module]
    sources: Mapping[str, str]
    renames: Renames
    classifier: str = "linear.weight"
    wrapper: str | None = None
    options: Callable[[Collection[str]], dict] = field(default=no_options)
    grows: bool = False


def body(name: str, block: str | None = None) -> Callable[..., nn.Module]:
    """A body of `BODIES`, with blocks of this family (None: plain layers)."""
    return partial(BODIES[name], block=block)


BLOCK = (r"(.+)\.block", r"\1")  # a block of ours is named by its layer there
EXCITE = (
    (r"(.+\.(?:se|post_se))\.reduce", r"\1.down"),
    (r"(.+\.(?:se|post_se))\.expand", r"\1.up"),
)
RESIDUAL = (r"(stage\d\.\d+)\.(?:residual\.)?(\w+)\.block", r"\1.\2")

# -- RepVGG, OREPA-RepVGG, RepOpt-VGG, MobileOne: the same stages under other names ----------------
PLUS = (
    (r"stages\.(stage\d\w*)\.(\d+)\.block", r"\1.blocks.\2"),
    (r"stages\.(stage\d\w*)\.(\d+)\.post_se\.reduce", r"\1.blocks.\2.post_se.down"),
    (r"stages\.(stage\d\w*)\.(\d+)\.post_se\.expand", r"\1.blocks.\2.post_se.up"),
    (r"auxiliary\.(\w+)\.conv\.block", r"\1_aux.0"),
    (r"auxiliary\.(\w+)\.linear", r"\1_aux.3"),
    (r"head\.linear", "linear"),
)


def repvgg_family() -> dict[str, Architecture]:
    made = {
        f"repvgg_{name}": Architecture(
            body(f"repvgg_{name}", "repvgg"), {"repvgg": "repvgg"}, (BLOCK, *EXCITE)
        )
        for name in REPVGG
    }
    made["repvggplus_l2pse"] = Architecture(
        body("repvggplus_l2pse", "repvgg"),
        {"repvgg": "repvgg", "convbn": "convbn"},
        (*PLUS, BLOCK, *EXCITE),
        options=lambda keys: {"auxiliary": any("_aux." in key for key in keys)},
    )
    for name in ("a0", "a1", "a2"):
        made[f"orepa_repvgg_{name}"] = Architecture(
            body(f"repvgg_{name}", "orepa_repvgg"), {"orepa_repvgg": "orepa_repvgg"}, (BLOCK,)
        )
    for name in REPOPT_VGG:
        for suffix, family, source in (
            ("", "convbn", "convbn"),  # trained with RepOptimizers
            ("_hs", "csla", "repopt_csla"),  # the search for the scales
            ("_repvgg", "repvgg", "repopt_repvgg"),  # the baseline
        ):
            made[f"repopt_vgg_{name}{suffix}"] = Architecture(
                body(f"repopt_vgg_{name}", family), {family: source}, (BLOCK,), wrapper="model"
            )
    for name in MOBILEONE:
        made[f"mobileone_{name}"] = Architecture(
            body(f"mobileone_{name}", "mobileone"), {"mobileone": "mobileone"}, (BLOCK,)
        )
    return made


# -- RepAn -----------------------------------------------------------------------------------------
REPAN_STAGES = (
    (r"stage0\.block", "stages.0.sequential.0"),
    (r"stage(\d)\.(\d+)\.block", r"stages.\1.sequential.\2"),
    ("linear", "fc"),
)


def repan_family() -> dict[str, Architecture]:
    made = {
        f"repan_repvgg_{name}": Architecture(
            body(f"cifar_repvgg_{name}", "repvgg"),
            {"repvgg": "repan_repvgg"},
            ((r"stages\.(\d+)\.(\d+)\.block", r"stages.\1.sequential.\2"),),
            "fc.weight",
            "model_state",
        )
        for name in WIDTH_FACTORS
    }
    for name in WIDTH_FACTORS:
        made[f"repan_imagenet_repvgg_{name}"] = Architecture(
            body(f"repvgg_{name}", "repvgg"),
            {"repvgg": "repan_repvgg"},
            REPAN_STAGES,
            "fc.weight",
            "model_state",
        )
    stem = ((r"stage0\.conv", "stage0.0"), (r"stage0\.norm", "stage0.1"))
    for name in ("resnet18", "resnet34", "resnet50"):
        for suffix, family in (("dbb", "dbb"), ("acb", "acb"), ("rep", "rep"), ("base", "convbn")):
            made[f"repan_{name}_{suffix}"] = Architecture(
                body(name, family),
                {family: f"repan_{family}", "convbn": "repan_convbn"},
                (*stem, RESIDUAL, BLOCK),
                wrapper="model_state",
                options=lambda keys: {"small_images": "stage0.0.weight" in keys},
            )
    return made


# -- the zoos of DBB and OREPA ---------------------------------------------------------------------
OREPA_SOURCES = {name: name for name in ("orepa", "orepa_1x1", "orepa_stem")}


def zoo_family() -> dict[str, Architecture]:
    def row(name: str, family: str, sources: Mapping[str, str], renames: Renames) -> Architecture:
        named = {"convbn": "convbn", **sources}
        return Architecture(body(name, family), named, renames, wrapper="state_dict")

    dbb, orepa = ("dbb", {"dbb": "dbb"}), ("orepa", OREPA_SOURCES)
    plain, resnet = ("convbn", {}), (RESIDUAL, BLOCK)
    names = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet18_2x", "resnext50")
    bodies = {"resnet18_2x": "wide_resnet18_2", "resnext50": "resnext50_32x4d"}
    made = {}
    for name in names:
        ours = bodies.get(name, name)
        made[f"orepa_{name}"] = row(ours, *orepa, resnet)
        made[f"orepa_{name}_base"] = row(ours, *plain, resnet)
    for name in ("resnet18", "resnet50"):
        made[f"dbb_{name}"] = made[f"orepa_{name}_dbb"] = row(name, *dbb, resnet)
        made[f"dbb_{name}_base"] = row(name, *plain, resnet)
    made["dbb_mobilenet"] = row("mobilenet_v1", *dbb, (BLOCK,))
    made["dbb_mobilenet_base"] = row("mobilenet_v1", *plain, (BLOCK,))
    return made


# -- RepLKNet, RepMLPNet ---------------------------------------------------------------------------
LARGE_KERNELS = (
    (r"stage(\d)\.(\d+)\.residual\.(\w+?)(?:\.block)?", r"stages.\1.blocks.\2.\3"),
    (r"transition(\d)\.(\d)\.block", r"transitions.\1.\2"),
    BLOCK,
)
MLP = (
    (r"stage(\d)\.(\d+)\.mix\.residual\.norm", r"stages.\1.\2.prebn1"),
    (r"stage(\d)\.(\d+)\.mix\.residual\.repmlp", r"stages.\1.\2.repmlp_block"),
    (r"stage(\d)\.(\d+)\.ffn\.residual\.norm", r"stages.\1.\2.prebn2"),
    (r"stage(\d)\.(\d+)\.ffn\.residual\.(fc\d)\.block", r"stages.\1.\2.ffn_block.ffn_\3"),
    (r"embed(\d)\.block", r"embeds.\1"),
    BLOCK,
)


def other_families() -> dict[str, Architecture]:
    made = {}
    for name in REPLKNET:
        sources = {"replk": "replk", "convbn": "convbn"}
        made[f"replknet_{name}"] = Architecture(
            body(f"replknet_{name}", "replk"), sources, LARGE_KERNELS, "head.weight", "model"
        )
    for name in REPMLPNET:
        sources = {"repmlp": "repmlp", "convbn": "convbn"}
        made[f"repmlpnet_{name}"] = Architecture(
            BODIES[f"repmlpnet_{name}"], sources, MLP, "head.weight", "model"
        )
    return made


# -- DyRep: plain networks, in which blocks have grown ---------------------------------------------
def torchvision_resnet(name: str, *, classes: int) -> nn.Module:
    from torchvision.models import get_model  # slow to import

    return get_model(name, num_classes=classes)


VGG16 = (
    (r"(features\.conv\d+)\.norm", r"\1.bn1"),
    (r"features\.fc", "features.fc.fc.0"),
    ("classifier", "classifier.linear1"),
)
MOBILENET_V1 = (
    (r"conv1\.conv", "model.0.0"),
    (r"conv1\.norm", "model.0.1"),
    *(
        (rf"stem\.{i}\.{part}\.{kind}", f"model.{i + 1}.{number}")
        for i in range(13)
        for number, part, kind in (
            (0, "depthwise", "conv"),
            (1, "depthwise", "norm"),
            (3, "pointwise", "conv"),
            (4, "pointwise", "norm"),
        )
    ),
    ("linear", "fc"),
)
TIMM_STAGES = (
    (r"stage0\.block", "stem"),
    *((rf"stage{i + 1}\.(\d+)\.block", rf"stages.{i}.\1") for i in range(4)),
    ("linear", "head.fc"),
)


def dyrep_family() -> dict[str, Architecture]:
    grown = {"dyrep": "dyrep"}
    rows = {
        "vgg16": (body("cifar_vgg16"), grown, VGG16, "classifier.linear1.weight"),
        "mobilenet_v1": (body("mobilenet_v1"), grown, MOBILENET_V1, "fc.weight"),
    }
    for name in ("resnet18", "resnet34", "resnet50"):
        rows[name] = (partial(torchvision_resnet, name), grown, (), "fc.weight")
    for name in REPVGG:
        if name != "d2se":
            made = body(f"repvgg_{name}", "repvgg")
            sources = {"repvgg": "timm_repvgg"}
            rows[f"repvgg_{name}"] = (made, sources, TIMM_STAGES, "head.fc.weight")
    return {f"dyrep_{k}": Architecture(*row, "model", grows=True) for k, row in rows.items()}


# -- the teachers of RepAn's distillation ----------------------------------------------------------
BOTTLENECKS = tuple(
    (rf"layer{i}\.(\d+)\.{ours}", rf"conv{i + 1}_x.\1.{theirs}")
    for i in range(1, 5)
    for ours, theirs in (
        *((f"conv{j}", f"residual_function.{3 * j - 3}") for j in (1, 2, 3)),
        *((f"bn{j}", f"residual_function.{3 * j - 2}") for j in (1, 2, 3)),
        (r"downsample\.0", "shortcut.0"),
        (r"downsample\.1", "shortcut.1"),
    )
)
TEACHERS = {
    "repan_teacher_resnet101": Architecture(
        BODIES["cifar_resnet101"],
        {},
        (("conv1", "conv1.0"), ("bn1", "conv1.1"), *BOTTLENECKS),
        "fc.weight",
    ),
    "repan_teacher_resnet110": Architecture(
        BODIES["cifar_resnet110"], {}, (), wrapper="state_dict"
    ),
}

ARCHITECTURES: dict[str, Architecture] = {
    **repan_family(),
    **TEACHERS,
    **repvgg_family(),
    **zoo_family(),
    **other_families(),
    **dyrep_family(),
}
