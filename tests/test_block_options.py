"""Options of blocks in whole networks and in tables, and the variants that tables need."""

import math

import pytest
import test_blocks
import torch
from conftest import ROOT
from test_blocks import close, scrambled
from torch import nn

from replib.blocks import BLOCKS
from replib.checkpoint import load_model, save_model
from replib.experiments.cells import forward_flops, key_of, new_model, training_parameters
from replib.experiments.params import Cell, built, load_table
from replib.models import build
from replib.models.layers import Family
from replib.models.resnet import of_size
from replib.networks import branch_by_branch

torch.set_num_threads(1)
CELL = dict(data="digits", train_images=60, held_out=20, body="resnet18", block="dbb", width=0.125,
            epochs=1, batch_size=20, learning_rate=0.1, seed=0)  # fmt: skip


def blocks_of(model, family):
    return [module for module in model.modules() if type(module) is BLOCKS[family]]


def test_options_reach_every_block_of_a_network():
    model = new_model(Cell.model_validate(CELL | {"block_options": {"without": ["1x1", "avg"]}}))
    found = blocks_of(model, "dbb")
    assert len(found) == 16 and {*map(tuple, (b.branches for b in found))} == {
        ("origin", "1x1_kxk")
    }
    with torch.device("meta"):
        net = build("cifar_repvgg_a1", "repvgg", classes=10, in_channels=3,
                    block_options={"without": ["1x1"]})  # fmt: skip
    names = {tuple(block.branches) for block in blocks_of(net, "repvgg")}
    assert names == {
        ("dense",),
        ("dense", "identity"),
    }  # RepAn's own rule for the first still holds


def test_an_option_is_stronger_than_that_of_the_body():
    with torch.device("meta"):
        net = build("repopt_vgg_b1", "csla", classes=10, in_channels=3,
                    block_options={"initial": 0.5})  # fmt: skip
    assert {block.branches["conv"][1].initial for block in blocks_of(net, "csla")} == {0.5}


def test_a_family_that_stands_in_takes_the_options_that_it_has():
    wanted = Family("orepa", {"norms": "branches", "without": ["prior"]})
    assert of_size(wanted, 1) == Family("orepa_1x1", {"norms": "branches"})
    assert of_size(Family("dbb", {"norms": "sum"}), 7) == "convbn"
    lacking = Family("orepa_1x1", {"norms": "branches", "nothing": 1})
    assert lacking(4, 4, 1).post_norm is None, "an option it lacks is left out"


def test_the_key_of_a_cell_knows_its_options_and_older_keys_stay():
    plain, none, one = (
        Cell.model_validate(CELL | more)
        for more in ({}, {"block_options": None}, {"block_options": {"norms": "sum"}})
    )
    assert key_of(plain, "x") == key_of(none, "x") != key_of(one, "x")
    assert "block_options" not in plain.in_key and "views" not in plain.in_key
    flops = [forward_flops(cell.network, 10, (1, 16, 16)) for cell in (plain, one)]
    assert flops[0] == flops[1], "norms are no convolutions"
    fewer = Cell.model_validate(CELL | {"block_options": {"without": ["1x1_kxk"]}})
    assert forward_flops(fewer.network, 10, (1, 16, 16)) < flops[0]


# -- DBB, table 4 ----------------------------------------------------------------------------------
PAPER = {  # millions of numbers in training, those of running statistics with them
    "whole": 26.33, "without_1x1": 25.09, "without_1x1_kxk": 14.18, "without_avg": 25.08,
    "only_1x1": 12.93, "only_1x1_kxk": 23.84, "only_avg": 12.95, "base": 11.69,
    "drawn_as_dbb": 11.69, "double": 22.69, "triple": 33.70, "linear_1x1": 12.91,
    "linear_double": 22.68,
}  # fmt: skip


@pytest.fixture(scope="module")
def dbb_table4():
    return load_table(ROOT / "params" / "dbb-table4" / "imagenet.yaml")


