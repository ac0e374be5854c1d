"""A network as a program: what other runtimes compute is the network, or nothing is written."""

import importlib.util
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_blocks import scrambled
from test_cli import refused
from torch import nn

from replib import BLOCKS, convert, export, fuse
from replib.__main__ import main
from replib.blocks import RepBlock
from replib.checkpoint import save_model
from replib.errors import UserError
from replib.export import OPSET, PROGRAMS, Format, OnnxModel, opset_of, read_program
from replib.models import build
from replib.verification import allowed, end_to_end, relative_error

torch.set_num_threads(1)
# torch's exporter to ONNX takes a second or more for the smallest network.
SUFFIXES = [pytest.param(".onnx", marks=pytest.mark.slow), ".pt2"]


class Families(nn.Module):
    """One block of every family, side by side."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleDict({name: family(3, 4) for name, family in BLOCKS.items()})

    def forward(self, x):
        return [block(x) for block in self.blocks.values()]


def seeded(make, *arguments, **options):
    """What is made, in eval mode, the same in every test and far from a fresh network."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return scrambled(make(*arguments, **options)).eval()


def small() -> nn.Module:
    return seeded(lambda: nn.Sequential(BLOCKS["dbb"](3, 4), nn.ReLU(), BLOCKS["repvgg"](4, 4)))


def images(count=4, size=9):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """(the network, the file, the report) of all families in one ONNX file."""
    path, model = tmp_path_factory.mktemp("onnx") / "all.onnx", seeded(Families)
    return model, path, export(model, path, images(3))


# -- agreement -------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", BLOCKS)
@torch.no_grad()
def test_onnx_runtime_computes_every_family(family, families):
    """Within the bound that `verify` has for one block, on images that were not exported with."""
    model, path, report = families
    assert report.ok and report.bytes == path.stat().st_size
    block, place = model.blocks[family], list(BLOCKS).index(family)
    for x in (images(1), 3 * images(5).flip(0)):
        error = relative_error(OnnxModel(path)(x)[place], block.double()(x.double()))
        assert 0 < error <= allowed(torch.float32, 1)
    block.float()


def test_the_deployed_form_alone_is_in_the_file(families):
    onnx = pytest.importorskip("onnx")
    _, path, report = families
    operators = {node.op_type for node in onnx.load(str(path)).graph.node}
    assert operators == {"Conv"} and report.form == "deployed" and report.verification.ok
    assert report.opset == opset_of(path) == OPSET
    assert report.shapes["images"] == "tensor(float) (batch, 3, 9, 9)"


@pytest.mark.parametrize("suffix", PROGRAMS)
@torch.no_grad()
def test_a_program_takes_any_number_of_images(suffix, tmp_path):
    model, path = small(), tmp_path / f"net{suffix}"
    report = export(model, path, images(1))  # of one image, even
    program = PROGRAMS[suffix].read(path)
    for count in (1, 2, 7):
        assert relative_error(program(images(count)), model(images(count))) <= 1e-5
    assert report.ok and [check.name for check in report.checks] == ["1", "2"]
    said = str(report)
    assert f"{path}: {path.stat().st_size:,} bytes" in said and "NOT" not in said
    assert report.record["ok"] and report.record["checks"][0]["name"] == "1"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_says_nothing_of_the_machine(suffix, tmp_path):
    """The exporters write down where the code of every node stands."""
    path = tmp_path / f"net{suffix}"
    export(small(), path, images(2))
    content = path.read_bytes()
    if suffix == ".pt2":
        with zipfile.ZipFile(path) as archive:
            content = b"".join(map(archive.read, archive.namelist()))
    assert b"conv" in content.lower()
    for folder in (str(Path(torch.__file__).parent), str(ROOT), str(tmp_path), "site-packages"):
        assert folder.encode() not in content, folder


