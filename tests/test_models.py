"""Bodies: their parameter counts are those of the papers' codes, and they map images to classes.

On the meta device, where a network of any size costs no memory.
"""

import inspect
import subprocess
import sys

import pytest
import torch
from test_blocks import scrambled
from torch import nn

from replib import fuse
from replib.blocks import BLOCKS
from replib.blocks.repmlp import RepMLP
from replib.models import BODIES, build
from replib.models.layers import Residual, layer

torch.set_num_threads(1)
COUNTS = {  # (body, block, classes): parameters in training, and deployed; spec/*.md
    ("cifar_repvgg_a0", "repvgg", 10): (418_122, 372_690),
    ("cifar_repvgg_b3", "repvgg", 10): (6_939_402, 6_228_618),
    ("cifar_vgg16", None, 10): (14_986_698, None),
    ("cifar_vgg16", None, 100): (15_032_868, None),
    ("cifar_quick", "convbn", 10): (117_034, 116_906),  # by hand, as the next three
    ("projected_resnet56", "convbn", 10): (855_770, 853_642),
    ("wide_resnet16_8", "convbn", 10): (10_961_370 + 2 * (16 + 128 + 256), None),
    ("densenet40", "convbn", 10): (1_019_722, None),
    ("alexnet", "convbn", 1000): (61_100_840 + 1_152, 61_100_840),  # torchvision's, with norms
    ("repvgg_b0_with_relus", None, 1000): (15_817_960, None),
    ("repvgg_b0_residual", "convbn", 1000): (14_391_464, 14_384_552),
    ("cifar_resnet101", None, 100): (42_697_380, None),
    ("cifar_resnet110", None, 10): (1_727_962, None),
    ("resnet18", "convbn", 1000): (11_689_512, 11_684_712),
    ("resnet34", "convbn", 1000): (21_797_672, 21_789_160),
    ("resnet50", "convbn", 1000): (25_557_032, 25_530_472),
    ("resnet101", "convbn", 1000): (44_549_160, 44_496_488),
    ("wide_resnet18_2", "convbn", 1000): (45_693_032, 45_683_432),
    ("resnext50_32x4d", "convbn", 1000): (25_028_904, 24_994_792),
    ("resnet18", "dbb", 1000): (26_288_296, 11_684_712),
    ("resnet50", "dbb", 1000): (40_684_456, 25_530_472),
    ("resnet34", "orepa", 1000): (71_722_121, 21_789_160),
    ("resnet101", "orepa", 1000): (122_492_553, 44_496_488),
    ("resnext50_32x4d", "orepa", 1000): (63_711_625, 24_994_792),
    ("mobilenet_v1", "convbn", 1000): (4_231_976, 4_221_032),
    ("mobilenet_v1", "dbb", 1000): (4_372_183, 4_221_032),
    ("repvgg_a0", "repvgg", 1000): (9_108_968, 8_309_384),
    ("repvgg_b2g4", "repvgg", 1000): (61_758_376, 55_777_512),
    ("repvgg_d2se", "repvgg", 1000): (133_334_836, 120_387_572),
    ("repvggplus_l2pse", "repvgg", 1000): (146_062_864, None),
    ("repopt_vgg_b1", "convbn", 1000): (51_841_832, 51_829_480),
    ("repopt_vgg_l2", "csla", 100): (128_731_396, None),
    ("mobileone_s0", "mobileone", 1000): (5_293_272, 2_078_504),
    ("mobileone_s4", "mobileone", 1000): (14_951_248, 14_838_352),
    ("replknet_31b", "replk", 1000): (79_864_168, None),
    ("replknet_xl", "replk", 1000): (335_435_752, None),
    ("repmlpnet_t224", None, 1000): (38_293_608, None),
    ("repmlpnet_l256", None, 1000): (117_641_560, None),
}
QUICK = 30e6  # parameters; larger ones are counted in the slow tier


def made(body: str, block: str | None, classes: int) -> nn.Module:
    takes_block = "block" in inspect.signature(BODIES[body]).parameters
    with torch.device("meta"):
        return BODIES[body](classes=classes, **({"block": block} if takes_block else {}))


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def counted():
    for case, (training, deployed) in COUNTS.items():
        marks = [pytest.mark.slow] if training > QUICK else []
        yield pytest.param(*case, training, deployed, marks=marks, id="-".join(map(str, case)))