@pytest.mark.parametrize("row", PAPER)
def test_dbb_table4_trains_as_many_numbers_as_the_paper_says(row, dbb_table4):
    cell = Cell.model_validate(dbb_table4.cell_of(row, 0))
    with torch.device("meta"):
        model = built(cell.network, classes=1000, in_channels=3)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    statistics = sum(2 * norm.num_features for norm in norms)
    trained = training_parameters(cell.network, 1000, 3)
    assert trained == sum(p.numel() for p in model.parameters())
    # The paper cuts or rounds at two digits, both occur.
    assert abs((trained + statistics) / 1e6 - PAPER[row]) < 0.0101


@torch.no_grad()
def test_a_plain_layer_may_start_as_a_merged_random_block():
    torch.manual_seed(3)
    layer = BLOCKS["convbn"](4, 6, 3, drawn_as="dbb", stride=2)
    torch.manual_seed(3)
    BLOCKS["convbn"](4, 6, 3, stride=2)  # draws what is then replaced
    merged = BLOCKS["dbb"](4, 6, 3, stride=2).eval().merged()
    assert torch.equal(layer.branches["conv"][0].weight, merged.weight)
    assert merged.bias.abs().max() == 0 and layer.deploy().stride == (2, 2)
    assert not torch.equal(layer.branches["conv"][0].weight, BLOCKS["convbn"](4, 6).merged().weight)
    with pytest.raises(ValueError, match=r"drawn_as \(='dbc'\) must be one of repvgg, acb"):
        BLOCKS["convbn"](4, 6, 3, drawn_as="dbc")


# -- ACNet, table 4 --------------------------------------------------------------------------------
@torch.no_grad()
def test_acnet_kernels_of_three_pixels_lie_on_the_centre_of_a_larger_one():
    block = scrambled(BLOCKS["acb"](2, 3, 11, stride=4, padding=2, reach=3).double().eval())
    assert [tuple(block.branches[f"axis{a}"][0].weight.shape[2:]) for a in (0, 1)] == [
        (3, 1),
        (1, 3),
    ]
    x = torch.randn(2, 2, 23, 26, dtype=torch.float64)
    close(block.deploy()(x), block(x))
    alone = block.branches["axis0"][0].weight
    block.branches["square"][0].weight.zero_()
    block.branches["axis1"][0].weight.zero_()
    weight = block.merged().weight
    assert weight[:, :, 4:7, 5].abs().min() > 0 and alone.abs().min() > 0
    weight[:, :, 4:7, 5] = 0
    assert weight.abs().max() == 0
    with pytest.raises(ValueError, match=r"reach \(=2\) must be odd"):
        BLOCKS["acb"](2, 3, reach=2)


@torch.no_grad()
def test_acnet_kernels_on_the_border_lie_in_the_last_row_and_column():
    block = scrambled(BLOCKS["acb"](3, 4, 3, stride=2, border=True).double().eval())
    for axis, place in (("axis0", (slice(None), 2)), ("axis1", (2, slice(None)))):
        branch, inside = block.branches[axis], torch.zeros(3, 3, dtype=torch.bool)
        inside[place] = True
        weight = block.in_own_form(branch.kernel()).weight
        line = branch[0].weight.flatten(2) * branch[2].affine()[0].view(-1, 1, 1)
        torch.testing.assert_close(weight[..., inside], line, rtol=0, atol=1e-12)
        assert weight[..., ~inside].abs().max() == 0
    x = torch.randn(2, 3, 7, 8, dtype=torch.float64)
    shared = block.train()(x)
    branch_by_branch(block)
    close(shared, block(x))


def test_acnet_slopes_start_where_they_are_told_and_come_back_there():
    block = BLOCKS["acb"](4, 4, slope=0.333)
    slopes = [branch[1].norm.weight for branch in block.branches.values()]
    assert all(torch.all(slope == 0.333) for slope in slopes)
    assert [branch[1].initial for branch in BLOCKS["acb"](4, 4).branches.values()] == [1.0] * 3
    for rule, expected in (("repan", [0.5, 1, 1]), ("default", [0.5, 0.333, 0.333])):
        for slope in slopes:
            nn.init.constant_(slope, 0.5)
        block.redraw(rule)
        assert all(torch.all(s == e) for s, e in zip(slopes, expected, strict=True)), rule


