"""train, test and deploy: one network from the command line, and what they refuse."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import at_home
from safetensors.torch import load_file, save_file
from test_blocks import scrambled
from test_cli import refused, spoil, tree
from torch import nn

from replib import convert, official, tools
from replib.__main__ import main
from replib.blocks import RepBlock
from replib.checkpoint import load_model, save_model
from replib.experiments import cells, executor
from replib.experiments.cells import trained_model
from replib.experiments.store import Store
from replib.models import build
from replib.models.repvgg import SIZES
from replib.training import loop
from replib.training.data import load
from replib.verification import Check, Verification

torch.set_num_threads(1)
TRAIN = ["train", "--body", "digits", "--block", "repvgg", "--data", "digits", "--train-images",
         "80", "--held-out", "20", "--epochs", "3", "--batch-size", "20",
         "--device", "cpu"]  # fmt: skip


def trained_to(path: Path, *more: str) -> list[str]:
    return [*TRAIN, "--out", str(path), *more]


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> Path:
    """A network that `train` wrote, in a project of its own."""
    with at_home(tmp_path_factory.mktemp("train"), {}) as home:
        assert main(trained_to(home.folder / "net.safetensors")) == 0
    return home.folder / "net.safetensors"


@pytest.fixture
def pictures(project) -> Path:
    """An image folder of two classes, 8x8, and in it nothing of the user's own cache."""
    load.cache_clear()
    return tree(project.folder / "pictures", images=3)


def accuracies(network: nn.Module, k: int) -> float:
    """Top-k accuracy in percent on the test digits, image by image."""
    data, right = load("digits"), 0
    with torch.no_grad():
        logits = network(data.normalised(data.test_images)).tolist()
    for image, label in enumerate(data.test_labels.tolist()):
        best = sorted(range(10), key=lambda c: -logits[image][c])[:k]
        right += label in best
    return 100 * right / len(logits)


def row(printed: str, name: str) -> dict[str, str]:
    """A row of the table that was printed."""
    (head,) = (line for line in printed.splitlines() if line.startswith("form "))
    (line,) = (line for line in printed.splitlines() if line.startswith(f"{name} "))
    return dict(zip(head.split(), line.replace(" %", "").split(), strict=True))


# -- train -----------------------------------------------------------------------------------------
def test_train_is_a_cell_that_is_trained_once(project, in_process, capfd, monkeypatch):
    path, epochs = project.folder / "net.safetensors", []
    real = loop.Run.train_epoch
    monkeypatch.setattr(loop.Run, "train_epoch", lambda *a: epochs.append(1) or real(*a))
    assert main(trained_to(path)) == 0
    first = capfd.readouterr().out
    (folder,) = Store().runs.iterdir()
    result = Store().read_any(folder.name)["result"]
    assert len(epochs) == result["parameters"]["epochs"] == 3
    final = result["final"]
    assert f"test         {100 * final['selected']:.2f} % of 797 images" in first
    assert f"epoch {final['selected_epoch'] + 1} of 3, selected by validation" in first
    cell = cells.Cell.model_validate(result["parameters"])
    selected = trained_model(cells.Planned(result["key"], cell), Store())
    written = load_model(path)
    assert selected.state_dict().keys() == written.state_dict().keys()
    for name, tensor in selected.state_dict().items():
        assert torch.equal(tensor, written.state_dict()[name])
    first = path.read_bytes()
    path.unlink()
    assert main(trained_to(path)) == 0
    assert len(epochs) == 3 and path.read_bytes() == first
    assert "was trained before" in capfd.readouterr().out
    (folder / "weights.ckpt").unlink()  # the evidence alone is no network
    assert main(trained_to(path)) == 0
    assert len(epochs) == 6 and path.read_bytes() == first


def test_train_goes_on_where_it_was_stopped(project, in_process, network, monkeypatch, capfd):
    path, epochs = project.folder / "net.safetensors", []
    real_cell, real_epoch = executor.run_cell, loop.Run.train_epoch

    def stopped(*arguments, **options):
        def tick():
            if len(epochs) == 3:
                raise KeyboardInterrupt

        real_cell(*arguments, **options | {"checkpoint_seconds": -1, "tick": tick})

    monkeypatch.setattr(loop.Run, "train_epoch", lambda *a: epochs.append(1) or real_epoch(*a))
    with monkeypatch.context() as patch:
        patch.setattr(executor, "run_cell", stopped)
        assert main(trained_to(path)) == 130
    assert not path.exists() and len(epochs) == 3
    assert main(trained_to(path)) == 0
    assert "3/3" in capfd.readouterr().out
    assert len(epochs) == 4  # two were checkpointed
    assert path.read_bytes() == network.read_bytes()


