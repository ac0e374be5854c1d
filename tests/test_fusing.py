"""Deployment: nothing of this library is left, other codes' blocks are taken, and the report."""

import copy
import io
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torchvision import models as vision
from whole import X, error, net, scrambled

from replib import convert, fuse, verify
from replib.blocks import BLOCKS
from replib.fusing import deploy_method, deployed_copy, parallel, units
from replib.models import BODIES


def classes_of_ours(model):
    return [type(m) for m in model.modules() if type(m).__module__.startswith("replib")]


def became(fused):
    """name -> what became of it."""
    return {entry["name"]: entry["became"] for entry in fused.fusion}


def reasons(fused):
    return {entry["name"]: entry["reason"] for entry in fused.fusion}


# -- nothing of ours is left -----------------------------------------------------------------------
BODIES_SHOWN = (
    "digits repvgg_a0 mobilenet_v1 resnet18 cifar_vgg16 cifar_resnet56 repopt_ghostnet_050 "
    "replknet_31b repmlpnet_t224"
).split()


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(name, marks=() if name == "digits" else pytest.mark.slow)
        for name in BODIES_SHOWN
    ],
)
def test_no_class_of_this_library_is_left_in_any_body(body):
    torch.manual_seed(0)
    channels = 1 if body == "digits" else 3
    model = scrambled(BODIES[body](classes=5, in_channels=channels))
    side = {"digits": 8, "repmlpnet_t224": 224, "cifar_vgg16": 32}.get(body, 64)
    x = torch.randn(2, channels, side, side)
    fused = fuse(model)
    assert classes_of_ours(model) and not classes_of_ours(fused)
    norms = any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    assert norms == (body in ("replknet_31b", "repmlpnet_t224"))  # theirs stand before the blocks
    proof = verify(model, fused, x)
    assert proof.ok, str(proof)
    assert len(proof.blocks) >= 4


@pytest.mark.slow
def test_the_deployed_network_is_loaded_where_this_library_is_not_installed(tmp_path):
    """In a process of its own, in which importing replib fails."""
    torch.manual_seed(0)
    model = scrambled(BODIES["digits"](classes=5, in_channels=1))
    x = torch.randn(2, 1, 8, 8)
    fused = fuse(model)
    torch.save({"model": fused, "x": x, "y": fused(x)}, tmp_path / "model.pt")
    script = (
        "import sys, torch\n"
        "sys.modules['replib'] = None\n"
        "file = torch.load(sys.argv[1], weights_only=False)\n"
        "assert torch.equal(file['model'](file['x']), file['y'])\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "model.pt")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("block", ["repvgg", pytest.param("dbb", marks=pytest.mark.slow)])
def test_a_deployed_resnet18_loads_into_torchvisions(block):
    """Strictly, under its own names; norms are identities that carry the bias."""
    torch.manual_seed(0)
    model = scrambled(convert(scrambled(vision.resnet18(num_classes=7)), block))
    plain = fuse(model, into=vision.resnet18(num_classes=7))
    assert type(plain) is vision.ResNet
    fresh = vision.resnet18(num_classes=7)
    fresh.load_state_dict(plain.state_dict(), strict=True)
    assert error(model(X), fresh.eval()(X)) < 1e-5
    assert fresh.bn1.weight.unique().tolist() == [1] and not fresh.bn1.running_mean.any()


def test_our_own_resnet18_loads_into_torchvisions_too():
    """Other names, same layers: they are matched by the order of their use."""
    torch.manual_seed(0)
    model = scrambled(BODIES["resnet18"](classes=7, block="acb"))
    plain = fuse(model, into=vision.resnet18(num_classes=7))
    assert type(plain) is vision.ResNet and error(model(X), plain(X)) < 1e-5


@pytest.mark.parametrize(
    "into, message",
    [
        (lambda: vision.resnet34(num_classes=7), "into has 37 layers with weights, the network 21"),
        (lambda: vision.resnet18(num_classes=8), r"its layer fc is Linear\(512, 8\)"),
        (lambda: vision.resnet18(num_classes=7, norm_layer=lambda c: nn.Identity()), "neither"),
    ],
)
def test_a_network_that_does_not_fit_is_refused(into, message):
    model = scrambled(convert(scrambled(vision.resnet18(num_classes=7)), "rep"))
    with pytest.raises(ValueError, match=message):
        fuse(model, into=into())


# -- norms -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize("bias", [True, False])
def test_a_norm_behind_any_convolution_is_folded(kind, bias, groups):
    torch.manual_seed(0)
    conv = kind(4, 8, 3, stride=2, groups=groups, bias=bias)
    model = net(conv, nn.BatchNorm2d(8), nn.ReLU()).double()
    x = torch.randn(2, 4, 9, 7, dtype=torch.float64)
    fused = fuse(model)
    assert became(fused)["1"] == "Identity" and isinstance(fused[1], nn.Identity)
    assert error(model(x), fused(x)) < 1e-13
    proof = verify(model, fused, x)
    assert proof.ok and len(proof.blocks) == 1
    assert all(torch.equal(a, b) for a, b in zip(model[0].state_dict().values(),
               copy.deepcopy(model[0]).state_dict().values(), strict=True))  # fmt: skip


class Shared(nn.Module):
    """Two convolutions with one weight, a norm behind the first."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.two.weight = self.one.weight
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.two(self.bn(self.one(x)))


class Standardised(nn.Conv2d):
    """A convolution that is none: its weight is standardised at every step."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


def hooked(model):
    model[0].register_forward_hook(lambda module, inputs, output: output * 2)
    return model


PECULIAR = {
    "tied": (Shared, "another module's too"),
    "own forward": (lambda: net(Standardised(3, 8, 3), nn.BatchNorm2d(8)), "something else"),
    "hooks": (lambda: hooked(net(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))), "hooks"),
    "parametrized": (
        lambda: net(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3)), nn.BatchNorm2d(8)),
        "parametrized",
    ),
}