def test_a_copy_that_is_written_leaves_the_model_alone(tmp_path):
    model = small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export(model, tmp_path / "net.pt2", images())
    assert not any(isinstance(module, nn.Conv2d) for module in model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.slow
def test_several_inputs_and_channels_last(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = BLOCKS["acb"](3, 4), BLOCKS["repvgg"](3, 4)

        def forward(self, left, right):
            return self.first(left) + self.second(right), left.mean((1, 2, 3))

    model = seeded(Two).to(memory_format=torch.channels_last)
    given = tuple(x.contiguous(memory_format=torch.channels_last) for x in (images(), -images()))
    for suffix in PROGRAMS:
        report = export(model, tmp_path / f"net{suffix}", given)
        assert report.ok, str(report)
    assert list(export(model, tmp_path / "net.onnx", given).shapes) == [
        "images_0", "images_1", "outputs_0", "outputs_1"
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("source", ["torchvision", "timm"])
@pytest.mark.parametrize("suffix", PROGRAMS)
def test_whole_networks(source, suffix, tmp_path):
    if source == "timm":  # blocks of another code, fused by its own method
        timm = pytest.importorskip("timm")
        model = seeded(timm.create_model, "repvgg_a0", num_classes=5)
    else:
        from torchvision.models import resnet18

        model = convert(seeded(resnet18, num_classes=5), "dbb").eval()
    report = export(model, tmp_path / f"net{suffix}", images(4, 64))
    assert report.ok and report.verification.blocks, str(report)


# -- what is not the network is not written --------------------------------------------------------
def broken(write):
    """A writer whose file computes something else, by little."""

    def wrong(model, path, inputs, **options):
        with torch.no_grad():
            model[2].bias[1] += 1e-3
        write(model, path, inputs, **options)

    return wrong


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_that_computes_otherwise_is_not_written(suffix, tmp_path, monkeypatch):
    form, path = PROGRAMS[suffix], tmp_path / f"net{suffix}"
    path.write_bytes(b"old")
    monkeypatch.setitem(PROGRAMS, suffix, Format(broken(form.write), form.read))
    report = export(small(), path, images())
    assert report.verification.ok and not report.ok and report.bytes == 0
    assert "NOT WRITTEN" in str(report) and "NOT EQUAL" in str(report)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def dropped_bias(monkeypatch):
    real = RepBlock.deploy

    def deploy(block):
        conv = real(block)
        conv.bias.data[0] = 0
        return conv

    monkeypatch.setattr(RepBlock, "deploy", deploy)


def test_a_wrong_merge_is_not_written(tmp_path, monkeypatch):
    dropped_bias(monkeypatch)
    report = export(small(), tmp_path / "net.onnx", images())
    assert not report.ok and "NOT EQUAL" in str(report) and not list(tmp_path.iterdir())


def test_branches_are_exported_with_a_warning_only(tmp_path):
    model, path = small(), tmp_path / "net.pt2"
    with pytest.warns(UserWarning, match="2 blocks are exported with their branches"):
        report = export(model, path, images(), form="training")
    assert report.ok and report.verification is None and report.form == "training"
    names = {name for name, _ in read_program(path).named_parameters()}
    assert names == {name for name, _ in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export(fuse(model), path, images(), form="training")  # which has no branches


class Choosy(nn.Module):
    """What it does depends on what it sees."""

    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_a_network_that_cannot_be_followed_is_told_in_one_line(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 3, 1), Choosy()).eval()
    with pytest.raises(UserError, match=r"Sequential cannot be written as \.pt2 \(torch\.exp") as e:
        export(model, tmp_path / "net.pt2", images())
    assert "\n" not in str(e.value) and not list(tmp_path.iterdir())


def test_what_cannot_be_is_refused(tmp_path, monkeypatch):
    model, path = small(), tmp_path / "net.onnx"
    with pytest.raises(ValueError, match=r"call \.eval\(\) before exporting"):
        export(small().train(), path, images())
    with pytest.raises(UserError, match=r"path \(='.*net.pth'\) must end in .onnx or .pt2"):
        export(model, tmp_path / "net.pth", images())
    with pytest.raises(UserError, match=r"form \(='fused'\) must be deployed or training"):
        export(model, path, images(), form="fused")
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxscript" else found(name)
    )
    with pytest.raises(UserError, match=r'needs onnxscript, .* pip install "replib\[export\]"'):
        export(model, path, images())
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_what_onnx_runtime_has_not_is_refused(tmp_path):
    path = tmp_path / "net.onnx"
    with pytest.raises(UserError, match=r"opset \(=99\) cannot be had"):
        export(small(), path, images(), opset=99)
    with pytest.raises(UserError, match=r"its numbers are torch.float64: export model.float\(\)"):
        export(small().double(), path, images().double())
    assert not list(tmp_path.iterdir())


# -- from the command line -------------------------------------------------------------------------
@pytest.fixture
def network(project):
    path = project.folder / "net.safetensors"
    save_model(seeded(build, "digits", "repvgg", classes=10, in_channels=1), path)
    return path


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_is_exported_by_a_command(suffix, network, project, capfd):
    out = project.folder / f"net{suffix}"
    assert main(["export", str(network), "--data", "digits", "--out", str(out)]) == 0
    printed = capfd.readouterr()
    assert printed.err == "" and f"{out}: {out.stat().st_size:,} bytes" in printed.out
    assert "seen: 32 test images of digits" in printed.out
    assert "batches of 1, 3, 32" in printed.out
    again = ["export", str(network), "--shape", "1,8,8", "--form", "training", "--out", str(out)]
    assert main(again) == 0
    printed = capfd.readouterr()
    assert printed.err.startswith("replib: 4 blocks are exported with") and "noise" in printed.out
    assert printed.err.count("\n") == 1


def test_a_wrong_merge_ends_with_status_1(network, project, capfd, monkeypatch):
    dropped_bias(monkeypatch)
    out = project.folder / "net.onnx"
    assert main(["export", str(network), "--shape", "1,8,8", "--out", str(out)]) == 1
    assert "NOT WRITTEN" in capfd.readouterr().out and not out.exists()


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--out", "net.onnx"], ["--data", "--shape 3,224,224"]),
        (["--out", "net.onnx", "--shape", "1,8,8", "--data", "digits"], ["--data", "--shape"]),
        (["--out", "net.onnx", "--shape", "1,x,8"], ["--shape (='1,x,8')"]),
        (["--out", "net.onnx", "--shape", "1,8,0"], ["--shape (='1,8,0')"]),
        (["--out", "net.onnx", "--shape", "3,8,8"], ["net.safetensors", "channels"]),
        (["--out", "net.pth", "--shape", "1,8,8"], ["--out (='net.pth')", ".onnx or .pt2"]),
        (["--out", "net.onnx", "--shape", "1,8,8", "--opset", "0"], ["--opset (=0)"]),
    ],
)
def test_a_mistake_is_told_in_one_line(arguments, named, network, project, capfd, monkeypatch):
    monkeypatch.chdir(project.folder)
    refused(capfd, ["export", str(network), *arguments], named)
    assert not list(project.folder.glob("net.onnx"))


