"""A saved network comes back with its structure, whatever was done to it, and without a pickle."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_blocks import scrambled
from torch import nn

from replib import convert
from replib.blocks import BLOCKS
from replib.blocks.block import RepBlock
from replib.branches import Chain
from replib.checkpoint import class_of, load_model, save_model
from replib.fusing import deployed_copy
from replib.models import BODIES, build

torch.set_num_threads(1)


def network(block="repvgg", body="digits"):
    torch.manual_seed(0)
    return scrambled(build(body, block, classes=5, in_channels=2).eval())


def again(model, tmp_path, **options):
    save_model(model, tmp_path / "model.safetensors")
    state = torch.get_rng_state()
    loaded = load_model(tmp_path / "model.safetensors", **options)
    assert torch.equal(torch.get_rng_state(), state)
    return loaded


def same(one, other):
    """The same modules, tensors, flags and modes."""
    for (path, a), (other_path, b) in zip(
        one.named_modules(remove_duplicate=False),
        other.named_modules(remove_duplicate=False),
        strict=True,
    ):
        assert (path, type(a), a.training) == (other_path, type(b), b.training)
        assert a.extra_repr() == b.extra_repr()
    assert list(one.state_dict()) == list(other.state_dict())
    tensors = [[*m.named_parameters(), *m.named_buffers()] for m in (one, other)]
    for (name, a), (other_name, b) in zip(*tensors, strict=True):
        assert (name, a.dtype, a.requires_grad) == (other_name, b.dtype, b.requires_grad)
        assert torch.equal(a, b)
    x = torch.randn(2, 2, 8, 8, dtype=next(one.parameters()).dtype)
    with torch.no_grad():
        assert torch.equal(one.eval()(x), other.eval()(x))


@pytest.mark.parametrize("block", BLOCKS)
def test_every_family_comes_back(block, tmp_path):
    options = {"kernel_size": 1} if block == "orepa_1x1" else {"kernel_size": 5}
    torch.manual_seed(0)
    model = nn.Sequential(BLOCKS[block](2, 4, **options, stride=2), nn.ReLU())
    model = scrambled(model.eval())
    model[0].set_rate(0.3)
    loaded = again(model, tmp_path)
    same(loaded, model)
    assert loaded[0].rate.item() == pytest.approx(0.3)
    assert torch.equal(loaded[0].merged().weight, model[0].merged().weight)
    same(again(deployed_copy(model), tmp_path), deployed_copy(model))


@pytest.mark.parametrize(
    "body, block",
    [
        ("digits", "dbb"),
        ("cifar_repvgg_a0", "repvgg"),
        ("cifar_resnet18", "acb"),
        ("cifar_resnet56", "convbn"),
        ("mobileone_s4", "mobileone"),
        ("repvgg_a0", "orepa_repvgg"),
        ("repopt_vgg_b1", "csla"),
        ("mobilenet_v1", "dbb"),
    ],
)
@pytest.mark.slow
def test_every_kind_of_body_comes_back(body, block, tmp_path):
    if body == "repopt_vgg_b1":
        model = BODIES["cifar_repvgg_a0"](classes=5, in_channels=2, block=block)
        model = scrambled(model.eval())
    else:
        model = network(block, body)
    same(again(model, tmp_path), model)


def test_a_network_of_torchvision_comes_back(tmp_path):
    from torchvision.models import resnet18

    model = scrambled(resnet18(num_classes=3).eval())
    model.conv1 = nn.Conv2d(2, 64, 3)
    same(again(model, tmp_path), model)


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "mobilenet_v3_small"])
def test_a_converted_network_of_torchvision_comes_back(name, tmp_path):
    """With the record of what was converted, and the modules of torchvision.ops."""
    from torchvision.models import get_model

    model = convert(scrambled(get_model(name, num_classes=3).eval()), "repvgg")
    loaded = again(model, tmp_path)
    assert loaded.conversion == model.conversion and len(model.conversion) > 10
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


def test_the_record_of_a_plain_sequence_comes_back(tmp_path):
    model = convert(nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU()).eval(), "acb")
    assert again(model, tmp_path).conversion == model.conversion
    save_model(nn.Sequential(nn.ReLU()), tmp_path / "model.safetensors")
    assert not hasattr(load_model(tmp_path / "model.safetensors"), "conversion")


def test_partly_deployed_frozen_and_in_training(tmp_path):
    """Every block on its own: merged or not, at its own rate, trained or frozen."""
    model = network("dbb").train()
    model.stages[1][0].block = model.stages[1][0].block.eval().deploy()
    model.stages[2][0].block.set_rate(0.25)
    model.stages[0].eval()
    for parameter in model.stages[1][1].parameters():
        parameter.requires_grad_(False)
    loaded = again(model.double(), tmp_path)
    assert type(loaded.stages[1][0].block) is nn.Conv2d
    same(loaded, model)


def test_growth_and_cuts_of_dyrep_come_back(tmp_path):
    model = network("dyrep")
    outer = model.stages[1][1].block
    g = outer.geometry
    grown = BLOCKS["dyrep"](g.in_channels, g.out_channels, 3, branches=(1, 0, 0, 1, 0, 1, 0))
    outer.branches["kxk"][0] = grown
    del outer.branches["1x1_avg"], outer.branches["id"]
    first = model.stages[0][0].block
    width = first.branches["1x1_kxk"][2].in_channels, first.out_channels
    first.branches["1x1_kxk"][2] = BLOCKS["dyrep"](*width, 3)
    scrambled(model.eval())
    loaded = again(model, tmp_path)
    same(loaded, model)
    assert type(loaded.stages[1][1].block.branches["kxk"][0]) is BLOCKS["dyrep"]
    assert torch.equal(loaded.stages[1][1].block.merged().bias, outer.merged().bias)


def test_what_comes_back_learns_and_restores(tmp_path):
    model = network("orepa")
    loaded = again(model, tmp_path)
    for net in (model, loaded):
        block = net.stages[1][1].block
        block.redraw("repan", torch.Generator().manual_seed(1))
        block.restore(block.merged(), "preserving")
        net.train()(torch.ones(2, 2, 8, 8)).sum().backward()
    same(loaded, model)
    gradients = [[p.grad for p in net.parameters()] for net in (model, loaded)]
    assert all(a is b or torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_module_used_twice_stays_one(tmp_path):
    conv = nn.Conv2d(2, 2, 3, padding=1)
    loaded = again(nn.Sequential(conv, nn.ReLU(), conv), tmp_path)
    assert loaded[0] is loaded[2]


class Foreign(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.conv(x) * self.scale


def test_a_network_of_somebody_else_needs_its_body(tmp_path):
    model = nn.Sequential(Foreign(), nn.ReLU())
    model[0].conv = scrambled(BLOCKS["dbb"](2, 4, 3).eval())
    save_model(model.eval(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"0 is a test_checkpoint_model:Foreign: give .* `body`"):
        load_model(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="give load_model a `body`"):
        load_model(tmp_path / "model.safetensors", nn.Sequential(nn.ReLU()))
    same(again(model, tmp_path, body=nn.Sequential(Foreign())), model)


class Own(RepBlock):
    main_name = "wide"

    def declare(self, g, inner: int = 3):
        narrow = Chain(g.conv(1, out_channels=inner), g.conv(in_channels=inner))
        return {"wide": Chain(g.conv(), g.norm()), "narrow": narrow}


def test_a_family_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setitem(BLOCKS, "own", Own)
    model = nn.Sequential(Own(2, 4, 3, inner=5)).eval()
    same(again(model, tmp_path), model)
    monkeypatch.delitem(BLOCKS, "own")
    with pytest.raises(ValueError, match="blocks of the family 'own', which is not known"):
        load_model(tmp_path / "model.safetensors")


def test_the_manifest_says_what_there_is(tmp_path):
    model = network("acb")
    model.stages[1][0].block.set_rate(0.5)
    save_model(model, tmp_path / "model.safetensors")
    header = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(header[:8], "little")
    manifest = json.loads(json.loads(header[8 : 8 + length])["__metadata__"]["manifest"])
    assert manifest["blocks"]["stages.1.0.block"] == {
        "family": "acb",
        "branches": ["square", "axis0", "axis1"],
        "rate": 0.5,
    }


def test_the_same_network_is_the_same_bytes(tmp_path):
    model = network("acb")
    written = set()
    for _ in range(20):
        save_model(model, tmp_path / "model.safetensors")
        written.add((tmp_path / "model.safetensors").read_bytes())
    assert len(written) == 1


def test_a_file_with_its_hash_beside_the_manifest_is_read(tmp_path):
    """As they were written at first."""
    model, path = network("acb"), tmp_path / "model.safetensors"
    save_model(model, path)
    with safe_open(path, "pt") as file:
        manifest = json.loads(file.metadata()["manifest"])
    stated = manifest.pop("sha256")
    save_file(load_file(path), path, {"manifest": json.dumps(manifest), "sha256": stated})
    same(load_model(path), model)
    save_file(load_file(path), path, {"manifest": json.dumps(manifest), "sha256": stated[::-1]})
    with pytest.raises(ValueError, match="is damaged"):
        load_model(path)


def test_damaged_files_are_refused_in_one_line(tmp_path):
    path = tmp_path / "model.safetensors"
    save_model(network(), path)
    whole = path.read_bytes()
    for content, message in (
        (whole[:-100], "cannot be read as a network"),
        (b"nothing", "cannot be read as a network"),
        (whole[:-1] + bytes([whole[-1] ^ 1]), "is damaged"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message) as error:
            load_model(path)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="cannot be read as a network"):
        load_model(tmp_path / "absent")
    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="has no manifest"):
        load_model(path)


def test_a_file_cannot_name_what_is_no_module(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    for name in ("os:system", "torch.nn.modules.module:Tensor", "replib.models.resnet:resnet"):
        with monkeypatch.context() as patch:
            patch.setattr("replib.checkpoint.class_name", lambda kind, name=name: name)
            patch.setattr("replib.checkpoint.constructed_from", lambda module: {})
            save_model(nn.Sequential(), path)
        with pytest.raises(ValueError, match=r"which is not a module|give load_model a `body`"):
            load_model(path)
    with pytest.raises(ValueError, match="which is not a module that files may name"):
        class_of("test_checkpoint_model:Foreign")  # as an attribute may: not even imported


def test_what_cannot_be_written_is_refused(tmp_path):
    model = network()
    model.extra = object()
    with pytest.raises(ValueError, match="extra is a object, which cannot be written as data"):
        save_model(model, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="is on the meta device: it has no values"):
        save_model(copy.deepcopy(network("acb")).to("meta"), tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


def test_tensors_keep_their_plain_names(tmp_path):
    """Other programs read the file as any other."""
    model = network()
    save_model(model, tmp_path / "model.safetensors")
    assert model.state_dict().keys() <= load_file(tmp_path / "model.safetensors").keys()
