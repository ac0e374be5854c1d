"""Every released network: its names and shapes, out and in again, whole and deployed.

The digests of all names and shapes come from the released codes; see `test_vectors` for where
they are looked for. Shapes are enough for them, so the large networks are made without memory.
"""

import hashlib
import json
import re
import sys
from argparse import Namespace
from dataclasses import replace
from functools import partial
from types import ModuleType

import pytest
import torch
from test_blocks import scrambled
from test_vectors import FIXTURES, VECTORS, agree, read, under
from torch import nn

from replib import official
from replib.architectures import ARCHITECTURES
from replib.blocks import BLOCKS
from replib.blocks.repmlp import RepMLP
from replib.fusing import deployed_copy
from replib.models.mobile import MOBILEONE
from replib.models.replknet import REPLKNET
from replib.models.repmlpnet import REPMLPNET
from replib.models.repvgg import SIZES

torch.set_num_threads(1)
DIGESTS = FIXTURES / "model_key_digests.json"
KNOWN = json.loads(DIGESTS.read_text()) if DIGESTS.is_file() else {}
RELEASED = (  # (name in the list, less `_deploy`; the architecture, in lower case)
    (r"repan/cifar_repvgg_(..)_\d+", r"repan_repvgg_\1"),
    (r"repan/img_repvgg_(..)", r"repan_imagenet_repvgg_\1"),
    (r"repan/(resnet\d+_\w+)_\d+", r"repan_\1"),
    (r"repan/(teacher_resnet\d+)", r"repan_\1"),
    (r"repvgg/RepVGG-(\w+)", r"repvgg_\1"),
    (r"repvgg/RepVGGplus-(\w+)", r"repvggplus_\1"),
    (r"orepa/RepVGG-(..)_OREPA_VGG", r"orepa_repvgg_\1"),
    (r"orepa/(ResNe[tX]t?)-(\d+)-?(2x)?_OREPA", r"orepa_\1\2\3"),
    (r"dbb/(MobileNet|ResNet)-?(\d*)_DBB", r"dbb_\1\2"),
    (r"(dbb|orepa)/(MobileNet|ResNe[tX]t?)-?(\d*)-?(2x)?_(DBB|base)", r"\1_\2\3\4_\5"),
    (r"repopt/(..)_target", r"repopt_vgg_\1"),
    (r"repopt/(.._hs)_100", r"repopt_vgg_\1"),
    (r"repopt/(.._repvgg)", r"repopt_vgg_\1"),
    (r"dyrep/(vgg16)_cifar\d+", r"dyrep_\1"),
    (r"repmlp/(RepMLPNet)-(\w+)", r"\1_\2"),
    (r"(mobileone|replknet|dyrep)/(\w+)", r"\1_\2"),
)
SMALL = 5.3e6  # parameters: this and less is the fast tier's


def architecture_of(name: str) -> str:
    whole = name.removesuffix("_deploy")
    found = [m.expand(arch) for rule, arch in RELEASED if (m := re.fullmatch(rule, whole))]
    return found[0].lower().replace("18" + "2x", "18_2x")


def classes_of(name: str) -> int:
    """At the end of the name where not 1000; those of the teachers."""
    teacher = {"101": 100, "110": 10}.get(name.rpartition("teacher_resnet")[2])
    return teacher or int((re.findall(r"(?:_|cifar)(10+)$", name) or [1000])[0])