def test_train_takes_every_key_and_starts_from_a_file(project, in_process, network):
    path = project.folder / "again.safetensors"
    more = ["--start", str(network), "--learning-rate", "0", "--protocol", "paper"]
    more += ["--set", "decay=weights", "--set", "cycle={warmup: 1, freeze: skip}"]
    more += ["--set", "cycle.restructure=none", "--set", "momentum=0", "--seed", "5"]
    assert main(trained_to(path, *more)) == 0
    (folder,) = Store().runs.iterdir()
    parameters = Store().read_any(folder.name)["result"]["parameters"]
    assert parameters["cycle"]["freeze"] == "skip" and parameters["momentum"] == 0
    assert (parameters["seed"], parameters["held_out"]) == (5, 20)
    assert parameters["start"].startswith("file:")
    for name, tensor in load_model(network).named_parameters():
        assert torch.equal(tensor, load_model(path).get_parameter(name))


def test_train_learns_from_a_teacher_and_holds_out_a_tenth(project, in_process):
    teacher, path = project.folder / "teacher.safetensors", project.folder / "net.safetensors"
    assert main(trained_to(teacher)) == 0
    (folder,) = Store().runs.iterdir()
    more = ["--epochs", "1", "--held-out", "0", "--set", f"teacher={folder.name}"]
    more += ["--set", "distill={alpha: 0.9, temperature: 10}"]
    assert main(trained_to(path, *more)) == 0
    (own,) = (f for f in Store().runs.iterdir() if f != folder)
    result = Store().read_any(own.name)["result"]
    assert result["parameters"]["teacher"].startswith(folder.name)
    assert result["images"] == {"train": 72, "held_out": 8}


# -- test ------------------------------------------------------------------------------------------
def test_test_counts_as_a_plain_loop_does(network, capfd):
    model = load_model(network).eval()
    assert main(["test", str(network), "--data", "digits", "--batch-size", "300"]) == 0
    printed = capfd.readouterr().out
    for form in ("training", "deployed"):
        for k in (1, 5):
            assert row(printed, form)[f"top-{k}"] == f"{accuracies(model, k):.2f}"
    parameters = sum(p.numel() for p in model.parameters())
    assert row(printed, "training")["parameters"] == f"{parameters:,}"
    kernels = [block.merged() for block in model.modules() if isinstance(block, RepBlock)]
    left = sum(k.weight.numel() + k.bias.numel() for k in kernels)
    left += sum(p.numel() for p in model.fc.parameters())
    assert row(printed, "deployed")["parameters"] == f"{left:,}"
    assert row(printed, "deployed")["convolutions"] == f"{len(kernels)}"
    assert row(printed, "deployed")["norms"] == "0"
    assert "797 images" in printed and "0, 1, 2, 3" in printed


@pytest.mark.parametrize("form", ["training", "deployed"])
def test_test_of_one_form(form, network, capfd):
    assert main(["test", str(network), "--data", "digits", "--form", form]) == 0
    printed = capfd.readouterr().out
    assert row(printed, form) and ("deployed " in printed) == (form == "deployed")


def test_ties_are_broken_as_argmax_breaks_them(capfd):
    """A network that says the same of every class is right for the first class only."""
    data = load("digits")
    model = build("digits", "convbn", classes=10, in_channels=1).eval()
    nn.init.zeros_(model.fc.weight), nn.init.zeros_(model.fc.bias)
    form = tools.measured("training", model, data, "cpu", 300)
    for k in (1, 5):
        share = (data.test_labels < k).double().mean().item()
        assert form.top(k) == pytest.approx(share, abs=1e-12)


def test_few_classes_have_no_top_5(pictures, capfd):
    path = pictures.parent / "net.safetensors"
    save_model(build("digits", "acb", classes=2, in_channels=3), path)
    assert main(["test", str(path), "--data", str(pictures)]) == 0
    printed = capfd.readouterr().out
    assert "top-5" not in printed and "sorted folder names: cat, dog" in printed
    assert row(printed, "deployed")["top-1"] in ("0.00", "50.00", "100.00")


