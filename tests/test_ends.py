"""Families with their norms elsewhere, other scales, and branches left out: the same promises."""

import copy
from collections import Counter

import pytest
import test_blocks
import torch
import torch.nn.functional as F
from test_blocks import close, scrambled
from torch import nn

from replib import official
from replib.blocks import BLOCKS, RepBlock
from replib.branches import Norm, Scalar, Scale, Sum
from replib.checkpoint import load_model, save_model
from replib.models import build
from replib.report.page import Page
from replib.report.results import Results
from replib.training.optimisation import parameter_groups

torch.set_num_threads(1)
VARIANTS = {
    "dbb, one norm": ("dbb", "plain", {"norms": "sum"}),
    "dbb, linearized": ("dbb", "grouped", {"norms": "sum", "scaling": "channel"}),
    "repvgg, one factor each": ("repvgg", "plain", {"norms": "sum", "scaling": "scalar"}),
    "mobileone, one norm": ("mobileone", "strided", {"norms": "sum"}),
    "orepa, one factor each": ("orepa", "strided", {"scaling": "scalar"}),
    "orepa, no factors": ("orepa", "grouped", {"scaling": "none"}),
    "orepa, branch norms": ("orepa", "rectangular", {"norms": "branches"}),
    "orepa, some branches": ("orepa", "plain", {"without": ["prior", "separable"]}),
    "orepa_1x1, branch norms": ("orepa_1x1", "kernel 1", {"norms": "branches"}),
    "orepa_stem, branch norms": ("orepa_stem", "kernel 5", {"norms": "branches"}),
    "orepa_stem, one factor each": ("orepa_stem", "kernel 5", {"scaling": "scalar"}),
    "orepa_repvgg, linearized": ("orepa_repvgg", "plain", {"norms": "sum", "scaling": "channel"}),
    "csla, branch norms": ("csla", "plain", {"norms": "branches"}),
    "qarepvgg, branch norms": ("qarepvgg", "plain", {"norms": "branches"}),
}


@pytest.fixture(params=VARIANTS)
def variant(request, monkeypatch):
    """(a name that BLOCKS has for the duration of the test, a geometry of test_blocks)."""
    family, case, options = VARIANTS[request.param]

    class Variant(BLOCKS[family]):
        def __init__(self, *shape, **arguments):
            super().__init__(*shape, **options | arguments)

    monkeypatch.setitem(BLOCKS, "variant", Variant)
    return "variant", case


def test_a_variant_keeps_the_promises_of_a_block(variant):
    test_blocks.test_the_merged_kernel_computes_the_block(*variant)
    test_blocks.test_deployment_is_one_plain_convolution(*variant)
    if BLOCKS["variant"].main_name != "layers":  # a factorised kernel cannot be inverted
        test_blocks.test_restoring_reaches_any_kernel(*variant)
        test_blocks.test_matched_statistics_keep_the_training_output_too(*variant)


def test_a_variant_trains_as_its_branches_do_one_by_one(variant):
    """Its fast form, squeezed or shared, against the sum of its branches: output and gradients."""
    block, x = test_blocks.build(*variant)
    plain = copy.deepcopy(block.train())
    plain.shared = False
    for part in plain.modules():
        if isinstance(part, Sum):
            part.squeezed = False
    for form in (block, plain):
        form(x).square().sum().backward()
    assert all(p.grad is not None for p in plain.parameters())
    for ours, theirs in zip(block.parameters(), plain.parameters(), strict=True):
        close(ours.grad, theirs.grad, 1e-9)  # squared outputs: sums of large numbers
    close(block(x), plain(x))


def norms_and_scales(family, *arguments, **options):
    """Where norms and scales stand in a block, by path."""
    block = BLOCKS[family](*arguments, **options)
    return {
        path: type(part).__name__
        for path, part in block.named_modules()
        if isinstance(part, Norm | Scale)
    }