def digest(state: dict) -> str:
    lines = sorted(f"{key} {','.join(map(str, value.shape))}" for key, value in state.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def body_of(arch: str, classes: int):
    """The body of an architecture, with RepAn's stem for small images where it has that."""
    layout = ARCHITECTURES[arch]
    small = arch.startswith("repan_resnet") and classes < 1000
    return layout.build(classes=classes, **({"small_images": True} if small else {}))


def exported(model, arch: str) -> dict:
    """The state, out of what the original script expects around it."""
    wrapper, out = ARCHITECTURES[arch].wrapper, official.export(model, arch)
    return out if wrapper is None else out[wrapper]


def deployed(model):
    """As the released code deploys: RepMLPNet merges its dense maps alone."""
    mlps = {path: module for path, module in model.named_modules() if isinstance(module, RepMLP)}
    for path, module in mlps.items():
        model.set_submodule(path, module.deploy())
    return model if mlps else deployed_copy(model.eval())


def by_size():
    for name, known in KNOWN.items():
        marks = [pytest.mark.slow] if known["params"] > SMALL else []
        yield pytest.param(name, marks=marks)


@pytest.mark.skipif(not KNOWN, reason=f"no digests at {DIGESTS}")
@pytest.mark.parametrize("name", list(by_size()))
@pytest.mark.slow
def test_an_export_has_the_official_names_and_shapes(name):
    arch = architecture_of(name)
    with torch.device("meta"):
        model = body_of(arch, classes_of(name))
        if name.endswith("_deploy"):
            model = deployed(model)
    state = exported(model, arch)
    assert len(state) == KNOWN[name]["n_keys"]
    assert digest(state) == KNOWN[name]["sha256"]


# -- out and in again, at a size where a processor does not notice ---------------------------------
TINY = (  # the numbers of a body, shrunk: the tables are the same at every size
    (SIZES, "b1", ((1, 2, 1, 1), (0.125, 0.125, 0.125, 0.0625))),
    (SIZES, "l2", ((1, 2, 4, 1), (0.25, 0.25, 0.25, 0.125))),
    (SIZES, "a0", ((2, 1, 1, 1), (0.25, 0.25, 0.125, 0.0625))),
    (MOBILEONE, "s0", ((0.25, 0.125, 0.125, 0.0625), 2, (0, 1, 1, 1))),
    (REPLKNET, "31b", ((9, 7, 5, 5), 8, 1, 5)),
    (REPMLPNET, "t224", (8, (1, 1, 2, 1), 8, (1, 2, 4, 4))),
)
ROUND_TRIPS = {  # architecture -> further arguments of its body
    "repan_repvgg_a0": {},
    "repan_imagenet_repvgg_b1": {},
    **{f"repan_resnet18_{b}": {"small_images": True} for b in ("dbb", "acb", "rep", "base")},
    "repan_resnet50_dbb": {},
    "repvgg_a0": {},
    "repvgg_b1g4": {},
    "repvgg_d2se": {},
    "repvggplus_l2pse": {},
    "orepa_repvgg_a0": {},
    "repopt_vgg_b1": {},
    "repopt_vgg_b1_hs": {},
    "repopt_vgg_b1_repvgg": {},
    "mobileone_s0": {},
    "dbb_resnet18": {},
    "dbb_resnet50_base": {},
    "orepa_resnet18": {},
    "orepa_resnet50": {},
    "dbb_mobilenet": {},
    "replknet_31b": {},
    "repmlpnet_t224": {},
    "dyrep_vgg16": {},
    "dyrep_mobilenet_v1": {},
    "dyrep_repvgg_b1": {},
    "repan_teacher_resnet110": {},
}


@pytest.fixture
def tiny(monkeypatch):
    """A small network of an architecture with scrambled norms, in eval mode."""
    for table, name, numbers in TINY:
        monkeypatch.setitem(table, name, numbers)
    monkeypatch.setattr("replib.models.mobile.MOBILENET_V1", ((16, 2), (16, 1), (32, 2)))

    def made(arch: str, classes: int = 7, **options):
        layout = ARCHITECTURES[arch]
        if "resnet" in arch and "teacher" not in arch:
            layout = replace(layout, build=partial(layout.build, width=0.125))
            monkeypatch.setitem(ARCHITECTURES, arch, layout)
        torch.manual_seed(0)
        return scrambled(layout.build(classes=classes, **options).eval())

    return made


def size_of(arch: str) -> int:
    return 64 if "imagenet" in arch or "repvgg" in arch else 32


FAST = (  # one of every kind
    "repan_resnet18_acb",
    "repvgg_d2se",
    "orepa_repvgg_a0",
    "repopt_vgg_b1_hs",
    "dbb_mobilenet",
    "repmlpnet_t224",
    "dyrep_repvgg_b1",
)


@pytest.mark.parametrize(
    "arch",
    [pytest.param(a, marks=[] if a in FAST else [pytest.mark.slow]) for a in ROUND_TRIPS],
)
@torch.no_grad()
@pytest.mark.slow
def test_what_goes_out_comes_in_again(arch, tiny, tmp_path):
    """Whole and deployed, through a file, to the bit."""
    model = tiny(arch, **ROUND_TRIPS[arch])
    x = torch.randn(2, 3, size_of(arch), size_of(arch))
    for network in (model, deployed_copy(model)):
        out = official.export(network, arch, epoch=4)
        state = state_of(out, arch)
        old = {f"module.{k}": v for k, v in state.items() if "num_batches_tracked" not in k}
        torch.save({**out, "state_dict": old} if state is out else out, tmp_path / "best.pth.tar")
        torch.save(old, tmp_path / "old.pyth")
        for name in ("best.pth.tar", "old.pyth"):
            again = official.load_model(tmp_path / name, arch).eval()
            assert torch.equal(again(x), network(x))
            assert [type(m) for m in again.modules()] == [type(m) for m in network.modules()]
        again = state_of(official.export(again, arch), arch)
        assert list(again) == list(state)
        kept = [key for key in state if "num_batches_tracked" not in key]
        assert all(torch.equal(again[key], state[key]) for key in kept)


def state_of(out: dict, arch: str) -> dict:
    wrapper = ARCHITECTURES[arch].wrapper
    return out if wrapper is None else out[wrapper]


def test_the_wrapper_is_that_of_the_original_script(tiny):
    wrappers = {
        "repan_repvgg_a0": ["epoch", "model_state"],
        "dbb_resnet18": ["epoch", "state_dict"],
    }
    for arch, keys in wrappers.items():
        assert list(official.export(tiny(arch), arch)) == keys
    assert "stage0.rbr_dense.conv.weight" in official.export(tiny("repvgg_a0"), "repvgg_a0")


class Settings(dict):
    """As files of the Swin-derived scripts hold it; it is not installed where they are read."""

    __module__, __qualname__ = "yacs.config", "CfgNode"


class Harmful:
    def __reduce__(self):
        return print, ("executed",)


@torch.no_grad()
def test_settings_beside_the_tensors_are_data(tiny, tmp_path, monkeypatch, capsys):
    model = tiny("repopt_vgg_b1")
    out = official.export(model, "repopt_vgg_b1")
    out |= {"config": Settings(lr=Settings(base=0.1)), "args": Namespace(epochs=3)}
    module = ModuleType("yacs.config")
    module.CfgNode = Settings
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "yacs", ModuleType("yacs"))
        patch.setitem(sys.modules, "yacs.config", module)
        torch.save(out, tmp_path / "ckpt.pth")
    again = official.load_model(tmp_path / "ckpt.pth", "repopt_vgg_b1").eval()
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(again(x), model(x))
    torch.save(out | {"config": Harmful()}, tmp_path / "harmful.pth")
    with pytest.raises(ValueError, match=r"harmful\.pth cannot be read as a checkpoint"):
        official.load_model(tmp_path / "harmful.pth", "repopt_vgg_b1")
    assert capsys.readouterr().out == ""