def test_what_is_not_finite_is_not_right(network, project, capfd):
    path = project.folder / "nan.safetensors"
    model = load_model(network)
    nn.init.constant_(model.fc.bias, float("nan"))
    save_model(model, path)
    assert main(["test", str(path), "--data", "digits"]) == 0
    printed = capfd.readouterr().out
    assert row(printed, "training")["top-1"] == row(printed, "training")["top-5"] == "0.00"
    assert "deployed: 797 images have outputs that are not finite" in printed


# -- deploy ----------------------------------------------------------------------------------------
def deployed(network: Path, out: Path, *more: str, data: str = "digits") -> int:
    return main(["deploy", str(network), "--data", data, "--out", str(out), *more])


def test_deploy_writes_what_test_and_others_read(network, project, capfd):
    out = project.folder / "new" / "deployed.safetensors"
    assert deployed(network, out) == 0
    printed = capfd.readouterr().out
    assert "equal: 4 blocks" in printed and "0 images are classified otherwise" in printed
    before, after = row(printed, "before"), row(printed, "after")
    assert (after["convolutions"], after["norms"]) == ("4", "0") and before["norms"] == "9"
    tensors = load_file(out)
    assert sum(t.numel() for t in tensors.values()) == int(after["parameters"].replace(",", ""))
    assert "stages.0.0.block.weight" in tensors
    assert main(["test", str(out), "--data", "digits"]) == 0
    again = row(capfd.readouterr().out, "deployed")
    assert again["top-1"] == before["top-1"] == after["top-1"]
    refused(capfd, ["test", str(out), "--data", "digits", "--form", "training"], ["no block"])
    assert [path.name for path in out.parent.iterdir()] == [out.name]


@pytest.mark.parametrize(
    "body, sizes, suffix",
    [
        ("resmlp12", "[3]", "safetensors"),
        ("cifar_repmlpnet", "[1, 3]", "pt2"),
    ],
)
@pytest.mark.slow
def test_networks_of_dense_maps_go_all_the_way(body, sizes, suffix, project, in_process, capfd):
    """Trained, tested and deployed with the convolutions in the dense maps."""
    path = project.folder / "net.safetensors"
    more = ["train", "--body", body, "--data", "digits", "--image-size", "16", "--out", str(path)]
    more += ["--train-images", "60", "--held-out", "20", "--epochs", "1", "--batch-size", "20"]
    more += ["--device", "cpu", "--set", "width=0.125"]
    more += ["--set", f"body_options={{window: 4, sizes: {sizes}}}"]
    assert main(more) == 0
    capfd.readouterr()
    out = project.folder / f"deployed.{suffix}"
    assert deployed(path, out, "--image-size", "16") == 0
    printed = capfd.readouterr().out
    before, after = row(printed, "before"), row(printed, "after")
    assert "equal: " in printed and before["top-1"] == after["top-1"]
    assert int(after["convolutions"]) == int(before["convolutions"]) - 12 * len(eval(sizes))
    if suffix == "safetensors":
        assert main(["test", str(out), "--data", "digits", "--image-size", "16"]) == 0
        assert row(capfd.readouterr().out, "deployed")["top-1"] == before["top-1"]
        return
    images = torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, found = load_model(path).eval()(images), torch.export.load(out).module()(images)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_program_runs_without_this_library(network, project, capfd):
    """In a process that cannot import replib, on as many images as one likes."""
    out = project.folder / "deployed.pt2"
    out.write_bytes(b"old")
    assert deployed(network, out) == 0
    script = (
        "import sys, torch\nsys.modules['replib'] = None\nprogram = torch.export.load(sys.argv[1])"
        "\nprint(torch.stack([program.module()(torch.full((n, 1, 8, 8), 0.5))[-1] for n in"
        " (1, 2, 7)]).tolist())"
    )
    command = [sys.executable, "-W", "ignore", "-c", script, str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=project.folder)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        wanted = load_model(network).eval()(torch.full((1, 1, 8, 8), 0.5)).expand(3, 10)
    torch.testing.assert_close(torch.tensor(eval(done.stdout)), wanted, rtol=1e-4, atol=1e-5)


@pytest.fixture
def released(pictures) -> Path:
    """A file as RepAn's code saves it."""
    torch.manual_seed(3)
    model = scrambled(build("cifar_repvgg_a0", "repvgg", classes=2, in_channels=3).eval())
    torch.save(official.export(model, "repan_repvgg_a0"), pictures.parent / "repan.pyth")
    return pictures.parent / "repan.pyth"