@pytest.mark.parametrize("body, block, classes, training, deployed", list(counted()))
def test_a_body_has_as_many_parameters_as_the_released_one(
    body, block, classes, training, deployed
):
    model = made(body, block, classes)
    assert size(model) == training
    if deployed is not None:
        assert size(fuse(model.eval())) == deployed


SMALL = ["digits", "cifar_repvgg_a1_half", "cifar_resnet18", "cifar_resnet56", "cifar_vgg16"]
SMALL += [
    "repopt_ghostnet_050",
    "resnet18",
    "mobilenet_v1",
    "mobileone_s0",
    "mobileone_s4",
    "repvgg_a0",
]
SMALL += ["cifar_quick", "densenet40", "repvgg_b0_with_relus", "repvgg_b0_residual", "alexnet"]
ALSO = ["projected_resnet56", "wide_resnet16_8", "alexnet_with_11"]
ALSO += ["resnext50_32x4d", "wide_resnet18_2", "repvgg_b1g4", "replknet_31b", "repmlpnet_t224"]


@pytest.mark.parametrize(
    "body", [*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in ALSO)]
)
@torch.no_grad()
def test_images_go_in_and_classes_come_out(body):
    torch.manual_seed(0)
    pixels = {"repmlpnet_t224": 224, "digits": 8}.get(body, 63 if "alexnet" in body else 32)
    channels = 1 if body == "digits" else 2
    model = BODIES[body](classes=7, in_channels=channels)
    x = torch.randn(2, channels, pixels, pixels)
    assert model(x).shape == (2, 7)
    model, x = scrambled(model.eval()).double(), x.double()
    expected, deployed = model(x), fuse(model)
    assert not any(type(module) in BLOCKS.values() for module in deployed.modules())
    # Float64, up to fifty layers, whose gates may amplify: 1e-9 of the largest logit.
    error = (deployed(x) - expected).abs().max() / expected.abs().max()
    assert error < 1e-9


@pytest.mark.parametrize("block", ["dbb", "acb", "rep", "repvgg", "orepa", "mobileone", "convbn"])
@pytest.mark.parametrize("body", ["resnet18", "mobilenet_v1", "mobileone_s0", "repvgg_a0"])
def test_a_body_takes_any_family(body, block):
    with torch.device("meta"):
        model = build(body, block, classes=7, in_channels=3)
    assert any(isinstance(module, BLOCKS[block]) for module in model.modules())