def test_every_row_names_what_exists():
    for layout in ARCHITECTURES.values():
        assert set(layout.sources.values()) <= set(official.SOURCES)
        assert set(layout.sources) <= {*BLOCKS, "repmlp"}


def test_what_does_not_fit_is_told_in_one_line(tiny):
    arch = "orepa_resnet18"
    state = dict(official.export(tiny(arch), arch)["state_dict"])
    state["surprise"] = state.pop("stage1.0.conv1.vector")
    state["stage1.0.conv2.bn.bias"] = torch.zeros(3)
    with pytest.raises(ValueError) as error:
        official.load_model({"state_dict": state}, arch)
    assert str(error.value).count("\n") == 0
    for part in (
        "missing: stage1.0.conv1.vector",
        "unexpected: surprise",
        "of another shape: stage1.0.conv2.bn.bias (3,) instead of (8,)",
    ):
        assert part in str(error.value)


def test_a_half_deployed_block_is_damaged(tiny):
    """A file that has both forms of a block, or neither, is not guessed at."""
    model = tiny("repvgg_a0")
    state, conv = official.export(model, "repvgg_a0"), model.stage0.block.deploy()
    both = state | {"stage0.rbr_reparam.weight": conv.weight, "stage0.rbr_reparam.bias": conv.bias}
    with pytest.raises(ValueError, match=r"unexpected: stage0.rbr_reparam.weight, stage0"):
        official.load_model(both, "repvgg_a0")
    gone = {key: value for key, value in state.items() if not key.startswith("stage0.")}
    with pytest.raises(ValueError, match=r"missing: stage0.rbr_dense.conv.weight, stage0"):
        official.load_model(gone, "repvgg_a0")