@pytest.mark.parametrize("case", PECULIAR)
def test_what_is_no_plain_convolution_stays_with_its_reason(case):
    make, why = PECULIAR[case]
    torch.manual_seed(0)
    model = scrambled(make())
    fused = fuse(model)
    assert torch.equal(model(X), fused(X))
    assert any(why in reason for reason in reasons(fused).values())
    also = nn.Sequential(model, nn.Conv2d(model(X).shape[1], 4, 3)).eval()
    converted = convert(also, "repvgg")
    kept = [entry["reason"] for entry in converted.conversion if entry["became"] == "kept"]
    assert any(why in reason for reason in kept)
    assert error(also(X), converted(X)) < 1e-5


def test_the_report_names_every_block_convolution_and_norm():
    torch.manual_seed(0)
    model = scrambled(convert(scrambled(vision.shufflenet_v2_x0_5()), "repvgg", "stage2.*"))
    fused = fuse(model)
    told = {entry["name"] for entry in fused.fusion}
    kinds = (nn.Conv2d, nn.BatchNorm2d, *BLOCKS.values())
    inside = {f"{name}." for name in units(model)}
    for name, module in model.named_modules():
        if isinstance(module, kinds) and not name.startswith(tuple(inside)):
            assert name in told, name
    assert all(type(value) is str for entry in fused.fusion for value in entry.values())


# -- other codes' blocks ---------------------------------------------------------------------------
def pair(conv, norm):
    """A convolution and its norm as one convolution."""
    return nn.utils.fusion.fuse_conv_bn_eval(conv, norm)


class TwoBranches(nn.Module):
    """A 3x3 and a 1x1 branch, as most released blocks begin."""

    def __init__(self, inputs=3, outputs=8):
        super().__init__()
        self.three, self.norm3 = nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs)
        self.one, self.norm1 = nn.Conv2d(inputs, outputs, 1), nn.BatchNorm2d(outputs)

    def forward(self, x):
        if hasattr(self, "conv"):
            return self.conv(x)
        return self.norm3(self.three(x)) + self.norm1(self.one(x))

    def merged(self):
        three, one = pair(self.three, self.norm3), pair(self.one, self.norm1)
        three.weight.data += nn.functional.pad(one.weight, (1, 1, 1, 1))
        three.bias.data += one.bias
        return three

    def become_one(self):
        self.conv = self.merged()
        for name in ("three", "one", "norm3", "norm1"):
            delattr(self, name)


