"""Any network into blocks and back: what is converted, what is kept and why, and the proof."""

import copy

import pytest
import torch
from torch import nn
from torchvision import models as vision
from torchvision.ops import FrozenBatchNorm2d
from whole import X, error, net, scrambled

from replib import convert, fuse, verify
from replib.blocks import RepBlock
from replib.networks import outermost_blocks


def became(model):
    """name -> what became of it."""
    return {entry["name"]: entry["became"] for entry in model.conversion}


@pytest.mark.parametrize("block", ["repvgg", "dbb", "acb", "orepa", "dyrep", "qarepvgg"])
def test_the_function_is_preserved_and_fusing_is_proved(block):
    torch.manual_seed(0)
    model = scrambled(vision.mobilenet_v3_small()).double()
    converted = convert(model, block)
    fused = fuse(converted)
    assert error(model(X.double()), converted(X.double())) < 1e-9
    assert verify(converted, fused, X.double()).ok
    assert not any(isinstance(module, RepBlock) for module in fused.modules())
    assert not hasattr(fused, "conversion")


@pytest.mark.parametrize("name", ["resnet18", "vgg11_bn", "shufflenet_v2_x0_5"])
@pytest.mark.slow
def test_torchvision_networks(name):
    torch.manual_seed(0)
    model = scrambled(getattr(vision, name)())
    converted = convert(model, "repvgg")
    proof = verify(converted, fuse(converted), X)
    assert proof.ok, str(proof)
    assert error(model(X), converted(X)) < 1e-5  # float32, up to 20 layers
    spatial = sum(isinstance(m, nn.Conv2d) and max(m.kernel_size) > 1 for m in model.modules())
    assert sum(what == "repvgg" for what in became(converted).values()) == spatial
    assert sum(what == "Identity" for what in became(converted).values()) == spatial


@pytest.mark.parametrize(
    "where, chosen",
    [
        ("0*", {"0.0"}),
        (nn.Conv2d, {"0.0", "1", "2"}),
        (lambda name, conv: conv.in_channels == 8, {"1", "2"}),
        (None, {"0.0", "1"}),
    ],
)
def test_where(where, chosen):
    model = net(nn.Sequential(nn.Conv2d(3, 8, 3)), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1))
    found = {n for n, what in became(convert(model, "repvgg", where)).items() if what == "repvgg"}
    assert found == chosen


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, FrozenBatchNorm2d, nn.SyncBatchNorm])
def test_a_norm_is_absorbed_whatever_its_class(kind):
    model = net(nn.Conv2d(3, 8, 3, bias=False), kind(8), nn.ReLU())
    converted = convert(model, "repvgg")
    assert became(converted) == {"0": "repvgg", "1": "Identity"}
    assert isinstance(converted[1], nn.Identity)
    assert error(model(X), converted(X)) < 1e-5
    kept = convert(model, "repvgg", keep_norm=True)
    assert type(kept[1]) is kind and error(model(X), kept(X)) < 1e-5


class Branching(nn.Module):
    """The convolution's output is used twice: its norm may not be absorbed."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) + y


class Repeated(nn.Module):
    """One convolution used twice, with a norm behind each use."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.one, self.two = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.two(self.conv(self.one(self.conv(x))))


class Pair(nn.Module):
    def __init__(self, inputs=3, outputs=8):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs)

    def forward(self, x):
        return self.bn(self.conv(x))


class Untraceable(nn.Module):
    """Control flow that depends on data, around a part that can be traced."""

    def __init__(self):
        super().__init__()
        self.part = Pair()
        self.conv, self.bn = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x):
        x = self.part(x)
        return self.bn(self.conv(x)) if x.sum() > -1e9 else x


class LayerByLayer(nn.Module):
    """It cannot be traced, and takes what is inside its Sequential one by one."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, x):
        if x.shape[1] != 3:
            raise ValueError
        seen = []
        for layer in self.features:
            seen.append(x := layer(x))
        return seen[0] + seen[-1]


class Optional(nn.Module):
    """An argument that nobody gives decides who else consumes the convolution's output."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x, residual=None):
        y = self.conv(x)
        return self.bn(y) + (y if residual is None else residual)


class OnlyInEval(nn.Module):
    """In eval mode the output is used twice, in train mode it is not."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) if self.training else self.bn(y) + y


class Behind(nn.Module):
    """Its layers are also held where torch does not see them."""

    def __init__(self):
        super().__init__()
        self.one, self.two = Pair(), Pair(8, 8)
        self.pairs = [(self.one.conv, self.one.bn), (self.two.conv, self.two.bn)]

    def forward(self, x):
        for conv, bn in self.pairs:
            x = bn(conv(x)).relu()
        return x


class Flat(nn.Module):
    """A norm of another dimension: its channels are another axis."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 33, 3, padding=1), nn.BatchNorm1d(33)

    def forward(self, x):
        return self.bn(self.conv(x[0]))


def hooked():
    model = Pair()
    model.bn.register_forward_hook(lambda module, inputs, output: output.sigmoid())
    return model


def patched():
    model = Pair()
    forward = model.bn.forward
    model.bn.forward = lambda x: 2 * forward(x)
    return model