def test_where_norms_and_scales_stand():
    branches = ("origin", "1x1", "avg", "1x1_kxk")
    assert norms_and_scales("dbb", 4, 6, norms="sum") == {"post_norm": "Norm"}
    linearized = norms_and_scales("dbb", 4, 6, norms="sum", scaling="channel")
    assert set(linearized.values()) == {"Scale", "Norm"}
    assert {path.split(".")[1] for path in linearized if path != "post_norm"} == {*branches}
    assert len(linearized) == 1 + len(branches)  # those inside a branch are gone
    assert norms_and_scales("orepa", 4, 6, scaling="none") == {"post_norm": "Norm"}
    assert norms_and_scales("orepa", 4, 6, scaling="none", norms="none") == {}
    own = norms_and_scales("orepa", 4, 6, norms="branches")
    assert set(own.values()) == {"Norm"} and len(own) == 6 and "post_norm" not in own
    one = norms_and_scales("orepa", 4, 6, norms="none", scaling="scalar")
    assert set(one.values()) == {"Scalar"} and len(one) == 6
    identity = norms_and_scales("repvgg", 4, 4, norms="sum", scaling="channel")
    assert identity["branches.identity"] == "Scale"


def test_factors_start_where_those_of_the_family_do():
    scalars = BLOCKS["orepa"](4, 6, scaling="scalar").branches.items()
    assert {name: chain[-1].value.item() for name, chain in scalars} == {
        "origin": 0.25, "avg": 0.25, "prior": 0.0, "1x1_kxk": 0.5, "1x1": 1.0, "separable": 0.5,
    }  # fmt: skip
    taken = BLOCKS["dbb"](4, 6, norms="sum", scaling="scalar")
    assert {p.value.item() for p in taken.modules() if isinstance(p, Scalar)} == {1.0}
    constant = BLOCKS["csla"](4, 4, trainable_scales=False, initial=2.0, scaling="scalar")
    assert constant.branches["conv"][1].value.item() == 2.0
    assert not constant.branches["conv"][1].value.requires_grad


def test_one_factor_is_the_same_factor_for_every_channel():
    """Against a block with a factor per channel, all equal: output, and the sum of gradients."""
    torch.manual_seed(0)
    one = BLOCKS["orepa"](4, 6, scaling="scalar").double()
    torch.manual_seed(0)
    each = BLOCKS["orepa"](4, 6).double()
    x = torch.randn(3, 4, 7, 8, dtype=torch.float64)
    with torch.no_grad():
        for i, (ours, theirs) in enumerate(
            zip(one.branches.values(), each.branches.values(), strict=True)
        ):
            ours[-1].value.fill_(0.3 + i)
            theirs[-1].weight.fill_(0.3 + i)
    for block in (one, each):
        block(x).pow(3).sum().backward()
    close(one(x), each(x))
    for ours, theirs in zip(one.branches.values(), each.branches.values(), strict=True):
        close(ours[-1].value.grad, theirs[-1].weight.grad.sum(), 1e-10)


def test_branch_norms_are_one_for_each_branch():
    """Against the branches as torch's own operations, in train mode."""
    torch.manual_seed(0)
    block = scrambled(BLOCKS["orepa"](4, 6, norms="branches", without=["prior"]).double())
    x = torch.randn(3, 4, 7, 8, dtype=torch.float64)

    def weights(name):
        return [p.weight for p in block.branches[name][:-1] if isinstance(p.weight, nn.Parameter)]

    def conv(x, weight, **options):
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2, **options)

    deep = conv(x, block.branches["1x1_kxk"][0].effective_weight())
    wide = conv(x, weights("separable")[0], groups=4)
    outputs = {
        "origin": conv(x, *weights("origin")),
        "avg": F.avg_pool2d(conv(x, *weights("avg")), 3, 1, 1),
        "1x1_kxk": conv(deep, weights("1x1_kxk")[1]),
        "1x1": conv(x, *weights("1x1")),
        "separable": conv(wide, weights("separable")[1]),
    }
    assert outputs.keys() == block.branches.keys()
    expected = 0
    for name, y in outputs.items():
        norm = block.branches[name][-1].norm
        expected = expected + F.batch_norm(y, None, None, norm.weight, norm.bias, True)
    close(block.train()(x), expected)


def test_no_layer_of_a_stem_is_squeezed_behind_norms():
    """A squeezed sum would fold the running statistics, in train mode too."""
    block = scrambled(BLOCKS["orepa_stem"](3, 4, 5, padding=0, norms="branches").double())
    x = torch.randn(3, 3, 9, 9, dtype=torch.float64)
    before = block.train()(x)
    for layer in block.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.add_(1)
    close(block(x), before)