def test_a_network_of_another_architecture_is_not_exported(tiny):
    with pytest.raises(ValueError, match=r"unexpected: stage0.rbr_identity|missing: |instead of"):
        official.export(tiny("repvgg_a0"), "repvgg_b1")
    with pytest.raises(ValueError, match=r"no repan_repvgg_a0: it has no fc.weight"):
        official.export(tiny("repvgg_a0"), "repan_repvgg_a0")
    with pytest.raises(ValueError, match="is a RepVGG; the layout has OREPARepVGG only"):
        official.export(tiny("repvgg_a0"), "orepa_repvgg_a0")


@torch.no_grad()
def test_deployed_files_of_repvggplus_have_no_auxiliary_classifiers(tiny):
    model = tiny("repvggplus_l2pse")
    x = torch.randn(2, 3, 64, 64)
    names = {"main", "stage1", "stage2", "stage3_first"}
    assert set(model.train()(x)) == names
    model = deployed_copy(model.eval())
    state = official.export(model, "repvggplus_l2pse")
    bare = {key: value for key, value in state.items() if "_aux" not in key}
    again = official.load_model(bare, "repvggplus_l2pse").eval()
    assert torch.equal(again(x), model(x))
    assert isinstance(again.train()(x), torch.Tensor)
    assert set(official.export(again, "repvggplus_l2pse")) == set(bare)


@pytest.mark.parametrize("arch", ["dyrep_vgg16", "dyrep_repvgg_b1"])
@torch.no_grad()
def test_blocks_that_dyrep_has_grown_are_read_from_the_file(arch, tiny):
    model = tiny(arch)
    if arch == "dyrep_vgg16":
        paths = ["features.conv0.conv", "features.conv3.conv"]
        conv = model.features.conv5.conv
        conv.bias = nn.Parameter(torch.randn(conv.out_channels))  # grown, and cut again
    else:
        paths = [f"{path}.block.branches.dense.0" for path in ("stage0", "stage2.1")]
    for path in paths:
        conv = model.get_submodule(path)
        space = {"stride": 2} if path.startswith("stage0") else {}
        shape = (conv.in_channels, conv.out_channels, 3)
        model.set_submodule(path, BLOCKS["dyrep"](*shape, **space))
    block = model.get_submodule(paths[1])
    size = block.geometry
    inner = BLOCKS["dyrep"](size.in_channels, size.out_channels, 3, branches=(1, 0, 0, 1, 1, 0, 0))
    block.branches["kxk"][0] = inner
    scrambled(model.eval())
    state = official.export(model, arch)["model"]
    assert any("dbb_kxk.conv.dbb_kxk.conv.bias" in key for key in state)
    again = official.load_model(state, arch).eval()
    x = torch.randn(2, 3, size_of(arch), size_of(arch))
    assert torch.equal(again(x), model(x))
    assert list(official.export(again, arch)["model"]) == list(state)


@pytest.mark.skipif(not VECTORS.is_dir(), reason=f"no official numbers in {VECTORS}")
@torch.no_grad()
def test_the_released_network_of_the_hyper_search(tiny):
    case = read("repopt-vgg-1-2-1-1")
    model = official.load_model({"model": under(case, "hs/")}, "repopt_vgg_b1_hs").eval()
    agree(model(case["x"]), case["hs_y_eval"], 2e-6)
    model = official.load_model(under(case, "target_before/"), "repopt_vgg_b1")
    assert sum(p.numel() for p in model.parameters()) == sum(
        value.numel()
        for key, value in under(case, "target_before/").items()
        if not key.endswith(("running_mean", "running_var", "num_batches_tracked"))
    )