class Returning(TwoBranches):
    def fuse(self):
        return self.merged()


class InPlace(TwoBranches):
    def reparameterize(self):
        self.become_one()


class Switching(TwoBranches):
    def switch_to_deploy(self):
        self.become_one()


class Forgetful(TwoBranches):
    """It goes on with its branches until somebody sets its flag."""

    deploy = False

    def forward(self, x):
        return self.conv(x) if self.deploy else super().forward(x)

    def switch_to_deploy(self):
        self.conv = self.merged()


class Large(TwoBranches):
    def merge_kernel(self):
        self.become_one()


class WithOption(TwoBranches):
    def fuse(self, inplace=False):
        return self.merged()


FOREIGN = [Returning, InPlace, Switching, Large, WithOption]


@pytest.mark.parametrize("place", ["root", "nested", "shared"])
@pytest.mark.parametrize("kind", FOREIGN, ids=lambda kind: kind.__name__)
def test_blocks_of_other_codes_are_deployed_by_their_own_method(kind, place):
    torch.manual_seed(0)
    block = kind(3, 3)
    model = {"root": block, "nested": nn.Sequential(nn.Sequential(block), nn.ReLU()),
             "shared": nn.Sequential(block, nn.ReLU(), block)}[place]  # fmt: skip
    model = scrambled(model)
    before = copy.deepcopy(model.state_dict())
    fused = fuse(model)
    proof = verify(model, fused, X)
    assert proof.ok and len(proof.blocks) == 1, str(proof)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    assert not parallel(fused) and parallel(model)
    assert model.state_dict().keys() == before.keys()  # the model is left alone
    assert not any(module.training for module in fused.modules())


def test_a_block_that_forgets_its_flag_is_helped():
    torch.manual_seed(0)
    model = scrambled(nn.Sequential(Forgetful()))
    fused = fuse(model)
    assert fused[0].deploy and verify(model, fused, X).ok
    fused[0].conv.bias.data.zero_()
    assert not verify(model, fused, X).ok, "its branches are used, not its convolution"


class Broken(TwoBranches):
    def fuse(self):
        raise RuntimeError("no such\nkernel")


class NotMerged(TwoBranches):
    """It folds its norms and stays with two convolutions."""

    def reparameterize(self):
        self.three, self.norm3 = pair(self.three, self.norm3), nn.Identity()
        self.one, self.norm1 = pair(self.one, self.norm1), nn.Identity()


class NeedsArgument(nn.Module):
    """A method of the same name that means something else."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x):
        return self.conv(x)

    def fuse(self, other):
        raise AssertionError


def test_what_cannot_be_deployed_is_an_error_in_one_line():
    for kind, message in (
        (Broken, r"^0 \(Broken\) cannot be deployed: its fuse\(\) raised RuntimeError: no such ke"),
        (
            NotMerged,
            r"^0 \(NotMerged\) still has parallel branches after its .*three > norm3 \+ one",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            fuse(nn.Sequential(kind()).eval())
    assert deploy_method(NeedsArgument()) is None and deploy_method(nn.Conv2d(3, 3, 3)) is None
    assert became(fuse(nn.Sequential(NeedsArgument()).eval()))["0.conv"] == "kept"


def test_a_method_that_changes_nothing_is_reported():
    torch.manual_seed(0)
    once = fuse(scrambled(nn.Sequential(Switching())))
    type(once[0]).switch_to_deploy = lambda self: None
    try:
        again = fuse(once)
    finally:
        Switching.switch_to_deploy = lambda self: self.become_one()
    assert reasons(again)["0"] == "its switch_to_deploy() changed nothing"


def test_blocks_that_deploy_themselves_are_not_opened():
    """Neither are their layers converted, nor is a unit with our blocks inside deployed by it."""
    torch.manual_seed(0)
    model = scrambled(nn.Sequential(InPlace(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)))
    converted = convert(model, "dbb")
    told = {entry["name"]: entry["reason"] for entry in converted.conversion}
    assert told["0.three"] == "part of 0 (InPlace), which deploys itself"
    assert verify(model, converted, X).ok and verify(converted, fuse(converted), X).ok
    model[0].three = BLOCKS["repvgg"](3, 8)
    with pytest.warns(UserWarning, match="stay"):
        assert verify(model.eval(), fuse(model), X).ok


class Fusing(nn.Module):
    """`fuse` joins feature maps here."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        return self.fuse(*(layer(x) for layer in self.layers))

    def fuse(self, *maps):
        return torch.cat(maps, 1)