@torch.no_grad()
def test_without_any_norm_a_block_is_linear():
    block = scrambled(BLOCKS["orepa"](4, 6, norms="none").double())
    x = torch.randn(3, 4, 7, 8, dtype=torch.float64)
    close(block(3 * x), 3 * block(x))
    assert (block.merged().bias == 0).all()
    target = test_blocks.like(block.merged())
    target.bias.zero_()
    block.restore(target, "preserving")
    close(block.merged().weight, target.weight)
    target.bias.fill_(1)
    with pytest.raises(ValueError, match="without bias, and without a norm, cannot take a bias"):
        block.restore(target, "preserving")


def test_what_is_left_out_changes_no_other_number():
    """Seeds stay paired: the branches that are left are drawn as in the whole block."""

    def drawn(**options):
        torch.manual_seed(0)
        return BLOCKS["orepa"](4, 6, **options).state_dict(), torch.rand(1)

    whole, after = drawn()
    for options in ({"without": ["prior", "1x1"]}, {"norms": "branches"}, {"scaling": "scalar"}):
        part, then = drawn(**options)
        assert torch.equal(then, after)
        shared = [name for name in part if name in whole and "norm" not in name]
        assert len(shared) >= 5 and all(torch.equal(part[n], whole[n]) for n in shared)
    left = BLOCKS["orepa"](4, 6, without=["prior", "1x1"]).branches
    assert list(left) == ["origin", "avg", "1x1_kxk", "separable"]


def test_what_a_shape_has_not_may_be_left_out():
    assert list(BLOCKS["repvgg"](4, 8, stride=2, without=["identity"]).branches) == ["dense", "1x1"]
    assert list(BLOCKS["repvgg"](4, 4, without=["identity", "1x1"]).branches) == ["dense"]
    inside = BLOCKS["orepa_repvgg"](4, 4, without=["prior", "identity"])
    assert "prior" not in inside.branches["dense"][0].branches
    assert "separable" in inside.branches["dense"][0].branches


@pytest.mark.parametrize(
    "family, options, message",
    [
        ("orepa", {"norms": "batch"}, r"norms \(='batch'\) must be one of branches, sum, none"),
        ("orepa", {"scaling": "vector"}, r"scaling \(='vector'\) must be one of channel, scalar"),
        ("dbb", {"scaling": "scalar"}, r"scaling \(='scalar'\) is for .*norms='sum'"),
        ("orepa", {"scaling": "scalar", "norms": "branches"}, r"scaling \(='scalar'\) is for "),
        ("dbb", {"without": ["pool"]}, r"without \(=\['pool'\]\): 'pool' .*: 1x1, 1x1_kxk, avg\."),
        ("dbb", {"without": ["origin"]}, r"'origin' must be a side branch"),
        ("convbn", {"without": ["1x1"]}, r"'1x1' must be a side branch: there is none"),
    ],
)
def test_options_that_make_no_sense_are_told(family, options, message):
    with pytest.raises(ValueError, match=message) as error:
        BLOCKS[family](4, 4, **options)
    assert "\n" not in str(error.value)


def test_factors_decay_as_those_of_the_family():
    """OREPA's rule spares biases and norms; one factor decays as a factor per channel does."""
    for options in ({}, {"scaling": "scalar"}):
        block = BLOCKS["orepa"](4, 6, **options)
        scales = {m.parameter for m in block.modules() if isinstance(m, Scale)}
        for rule, decays in (("not_norms", True), ("matrices", False)):
            groups = parameter_groups(block, 1.0, rule)
            found = {p for group in groups if group["weight_decay"] for p in group["params"]}
            assert len(scales) == 6 and (scales <= found) == decays


def test_a_file_knows_its_variant(tmp_path):
    block = scrambled(BLOCKS["orepa"](4, 6, scaling="scalar", norms="none", without=["prior"]))
    with torch.no_grad():
        block.branches["avg"][-1].value.fill_(0.7)
    save_model(nn.Sequential(block), tmp_path / "variant.safetensors")
    again, x = load_model(tmp_path / "variant.safetensors"), torch.randn(2, 4, 7, 7)
    assert repr(again[0]) == repr(block) and torch.equal(again[0](x), block(x))