# -- RepVGG, tables 6 and 7 ------------------------------------------------------------------------
VARIANTS = {
    "identity without norm": ("repvgg", {"identity_norm": False}),
    "one norm behind the sum": ("repvgg", {"norms": "sum"}),
    "trivial": ("repvgg", {"norms": "sum", "without": ["1x1"]}),
    "short kernels": ("acb", {"reach": 1, "slope": 0.3}),
    "border kernels": ("acb", {"border": True}),
    "bare": ("convbn", {"norms": "none"}),
    "drawn": ("convbn", {"drawn_as": "acb"}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_keep_the_promises_of_a_block(name, monkeypatch, tmp_path):
    family, options = VARIANTS[name]

    class Variant(BLOCKS[family]):
        def __init__(self, *shape, **arguments):
            super().__init__(*shape, **options | arguments)

    with monkeypatch.context() as patch:
        patch.setitem(BLOCKS, "variant", Variant)
        for case in ("plain", "strided"):
            test_blocks.test_the_merged_kernel_computes_the_block("variant", case)
            test_blocks.test_deployment_is_one_plain_convolution("variant", case)
    block = scrambled(BLOCKS[family](4, 4, **options).eval())
    save_model(nn.Sequential(block), tmp_path / "variant.safetensors")
    again, x = load_model(tmp_path / "variant.safetensors"), torch.randn(2, 4, 7, 7)
    assert torch.equal(again(x), block(x))


def test_an_identity_without_norm_is_the_input():
    block, x = BLOCKS["repvgg"](4, 4, identity_norm=False), torch.randn(2, 4, 5, 5)
    assert torch.equal(block.branches["identity"](x), x)
    assert len([m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]) == 2
    strided = BLOCKS["repvgg"](4, 4, stride=2, identity_norm=False)
    assert list(strided.branches) == ["dense", "1x1"]


@torch.no_grad()
def test_the_trivial_variant_adds_the_identity_to_the_kernel():
    block = scrambled(BLOCKS["repvgg"](3, 3, norms="sum", without=["1x1"]).double().eval())
    weight = block.branches["dense"][0].weight.clone()
    for o in range(3):
        weight[o, o, 1, 1] += 1
    close(block.branches_kernel().weight, weight)


@torch.no_grad()
def test_dirac_is_the_identity_and_a_kernel_of_unit_length():
    block = scrambled(BLOCKS["dirac"](3, 3).double().eval())
    conv, b = block.branches["conv"]
    a = block.branches["identity"].weight
    a.copy_(torch.tensor([0.5, -1.0, 2.0]))
    b.weight.copy_(torch.tensor([0.1, 0.2, -0.3]))
    kernel = block.branches_kernel().weight
    for o in range(3):
        length = math.sqrt(sum(w**2 for w in conv.weight[o].flatten().tolist()))
        for i in range(3):
            for h in range(3):
                for w in range(3):
                    value = b.weight[o] * conv.weight[o, i, h, w] / length
                    value = value + (a[o] if (i, h, w) == (o, 1, 1) else 0)
                    assert abs(kernel[o, i, h, w] - value) < 1e-15
    fresh = BLOCKS["dirac"](4, 4)
    assert torch.all(fresh.branches["identity"].weight == 1)
    assert torch.all(fresh.branches["conv"][1].weight == 0.1)
    assert list(BLOCKS["dirac"](4, 8).branches) == ["conv"]


def test_dirac_kernels_do_not_change_with_the_length_of_the_weight():
    torch.manual_seed(0)
    block, x = BLOCKS["dirac"](4, 4).double(), torch.randn(2, 4, 5, 5, dtype=torch.float64)
    weight, before = block.branches["conv"][0].weight, block(x)
    before.square().sum().backward()
    along = (weight.grad * weight).sum((1, 2, 3))
    assert along.abs().max() < 1e-12 and weight.grad.abs().max() > 1e-6
    with torch.no_grad():
        weight.mul_(7)
    close(block(x), before)