def test_released_files_are_tested_and_deployed(released, pictures, capfd):
    arch, data = ["--arch", "repan_repvgg_a0"], ["--data", str(pictures)]
    assert main(["test", str(released), *data, *arch]) == 0
    assert row(capfd.readouterr().out, "deployed")["convolutions"] == "22"
    out = pictures.parent / "deployed.pth"
    assert deployed(released, out, *arch, "--layout", "official", data=data[1]) == 0
    state = torch.load(out, weights_only=True)["model_state"]
    assert "stages.0.sequential.0.fuse_conv.weight" in state or len(state) == 2 * 22 + 2
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        wanted = official.load_model(released, arch[1]).eval()(x)
        got = official.load_model(out, arch[1]).eval()(x)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())
    ours = pictures.parent / "ours.safetensors"
    assert deployed(released, ours, *arch, data=data[1]) == 0
    back = pictures.parent / "back.pth"
    assert deployed(ours, back, *arch, "--layout", "official", data=data[1]) == 0
    assert torch.load(back, weights_only=True)["model_state"].keys() == state.keys()


def test_classifiers_beside_are_not_deployed(pictures, monkeypatch):
    monkeypatch.setitem(SIZES, "l2", ((1, 1, 2, 1), (0.125, 0.125, 0.125, 0.0625)))
    arch, path = "repvggplus_l2pse", pictures.parent / "plus.pth"
    model = scrambled(build(arch, "repvgg", classes=2, in_channels=3).eval())
    torch.save(official.export(model, arch), path)
    assert any("_aux" in key for key in torch.load(path))
    out = pictures.parent / "deployed.pth"
    more = ["--arch", arch, "--image-size", "32", "--layout", "official"]
    assert deployed(path, out, *more, data=str(pictures)) == 0
    assert not any("_aux" in key for key in torch.load(out))


def test_a_converted_network_of_torchvision_is_deployed(pictures, capfd):
    from torchvision.models import shufflenet_v2_x0_5

    path, out = (pictures.parent / name for name in ("net.safetensors", "out.safetensors"))
    torch.manual_seed(0)
    save_model(convert(scrambled(shufflenet_v2_x0_5(num_classes=2).eval()), "repvgg"), path)
    assert deployed(path, out, "--image-size", "32", data=str(pictures)) == 0
    assert row(capfd.readouterr().out, "after")["norms"] == "0"
    assert not any("running" in key or "branches" in key for key in load_file(out))


# -- faults ----------------------------------------------------------------------------------------
def dropped_bias(monkeypatch) -> None:
    """The merge forgets one bias of one block."""
    real = RepBlock.deploy

    def deploy(self):
        conv = real(self)
        conv.bias.data[0] = 0
        return conv

    monkeypatch.setattr(RepBlock, "deploy", deploy)


def not_deployed(capfd, network: Path, out: Path, *said: str) -> None:
    """Status 1, one line on standard error, and the old file stays."""
    out.write_bytes(b"old")
    assert deployed(network, out) == 1
    printed = capfd.readouterr()
    assert printed.err.count("\n") == 1 and printed.err.startswith(f"replib: {out} is not written")
    assert out.read_bytes() == b"old"
    assert not [path for path in out.parent.iterdir() if path.name.startswith("tmp")]
    for text in said:
        assert text in printed.out + printed.err


@pytest.mark.parametrize("suffix", ["safetensors", "pt2"])
def test_a_wrong_merge_is_not_written(suffix, network, project, capfd, monkeypatch):
    dropped_bias(monkeypatch)
    said = ["NOT EQUAL", "4 of them differ", "the function changed"]
    not_deployed(capfd, network, project.folder / f"out.{suffix}", *said)


def test_a_wrong_merge_is_seen_on_all_images(network, project, capfd, monkeypatch):
    """The bound on the outputs of the test split stands alone, too."""
    dropped_bias(monkeypatch)
    passed = Verification(Check("", None, 0.0, 1e-5))
    monkeypatch.setattr(tools, "verify", lambda *arguments: passed)
    not_deployed(capfd, network, project.folder / "out.safetensors", "equal: 0 blocks", "changed")