@pytest.mark.slow
def test_deploy_writes_onnx_too(network, project, capfd):
    out = project.folder / "net.onnx"
    assert main(["deploy", str(network), "--data", "digits", "--out", str(out)]) == 0
    assert f"{out}: {out.stat().st_size:,} bytes" in capfd.readouterr().out
    assert opset_of(out) == OPSET


class Casts(nn.Module):
    """A network that knows one type."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(2, 3, 3)

    def forward(self, x):
        return self.layer(x.float())


def test_a_network_with_a_cast_of_its_own_is_compared_in_its_own_type(tmp_path):
    report = export(Casts().eval(), tmp_path / "net.pt2", torch.randn(4, 2, 6, 6))
    assert report.ok and "it cannot be run in float64" in str(report)
    assert (tmp_path / "net.pt2").is_file()


def test_where_rounding_grows_a_runtime_may_be_off_by_more_than_the_network_itself():
    wanted = torch.tensor([1.0, -2.0], dtype=torch.float64)
    itself, other = wanted + 2e-4, wanted + 2e-3
    for slack, ok in ((4, False), (16, True)):
        assert end_to_end(other, itself, wanted, 1e-5, slack=slack)[0].ok is ok
    assert not end_to_end(other, wanted + 1e-6, wanted, 1e-5, slack=16)[0].ok, "it is exact"
    assert not end_to_end(wanted + 1.0, wanted + 0.3, wanted, 1e-5, slack=16)[0].ok