def test_a_method_of_that_name_may_mean_something_else():
    model = scrambled(Fusing(BLOCKS["repvgg"](3, 8), nn.Sequential(Fusing(nn.Identity()))))
    assert verify(model, fuse(model), X).ok


class Copied(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x):
        return self.conv(x)

    def __deepcopy__(self, memo):
        return self


def test_what_cannot_be_copied_is_an_error_in_one_line():
    with pytest.raises(ValueError, match="__deepcopy__ of its own"):
        convert(nn.Sequential(Copied()).eval(), "repvgg")
    with pytest.raises(ValueError, match="scripted"):
        fuse(torch.jit.trace(nn.Conv2d(3, 3, 3), X).eval())


class Container(nn.Module):
    """A network that deploys its own blocks, as some do: they are still seen one by one."""

    def __init__(self):
        super().__init__()
        self.a, self.b = Returning(3, 8), Returning(8, 4)

    def forward(self, x):
        return self.b(self.a(x).relu())

    def fuse(self):
        self.a, self.b = self.a.fuse(), self.b.fuse()
        return self


def test_the_blocks_of_a_network_with_a_method_of_its_own_are_seen_one_by_one():
    model = scrambled(Container())
    assert set(units(model)) == {"a", "b"}
    assert len(verify(model, fuse(model), X).blocks) == 2


# -- what nothing merges ---------------------------------------------------------------------------
class Positions(nn.Module):
    """x + depthwise(x): a convolution, although no class says so."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1, groups=3)

    def forward(self, x):
        return x + self.conv(x)


def test_parallel_branches_of_no_known_class_are_warned_of():
    with pytest.warns(UserWarning, match=r"1 places .* stay: its input \+ 0.conv"):
        fused = fuse(nn.Sequential(Positions()).eval())
    assert "no method to merge" in reasons(fused)["its input + 0.conv"]


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "densenet121", "squeezenet1_0"])
def test_an_ordinary_network_has_no_parallel_branches(name):
    """Residuals and shortcuts are none: an activation stands between."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = getattr(vision, name)(weights=None).eval()
        assert parallel(model) == []


# -- the rest --------------------------------------------------------------------------------------
def test_tracing_leaves_no_trace():
    """A module that caches what it computes would keep symbols."""

    class Caching(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.cache = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), {}

        def forward(self, x):
            self.cache["last"] = out = self.norm(self.conv(x))
            return out

    model = scrambled(nn.Sequential(Caching()))
    fused = fuse(model)
    assert model[0].cache == {} == fused[0].cache
    assert convert(model, "repvgg")[0].cache == {}


def test_train_mode_is_refused_by_name():
    model = net(BLOCKS["repvgg"](3, 8), nn.ReLU())
    model[0].train()
    for function in (fuse, deployed_copy):
        with pytest.raises(ValueError, match=r"^0 is in train mode .*model.eval\(\)"):
            function(model)


def test_a_traced_network_is_fused_too():
    model = net(BLOCKS["repvgg"](3, 8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4))
    from replib.networks import FlowTracer

    graph = torch.fx.GraphModule(model, FlowTracer().trace(model)).eval()
    fused = fuse(graph)
    assert verify(graph, fused, X).ok and not classes_of_ours(fused)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())


def test_the_report_survives_with_the_network():
    fused = fuse(net(BLOCKS["dbb"](3, 8), nn.ReLU()))
    buffer = io.BytesIO()
    torch.save(fused, buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=False).fusion == fused.fusion