def test_a_wrong_merge_is_seen_block_by_block(network, project, capfd, monkeypatch):
    """So is the one of `verify`, where the outputs of the test split are not looked at."""
    dropped_bias(monkeypatch)
    monkeypatch.setattr(tools, "relative_error", lambda got, wanted: 0.0)
    not_deployed(capfd, network, project.folder / "out.safetensors", "NOT EQUAL")


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("where", ["fc.bias", "stages.1.0.block.branches.1x1.1.norm.running_var"])
def test_what_is_not_finite_is_not_written(value, where, network, project, capfd):
    model, path = load_model(network), project.folder / "net.safetensors"
    model.state_dict()[where][0] = float(value) * (-1 if "var" in where else 1)
    save_model(model, path)
    not_deployed(capfd, path, project.folder / "out.safetensors", "NOT EQUAL", "not finite")


@pytest.mark.parametrize("suffix", ["safetensors", "pt2"])
def test_a_file_that_reads_otherwise_is_not_written(suffix, network, project, capfd, monkeypatch):
    form = tools.FORMATS[f".{suffix}"]

    def write(model, path, x):
        model.stages[0][0].block.bias.data[0] += 1
        form.write(model, path, x)
        model.stages[0][0].block.bias.data[0] -= 1

    monkeypatch.setitem(tools.FORMATS, f".{suffix}", tools.Format(write, form.read))
    not_deployed(capfd, network, project.folder / f"out.{suffix}", "read back, it differs")


# -- mistakes --------------------------------------------------------------------------------------
BAD_TRAININGS = {
    "no such body": (["--body", "digit"], ["body (='digit')", "digits_wide"]),
    "no such block": (["--block", "repvg"], ["block (='repvg')", "repvgg"]),
    "no such data": (["--data", "mnist"], ["--data (='mnist')", "cifar100", "image folder"]),
    "no image folder": (["--data", "imagefolder"], ["data_dir is missing"]),
    "a body that has no such block": (["--block", "orepa_1x1"], ["block=orepa_1x1"]),
    "a body that has no blocks": (["--body", "cifar_resnet110"], ["block=repvgg", "leave --block"]),
    "a key that is none": (["--set", "epoch=3"], ["epoch (=3)", "perhaps epochs is meant"]),
    "a key twice": (["--set", "flip=true", "--set", "flip=true"], ["flip is set twice"]),
    "no number": (["--epochs", "many"], ["--epochs", "many"]),
    "no epochs": (["--epochs", "0"], ["epochs (=0)"]),
    "too many images": (["--train-images", "2000"], ["train_images (=2000)", "1000"]),
    "all held out": (["--held-out", "80"], ["held_out (=80)", "79"]),
    "an absent start": (["--start", "absent.pth"], ["start (=", "absent.pth", "No such file"]),
    "an unknown teacher": (
        ["--set", "teacher=0123456789abcdef", "--set", "distill={alpha: 1, temperature: 1}"],
        ["teacher (='0123456789abcdef')", "evidence"],
    ),
    "a teacher, and no loss": (["--set", "distill={alpha: 1, temperature: 1}"], ["teacher"]),
    "another suffix": (["--out", "net.pth"], ["--out (='net.pth')", ".safetensors"]),
    "a folder": (["--out", "params.safetensors"], ["is a folder"]),
    "below a file": (["--out", "file/net.safetensors"], ["file: "]),
    "no GPU": (["--device", "cuda"], ["device (=cuda)"]),
}


@pytest.mark.parametrize("case", BAD_TRAININGS)
def test_a_training_that_cannot_be(case, project, capfd, monkeypatch):
    monkeypatch.chdir(project.folder)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (project.folder / "file").touch()
    (project.folder / "params.safetensors").mkdir()
    more, named = BAD_TRAININGS[case]
    refused(capfd, trained_to(Path("net.safetensors"), *more), named)
    assert not (project.folder / "reports" / "runs").exists()


BAD_FILES = {  # a name -> (its content, further arguments, what the line names)
    "absent": (None, [], ["absent", "No such file"]),
    "empty": (b"", [], ["empty", "no network of replib", "--arch"]),
    "text": (b"no network at all", [], ["text", "no network of replib", "--arch"]),
    "text of an arch": (b"no network", ["--arch", "repvgg_a0"], ["cannot be read"]),
    "nothing of an arch": (b"", ["--arch", "repvgg_a0"], ["nothing of an arch", "cannot be read"]),
    "a number": (b"I5\n.", ["--arch", "repvgg_a0"], ["a number"]),
    "cut": (slice(None, -100), [], ["cut", "cannot be read"]),
    "cut short": (slice(None, 200), [], ["cut short", "cannot be read"]),
    "flipped": (slice(None, -4), [], ["flipped", "damaged"]),
    "ours, of an arch": (slice(None), ["--arch", "repvgg_a0"], ["leave --arch (=repvgg_a0) out"]),
}