@pytest.mark.parametrize("options", [{"scaling": "scalar"}, {"without": ["prior"]}])
def test_a_released_layout_has_no_variants(options):
    block = BLOCKS["orepa"](4, 6, **options)
    with pytest.raises(ValueError, match="the model is of another layout: it has no branches"):
        official.export_block(block, "orepa")


# -- in a network ----------------------------------------------------------------------------------
def made_of(body, block, **options):
    """How many blocks of which family and kernel size a narrow network has."""
    with torch.device("meta"):
        model = build(body, block, classes=7, in_channels=3, width=0.125, **options)
    found = [block for block in model.modules() if isinstance(block, RepBlock)]
    return model, Counter((type(b).__name__, max(b.geometry.kernel_size)) for b in found)


def test_options_reach_every_block_of_a_family_and_no_plain_convolution():
    model, found = made_of("resnet50", "orepa", block_options={"norms": "none"})
    assert found == {("OREPAStem", 7): 1, ("OREPA", 3): 16, ("OREPA1x1", 1): 36}
    assert not any(isinstance(part, Norm) for part in model.modules())
    model, found = made_of("resnet18", "orepa", block_options={"norms": "none"})
    assert found == {("OREPAStem", 7): 1, ("OREPA", 3): 16, ("ConvBN", 1): 3}
    assert sum(isinstance(part, Norm) for part in model.modules()) == 3  # the plain shortcuts'
    model, _ = made_of("resnet18", "orepa", block_options={"scaling": "scalar"})
    assert {type(part) for part in model.modules() if isinstance(part, Scale)} == {Scalar}


def test_components_are_added_one_at_a_time():
    """The rows of OREPA's ablation: which branches, and which sizes stay plain."""
    few = {"without": ["prior", "separable"]}
    model, found = made_of("resnet50", "orepa", block_options=few, plain_sizes=[1, 7])
    assert found == {("ConvBN", 7): 1, ("OREPA", 3): 16, ("ConvBN", 1): 36}
    branches = {tuple(m.branches) for m in model.modules() if isinstance(m, BLOCKS["orepa"])}
    assert branches == {("origin", "avg", "1x1_kxk", "1x1")}
    _, found = made_of("resnet50", "orepa", plain_sizes=[7])
    assert found == {("ConvBN", 7): 1, ("OREPA", 3): 16, ("OREPA1x1", 1): 36}
    _, found = made_of("resnet50", "orepa", block_options=few)  # 1x1 blocks have no such branches
    assert found == {("OREPAStem", 7): 1, ("OREPA", 3): 16, ("OREPA1x1", 1): 36}
    _, found = made_of("cifar_repvgg_a1", "repvgg", plain_sizes=[3])  # it has options of its own
    assert found == {("ConvBN", 3): 22}
    with pytest.raises(ValueError, match=r"plain_sizes \(=\[2, 7\]\): resnet18 has no conv.* of 2"):
        made_of("resnet18", "orepa", plain_sizes=[7, 2])


WILD = """
title: t
question: q
control: calm
seeds: [0]
cell: {data: digits, train_images: 60, held_out: 20, body: digits, block: orepa, epochs: 3,
       batch_size: 20, learning_rate: 0.01}
rows:
  calm: {label: Calm}
  wild: {label: Wild <&, set: {block_options: {norms: none}, learning_rate: 50.0}}
"""


def test_a_run_that_diverges_is_finished_and_told(project, in_process):
    """Its evidence can be read, its accuracy is that of a network, and the page says when."""
    project.table("wild", WILD)
    results = Results("wild", "tiny")
    assert results.train(device="cpu").trained == 2
    (epoch,) = results.diverged("wild").values()
    losses = results.evidence("wild")[0]["result"]["history"]["train_loss"]
    assert losses[epoch - 1] is None and None not in losses[: epoch - 1]
    assert results.diverged("calm") == {} and 0 <= results.accuracy("wild").mean <= 100
    said = Page("wild", "tiny").said().data
    assert (
        f"Wild &lt;&amp;: diverged, the training loss is no number (seed 0 in epoch {epoch})"
        in said
    )