def acting():
    model = Pair()
    model.bn.act = nn.ReLU()  # it is never called
    return model


@pytest.mark.parametrize(
    "kind, absorbed",
    [
        (Branching, 0),
        (Repeated, 0),
        (Untraceable, 1),
        (LayerByLayer, 0),
        (Optional, 0),
        (OnlyInEval, 0),
        (Behind, 2),
        (Flat, 0),
        (hooked, 0),
        (patched, 0),
        (acting, 1),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
@pytest.mark.filterwarnings("ignore:.*places add parallel:UserWarning")
def test_only_a_norm_that_alone_consumes_is_absorbed(kind, absorbed):
    torch.manual_seed(0)
    model = scrambled(kind())
    x = X[..., :33] if kind is Flat else X
    assert error(model(x), fuse(model)(x)) < 1e-5
    if kind is Flat:
        return  # blocks take batches only
    if kind is OnlyInEval:
        model.train()
    converted = convert(model, "repvgg").eval()
    model.eval()
    assert sum(what == "Identity" for what in became(converted).values()) == absorbed
    assert error(model(x), converted(x)) < 1e-5
    assert kind is patched or verify(converted, fuse(converted), x).ok


def test_a_shared_convolution_stays_one_block():
    converted = convert(scrambled(Repeated()), "repvgg")
    shared = nn.Conv2d(3, 3, 3, padding=1)
    twice = convert(net(shared, nn.ReLU(), shared), "repvgg")
    assert twice[0] is twice[2] and isinstance(twice[0], RepBlock)
    assert len(outermost_blocks(converted)) == 1


def test_the_root_may_be_a_convolution():
    conv = nn.Conv2d(3, 8, 3, stride=2, padding=1).eval()
    block = convert(conv, "acb")
    assert isinstance(block, RepBlock) and error(conv(X), block(X)) < 1e-5
    assert verify(block, fuse(block), X).ok


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", ["same", "valid", 2, (1, 2)])
def test_padding_is_kept(mode, padding):
    model = net(nn.Conv2d(3, 8, (3, 5), padding=padding, padding_mode=mode, dilation=(2, 1)))
    converted = convert(model, "repvgg")
    assert error(model(X), converted(X)) < 1e-5
    assert verify(converted, fuse(converted), X).ok


class UNet(nn.Module):
    """Down, up by a transposed convolution, a skip connection and one convolution used twice."""

    def __init__(self):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.up, self.norm = nn.ConvTranspose2d(8, 8, 2, 2), nn.BatchNorm2d(8)
        self.out = nn.Conv2d(11, 11, 3, padding=1)

    def forward(self, x):
        y = torch.cat([x, self.norm(self.up(self.down(x)))], 1)
        return self.out(self.out(y).relu())


def test_a_unet():
    """Skips, a transposed convolution, whose norm is folded, and a shared block."""
    torch.manual_seed(0)
    model, x = scrambled(UNet()), X[..., :32, :]
    converted = convert(model, "dbb")
    assert became(converted) == {"down.0": "dbb", "down.1": "Identity", "up": "kept", "out": "dbb"}
    fused = fuse(converted)
    assert error(model(x), fused(x)) < 1e-5 and verify(converted, fused, x).ok
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())


def test_what_was_frozen_stays_frozen_or_is_named():
    model = net(nn.Conv2d(3, 8, 3, bias=False), FrozenBatchNorm2d(8), nn.Conv2d(8, 8, 3))
    model[2].requires_grad_(False)
    converted = convert(model, "dbb")
    assert all(p.requires_grad for p in converted[0].parameters())
    assert not any(p.requires_grad for p in converted[2].parameters())
    (note,) = [e["reason"] for e in converted.conversion if e["became"] == "Identity"]
    assert "keep_norm=True" in note


def test_what_cannot_be_converted_is_listed_with_its_reason():
    model = net(nn.Conv2d(3, 8, 4, padding="same"), nn.ConvTranspose2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    converted = convert(model, "repvgg")
    reasons = {c["name"]: c["reason"] for c in converted.conversion if c["became"] == "kept"}
    assert "two sides" in reasons["0"] and "transposed" in reasons["1"]
    assert error(model(X), converted(X)) < 1e-5


def test_paper_initialisation_draws_afresh():
    model = net(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))
    converted = convert(model, "repvgg", init="paper")
    assert became(converted)["1"] == "Identity" and error(model(X), converted(X)) > 0.1


def test_the_original_is_left_alone_and_options_reach_the_family():
    model = net(nn.Conv2d(3, 3, 3, padding=1))
    before = copy.deepcopy(model.state_dict())
    converted = convert(model, "repvgg", identity=False)
    assert "identity" not in converted[0].branches
    assert type(model[0]) is nn.Conv2d
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("dbbb",), "block .*'dbbb'.* must be one of repvgg"),
        (("dbb", None, "zero"), "init .*'zero'"),
        (("dbb", "nothing*"), "no convolution was converted to dbb: 1x not chosen"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        convert(net(nn.Conv2d(3, 8, 3)), *arguments)
