"""What each family starts from, and the options of its own."""

import math

import pytest
import torch

from replib.blocks import BLOCKS
from replib.branches import Convolution, Norm


def bound(weight):
    """The largest value in units of 1 / sqrt(fan-in)."""
    return weight.abs().max().item() * math.sqrt(math.prod(weight.shape[1:]))


def convolutions(family, *arguments, **options):
    torch.manual_seed(0)
    return [m for m in BLOCKS[family](*arguments, **options).modules() if type(m) is Convolution]


@pytest.mark.parametrize(
    "family, gain",
    [
        *[(f, 1.0) for f in ("repvgg", "acb", "dbb", "rep", "mobileone", "dyrep", "csla")],
        ("orepa", math.sqrt(6)),  # Kaiming
        ("orepa_stem", math.sqrt(6)),
        ("orepa_1x1", math.sqrt(3)),  # of variance 1 over the fan-in
    ],
)
def test_weights_start_as_released(family, gain):
    drawn = [c for c in convolutions(family, 24, 24) if not c.starts_as_identity]
    for convolution in drawn:
        assert 0.9 * gain < bound(convolution.weight) <= gain * 1.0001
    for fixed in set(convolutions(family, 24, 24)) - set(drawn):
        if fixed.starts_as_identity:
            x = torch.randn(1, 24, 5, 5)
            assert torch.equal(fixed(x), x)


def test_orepa_repvgg_draws_its_online_branch_smaller():
    block = BLOCKS["orepa_repvgg"](24, 24)
    assert 0.9 < bound(block.branches["dense"][0].branches["origin"][0].weight) / math.sqrt(3) <= 1
    assert 0.9 < bound(block.branches["1x1"][0].weight) <= 1
    assert "1x1" not in block.branches["dense"][0].branches  # it is outside, with a norm


def test_orepa_scales_start_as_released():
    scales = {name: chain[-1] for name, chain in BLOCKS["orepa"](4, 6).branches.items()}
    initial = {name: scale.weight.unique().tolist() for name, scale in scales.items()}
    assert initial == {
        "origin": [0.25],
        "avg": [0.25],
        "prior": [0.0],
        "1x1_kxk": [0.5],
        "1x1": [1.0],
        "separable": [0.5],
    }


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_the_frequency_prior_shares_its_filters_over_the_axes(dims):
    weight = BLOCKS["orepa"](2, 6, dims=dims).branches["prior"][1].weight[:, 0]
    per_axis = 6 // dims
    for o in range(6):
        axis, frequency = o // per_axis, o % per_axis + 1
        along = weight[o].movedim(axis, 0).reshape(3, -1)
        for h in range(3):
            expected = math.cos(math.pi * (h + 0.5) * frequency / 3)
            assert torch.allclose(along[h], torch.tensor(expected), atol=1e-6)


def test_branches_follow_the_shape_and_the_options():
    def names(family, *arguments, **options):
        return list(BLOCKS[family](*arguments, **options).branches)

    assert names("repvgg", 4, 4) == ["dense", "1x1", "identity"]
    assert names("repvgg", 4, 4, identity=False) == ["dense", "1x1"]
    assert names("repvgg", 4, 4, stride=2) == names("repvgg", 4, 8) == ["dense", "1x1"]
    assert names("acb", 4, 4, dims=3) == ["square", "axis0", "axis1", "axis2"]
    assert names("dbb", 4, 8) == ["origin", "1x1", "avg", "1x1_kxk"]
    assert names("dbb", 4, 4, groups=4) == ["origin", "avg", "1x1_kxk"]
    assert names("mobileone", 4, 4, n=2) == ["conv0", "conv1", "scale", "skip"]
    assert names("mobileone", 4, 8, 1, n=1) == ["conv0"]
    assert names("replk", 4, 4, groups=4) == ["large", "small"]
    assert names("replk", 4, 4, small=None) == ["large"]
    assert names("duplicate", 4, 4, n=3) == ["conv0", "conv1", "conv2"]
    assert names("dyrep", 4, 8, branches=(0, 0, 1, 1, 0, 0, 1)) == ["1x1_avg", "kxk"]
    assert names("csla", 4, 4) == ["conv", "1x1", "identity"]
    depthwise = BLOCKS["dbb"](4, 4, groups=4).branches["1x1_kxk"][0]
    assert (depthwise.out_channels, depthwise.offset) == (8, False)
    assert len(BLOCKS["orepa_stem"](3, 4).branches["layers"]) == 3
    assert BLOCKS["replk"](2, 2).geometry.kernel_size == (31, 31)


def test_one_shared_norm_or_one_each():
    norms = {f: sum(isinstance(m, Norm) for m in BLOCKS[f](4, 4).modules()) for f in BLOCKS}
    assert norms == {
        "repvgg": 3,
        "acb": 3,
        "dbb": 6,
        "orepa": 1,
        "orepa_1x1": 1,
        "orepa_stem": 1,
        "orepa_stem_base": 1,
        "orepa_repvgg": 3,
        "mobileone": 6,
        "replk": 2,
        "dyrep": 9,
        "rep": 2,
        "convbn": 1,
        "duplicate": 2,
        "expandnet": 1,
        "csla": 1,
        "qarepvgg": 2,
        "dirac": 1,
    }


def test_csla_scales_may_be_constants_but_the_identity_is_trained():
    block = BLOCKS["csla"](4, 4, trainable_scales=False, initial=2.0)
    frozen = [name for name, p in block.named_parameters() if not p.requires_grad]
    assert frozen == ["branches.conv.1.weight", "branches.1x1.1.weight"]
    assert (block.branches["conv"][1].weight == 2).all()
    assert (block.branches["identity"].weight == 1).all()


@pytest.mark.parametrize(
    "family, options, message",
    [
        ("mobileone", {"n": 0}, r"n \(=0\) must be at least 1"),
        ("duplicate", {"n": 0}, r"n \(=0\) must be at least 1"),
        ("replk", {"small": 4}, r"small \(=4\) must be odd, to lie at the centre, or None"),
        ("dyrep", {"branches": (1, 1)}, r"branches \(=\(1, 1\)\) must be 7 flags"),
        ("dyrep", {"branches": (1, 1, 1, 0, 1, 1, 1)}, "kxk must be among them"),
        (
            "dbb",
            {"inner_channels": 5, "groups": 2},
            r"\(=5\) must be divisible by groups",
        ),
    ],
)
def test_options_out_of_range_are_told(family, options, message):
    with pytest.raises(ValueError, match=message):
        BLOCKS[family](4, 4, **options)