@pytest.mark.parametrize(
    "body",
    [
        "cifar_repvgg_b1",
        "cifar_resnet18",
        "resnet50",
        "wide_resnet18_2",
        "mobilenet_v1",
        "repvgg_a1",
        "cifar_vgg16",
        "cifar_quick",
        "projected_resnet56",
        "wide_resnet16_8",
        "densenet40",
        "alexnet",
        "repvgg_b0_residual",
        "replknet_31b",
    ],
)
def test_width_multiplies_all_widths(body):
    def widths(model):
        return [m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d)]

    with torch.device("meta"):
        whole = widths(BODIES[body](classes=7))
        half = widths(build(body, "convbn", classes=7, in_channels=3, width=0.5))
        named = widths(build(body, "convbn", classes=7, in_channels=3))
    if body not in ("cifar_repvgg_b1", "repvgg_a1", "replknet_31b"):  # others are plain by default
        assert named == whole
    assert half == [channels // 2 for channels in named]


def test_a_fixed_width_is_said():
    with pytest.raises(ValueError, match=r"width \(=0.5\).*cifar_resnet56"):
        build("cifar_resnet56", "convbn", classes=7, in_channels=3, width=0.5)


def with_options(body, classes=1000, **options):
    with torch.device("meta"):
        return build(body, "convbn", classes=classes, in_channels=3, body_options=options)


def test_the_original_resmlp_has_as_many_parameters():
    assert size(with_options("resmlp12", window=14, patch=16)) == 15_350_872  # timm's


def test_convolutions_beside_dense_maps_add_what_the_paper_says():
    """RepMLPNet, table 4: 60, 156 for ResMLP-12, whose dense maps get norms; 720, 2640."""
    bodies = {"resmlp12": (60, 156, 192), "cifar_repmlpnet": (720, 2640, 3360)}
    for body, added in bodies.items():
        plain = size(with_options(body, 100, sizes=()))
        found = [size(with_options(body, 100, sizes=s)) - plain for s in ((1,), (3,), (1, 3))]
        assert tuple(found) == added
    assert size(with_options("resmlp12", 100)) == size(with_options("resmlp12", 100, sizes=()))


@pytest.mark.parametrize(
    "sets, gated, millions",
    [
        ((1, 4, 16, 128), False, 37.8),
        ((1, 4, 16, 128), True, 38.3),
        pytest.param((2, 8, 32, 256), False, 66.7, marks=pytest.mark.slow),
        pytest.param((2, 8, 32, 256), True, 67.2, marks=pytest.mark.slow),
    ],
)
def test_sets_and_gate_of_repmlpnet_are_counted_as_in_its_table_3(sets, gated, millions):
    model = with_options("repmlpnet_t224", sets=sets, gated=gated)
    # The paper cuts at the first decimal: these are 37.83, 38.32, 66.77 and 67.25 million.
    assert size(fuse(model.eval())) // 100_000 / 10 == millions


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(
    "body, block, options, pixels",
    [
        ("cifar_repmlpnet", "convbn", {}, 32),
        ("repmlpnet_t224", "convbn", {"window": 8, "sets": (1, 2, 8, 64), "gated": False}, 32),
        ("resmlp12", "convbn", {"sizes": (1, 3)}, 32),
        ("resmlp12", "convbn", {}, 32),
        ("replknet_31b", "replk", {"sizes": (9, 7, 5, 3), "depths": (1, 1, 2, 1)}, 64),
    ],
    ids=str,
)
def test_narrow_bodies_train_and_deploy(body, block, options, pixels):
    torch.manual_seed(0)
    shape = {"classes": 7, "in_channels": 2, "width": 0.25}
    model = build(body, block, body_options=options, **shape).double()
    model.to(memory_format=torch.channels_last)
    x = torch.randn(4, 2, pixels, pixels, dtype=torch.float64)
    x = x.contiguous(memory_format=torch.channels_last)
    with torch.enable_grad():
        model.train()(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model = scrambled(model.eval())
    deployed, expected = fuse(model), model(x)
    assert not any(isinstance(m, (RepMLP, *BLOCKS.values())) for m in deployed.modules())
    assert (deployed(x) - expected).abs().max() / expected.abs().max() < 1e-9


@pytest.mark.parametrize(
    "body, options, said",
    [
        ("repmlpnet_t224", {"sets": (1, 2)}, r"sets \(=\[1, 2\]\) must be 4 numbers"),
        ("repmlpnet_t224", {"window": 12}, r"window \(=12\) must be divisible by 8"),
        ("repmlpnet_t224", {"groups": 2}, "no option 'groups'; its options: window, sets, sizes"),
        ("replknet_31b", {"sizes": (31,)}, r"sizes \(=\[31\]\) must be 4 numbers"),
        ("replknet_31b", {"sizes": (8, 7, 5, 3)}, "must be odd: 8 has no centre"),
        ("cifar_resnet56", {"depth": 3}, "has no option 'depth'; its options: none"),
    ],
)
def test_options_that_a_body_cannot_take(body, options, said):
    with pytest.raises(ValueError, match=said):
        with_options(body, **options)


@pytest.mark.parametrize("side", [8, 16, 32])
def test_vgg_takes_small_images(side):
    with torch.device("meta"):
        model = build("cifar_vgg16", "dbb", classes=7, in_channels=1, width=0.125)
        assert model(torch.empty(2, 1, side, side)).shape == (2, 7)


def test_which_layers_of_alexnet_become_blocks():
    for body, families in (("alexnet", {1: "ConvBN", 4: "ACB"}), ("alexnet_with_11", {5: "ACB"})):
        model = made(body, "acb", 10)
        found = [type(m).__name__ for m in model.modules() if type(m) in BLOCKS.values()]
        assert {found.count(name): name for name in set(found)} == families


def test_a_network_of_preactivations_has_a_norm_behind_blocks_only():
    plain, blocks = (made("wide_resnet16_8", block, 10) for block in ("convbn", "acb"))
    bare = [m for m in plain.modules() if isinstance(m, BLOCKS["convbn"])]
    assert len(bare) == 15 and all(len(block.branches["conv"]) == 1 for block in bare)
    assert len([m for m in blocks.modules() if isinstance(m, BLOCKS["acb"])]) == 12


def test_where_a_resnet_is_reparameterized():
    """DBB: 3x3 only. OREPA: everything but the shortcuts of basic blocks."""
    for body, block, families in (
        ("resnet18", "dbb", {"ConvBN": 4, "DBB": 16}),
        ("resnet18", "orepa", {"OREPAStem": 1, "OREPA": 16, "ConvBN": 3}),
        ("resnet50", "orepa", {"OREPAStem": 1, "OREPA": 16, "OREPA1x1": 36}),
        ("cifar_resnet18", "dbb", {"ConvBN": 3, "DBB": 16}),
    ):
        model, found = made(body, block, 10), {}
        for module in model.modules():
            if type(module) in BLOCKS.values():
                found[type(module).__name__] = found.get(type(module).__name__, 0) + 1
        assert found == families


def test_groups_of_repvgg_are_on_every_second_layer():
    model = made("repvgg_b1g4", "repvgg", 10)
    groups = [m.geometry.groups for m in model.modules() if isinstance(m, BLOCKS["repvgg"])]
    assert groups == [1] + [1, 4] * 13 + [1]


def test_the_scales_of_the_hyper_search_start_as_published():
    torch.manual_seed(0)
    model = BODIES["repopt_vgg_b1"](classes=2, block="csla")
    first, second, third = (model.stage2[i].block.branches for i in (0, 1, 3))
    for branches, expected in ((first, 1.0), (second, 2**0.5), (third, (2 / 3) ** 0.5)):
        for name in ("conv", "1x1"):
            assert torch.allclose(branches[name][1].weight, torch.tensor(expected))
    assert torch.equal(second["identity"].weight, torch.ones(256))


def test_the_ghosts_of_the_search_have_an_identity_and_no_1x1():
    torch.manual_seed(0)
    model = BODIES["repopt_ghostnet_050"](classes=2, block="csla")
    blocks = [m for m in model.modules() if isinstance(m, BLOCKS["csla"])]
    assert len(blocks) == 32
    assert all(list(block.branches) == ["conv", "identity"] for block in blocks)
    starts = [block.branches["conv"][1].weight[0].item() for block in blocks[:6]]
    one, two, three, four = 1.0, (2 / 3) ** 0.5, 0.5**0.5, (2 / 5) ** 0.5
    # The first residual keeps 8 channels at stride 1; the third is the second of its stage.
    assert starts == pytest.approx([one, two, one, two, three, four])


@torch.no_grad()
def test_fusing_puts_the_convolutions_of_repmlp_into_its_dense_map():
    torch.manual_seed(0)
    block = scrambled(RepMLP(8, 4, 5, sets=2).eval()).double()
    fused, x = fuse(nn.Sequential(block).eval()), torch.randn(2, 8, 8, 5, dtype=torch.float64)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    assert (fused(x) - block(x)).abs().max() < 1e-12


def test_a_residual_is_left_out_for_a_share_of_the_images():
    torch.manual_seed(0)
    module, x = Residual(nn.Identity(), drop=0.25).train(), torch.ones(4000, 1, 1, 1)
    out = module(x).flatten()
    assert {round(value, 4) for value in out.tolist()} == {1.0, round(1 + 4 / 3, 4)}
    assert abs((out > 1).float().mean() - 0.75) < 0.03
    assert torch.equal(module.eval()(x), 2 * x)


def test_a_layer_orders_its_parts():
    names = [name for name, _ in layer("rep", 8, 8, se=4, post_se=2).named_children()]
    assert names == ["block", "se", "act", "post_se"]
    assert [name for name, _ in layer(None, 8, 8, activation=None).named_children()] == [
        "conv",
        "norm",
    ]


def test_names_that_do_not_exist():
    with pytest.raises(ValueError, match=r"body \(='vgg'\) must be one of cifar_repvgg_a0, "):
        build("vgg", "dbb", classes=10, in_channels=3)
    with pytest.raises(ValueError, match=r"block \(='dbc'\) must be one of repvgg, acb, "):
        build("resnet18", "dbc", classes=10, in_channels=3)


def test_importing_replib_does_not_import_torchvision():
    code = "import sys, replib; sys.exit('torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