@pytest.mark.parametrize("command", ["test", "deploy"])
@pytest.mark.parametrize("case", BAD_FILES)
def test_a_file_that_is_no_network(command, case, network, project, capfd):
    content, more, named = BAD_FILES[case]
    path, whole = project.folder / case, network.read_bytes()
    if isinstance(content, slice):
        content = whole[content] + (bytes(4) if case == "flipped" else b"")
    if content is not None:
        path.write_bytes(content)
    out = ["--out", str(project.folder / "out.pt2")] if command == "deploy" else []
    refused(capfd, [command, str(path), "--data", "digits", *more, *out], named)
    assert not (project.folder / "out.pt2").exists()


def test_a_safetensors_file_of_somebody_else(project, capfd):
    path = project.folder / "other.safetensors"
    save_file({"x": torch.ones(1)}, path)
    refused(capfd, ["test", str(path), "--data", "digits"], [str(path), "no manifest"])


def test_an_architecture_that_is_not_the_file_s(released, pictures, capfd):
    test = ["test", str(released), "--data", str(pictures)]
    refused(capfd, test, ["no network of replib", "--arch (repan_repvgg_a0, "])
    refused(capfd, [*test, "--arch", "vgg"], ["arch (='vgg')", "repan_repvgg_a0"])
    refused(capfd, [*test, "--arch", "repan_repvgg_b0"], [str(released), "does not fit"])
    refused(capfd, [*test, "--arch", "repvgg_a0"], [str(released), "linear.weight"])


def test_data_that_do_not_fit_the_network(network, pictures, capfd):
    for command in (["test"], ["deploy", "--out", str(pictures / "out.pt2")]):
        colour = [*command, str(network), "--data", str(pictures)]
        refused(capfd, colour, ["takes no images of imagefolder:pictures (3x8x8)"])
    other = pictures.parent / "other.safetensors"
    save_model(build("digits", "acb", classes=7, in_channels=1), other)
    refused(capfd, ["test", str(other), "--data", "digits"], ["7 classes, digits has 10: 0, 1"])


@pytest.mark.parametrize("what", ["empty", "no test part", "one class"])
def test_data_without_classes(what, network, project, capfd):
    spoil(project.folder / "pictures", what)
    data = ["--data", str(project.folder / "pictures")]
    refused(capfd, ["test", str(network), *data], [str(project.folder / "pictures")])
    refused(capfd, trained_to(project.folder / "n.safetensors", *data), ["pictures"])


BAD_OUTPUTS = {
    "another suffix": (["out.tflite"], ["--out (='out.tflite')", ".safetensors"]),
    "no suffix": (["out"], ["--out (='out')"]),
    "itself": (["net.safetensors"], ["--out (='net.safetensors') is the network itself"]),
    "a folder": (["folder.pt2"], ["is a folder"]),
    "below a file": (["file/out.pt2"], ["file: "]),
    "official, of nothing": (["out.pth", "--layout", "official"], ["--arch", "repvgg_a0"]),
    "official, as a program": (
        ["out.pt2", "--layout", "official", "--arch", "repvgg_a0"],
        ["--out (='out.pt2')", ".pth"],
    ),
    "official, of another network": (
        ["out.pth", "--layout", "official", "--arch", "repvgg_a0"],
        ["out.pth cannot be written", "no repvgg_a0"],
    ),
    "no batch": (["out.pt2", "--batch-size", "0"], ["--batch-size (=0)"]),
    "no pixels": (["out.pt2", "--image-size", "0"], ["--image-size (=0)"]),
    "no GPU": (["out.pt2", "--device", "cuda"], ["device (=cuda)"]),
}


@pytest.mark.parametrize("case", BAD_OUTPUTS)
def test_an_output_that_cannot_be(case, network, project, capfd, monkeypatch):
    monkeypatch.chdir(project.folder)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    Path("net.safetensors").write_bytes(network.read_bytes())
    Path("file").touch()
    Path("folder.pt2").mkdir()
    before = sorted(project.folder.iterdir())
    more, named = BAD_OUTPUTS[case]
    arguments = ["deploy", "net.safetensors", "--data", "digits", "--out", *more]
    refused(capfd, arguments, named)
    assert sorted(project.folder.iterdir()) == before
    assert Path("net.safetensors").read_bytes() == network.read_bytes()
