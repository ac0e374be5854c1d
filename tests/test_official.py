"""Reading and writing released files, without any such file: ours out, in again, the same."""

import pytest
import torch
from test_blocks import scrambled
from torch import nn

from replib import official
from replib.blocks import BLOCKS
from replib.models.cifar_repvgg import cifar_repvgg

torch.set_num_threads(1)
SQUARE = {"in_channels": 8, "out_channels": 8, "kernel_size": 3}
CASES = {  # source -> arguments, in the words of the released code
    "repvgg": SQUARE | {"groups": 2},
    "acb": SQUARE | {"kernel_size": 5, "padding": 1},
    "dbb": SQUARE | {"internal_channels_1x1_3x3": 12},
    "orepa": SQUARE | {"groups": 2, "out_channels": 12},
    "orepa_1x1": SQUARE | {"kernel_size": 1, "out_channels": 4},
    "orepa_stem": SQUARE | {"kernel_size": 7, "stride": 2},
    "orepa_stem_base": SQUARE | {"kernel_size": 5},
    "orepa_repvgg": SQUARE,
    "mobileone": SQUARE | {"num_conv_branches": 3, "groups": 8},
    "replk": SQUARE | {"kernel_size": 13, "small_kernel": None, "groups": 8},
    "convbn": SQUARE | {"stride": 2},
    "dyrep": SQUARE | {"branches": [1, 0, 1, 1, 0, 1, 1]},
    "repopt_csla": SQUARE,
    "repopt_repvgg": SQUARE,
    "timm_repvgg": SQUARE | {"groups": 2},
    "repmlp": {
        "in_channels": 8,
        "out_channels": 8,
        "h": 3,
        "w": 4,
        "num_sharesets": 2,
        "reparam_conv_k": (1, 3),
    },
    "repan_repvgg": SQUARE,
    "repan_dbb": SQUARE | {"stride": 2},
    "repan_acb": SQUARE,
    "repan_rep": SQUARE,
    "repan_convbn": SQUARE,
}


def made(source):
    """A block of ours and its state as released."""
    layout = official.SOURCES[source]
    everything = {"bn_0.weight": None, **{f"dbb_{n}.x": None for n in ("1x1", "1x1_kxk", "kxk")}}
    block = scrambled(layout.build(CASES[source], everything).eval())
    return block, official.export_block(block, source)


@pytest.mark.parametrize("source", official.SOURCES)
@torch.no_grad()
def test_what_goes_out_comes_in_again(source):
    block, state = made(source)
    held = [name for e in official.block_table(block, source).values() for name in e.ours]
    own = [key for key in block.state_dict() if key.rpartition(".")[2] != "rate"]
    assert sorted(held) == sorted(own)  # nothing is forgotten, nothing told twice
    older = {f"module.{k}": v for k, v in state.items() if "num_batches_tracked" not in k}
    again = official.load_block(source, CASES[source], {"state_dict": older}).eval()
    x = torch.randn(2, 8, 9, 8)
    assert torch.equal(again(x), block(x))
    out = official.export_block(again, source)
    assert list(out) == list(state)
    assert all(torch.equal(out[key], state[key]) for key in state)


@pytest.mark.parametrize("source", sorted(set(official.SOURCES) - {"repmlp"}))
@torch.no_grad()
def test_a_deployed_file_is_one_plain_convolution(source):
    block, _ = made(source)
    conv = block.deploy()
    name = official.SOURCES[source].deployed
    state = {f"{name}.weight": conv.weight, f"{name}.bias": conv.bias}
    loaded = official.load_block(source, CASES[source], state)
    assert type(loaded) is nn.Conv2d
    x = torch.randn(2, 8, 9, 8)
    assert torch.equal(loaded(x), conv(x))
    with pytest.raises(ValueError, match=r"bias \(3,\) instead of \("):
        official.load_block(source, CASES[source], state | {f"{name}.bias": torch.zeros(3)})


@torch.no_grad()
def test_dyrep_blocks_inside_a_block():
    torch.manual_seed(0)
    block = BLOCKS["dyrep"](4, 6, 3, stride=2)
    block.branches["kxk"][0] = BLOCKS["dyrep"](4, 6, 3)
    block.branches["1x1_kxk"][2] = BLOCKS["dyrep"](4, 6, 3, branches=(0, 1, 1, 1, 0, 0, 0))
    scrambled(block.eval())
    state = official.export_block(block, "dyrep")
    assert "dbb_kxk.conv.dbb_kxk.conv.bias" in state
    assert "dbb_1x1_kxk.conv2.dbb_1x1_avg.conv.weight" in state
    kwargs = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "stride": 2}
    again = official.load_block("dyrep", kwargs, state).eval()
    x = torch.randn(2, 4, 9, 8)
    assert torch.equal(again(x), block(x))


def test_a_network_of_other_blocks_is_not_exported():
    with torch.device("meta"):
        model = cifar_repvgg("a0", classes=10, block="rep")
    with pytest.raises(ValueError, match=r"stages.0.0.block is a Rep; the layout has RepVGG only"):
        official.export(model, "repan_repvgg_a0")


def test_what_does_not_fit_is_told_in_one_message():
    _, state = made("orepa")
    del state["vector"]
    state["bn.weight"] = torch.zeros(5)
    state["more"] = torch.zeros(1)
    message = r"missing: vector; unexpected: more; of another shape: bn.weight \(5,\) instead of"
    with pytest.raises(ValueError, match=message):
        official.load_block("orepa", CASES["orepa"], state)
    with pytest.raises(ValueError, match=r"source \(='vgg'\) must be one of repvgg, acb"):
        official.load_block("vgg", SQUARE, state)
    with pytest.raises(ValueError, match=r"must hold tensors only; these are none: .'epoch'"):
        official.load_block("orepa", CASES["orepa"], {"epoch": 3})
