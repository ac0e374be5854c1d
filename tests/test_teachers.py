"""A teacher may be a row, the key of a cell, a file, or a network of torchvision or timm."""

import shutil
import sys
from dataclasses import replace
from urllib.error import URLError

import pytest
import torch
from conftest import TINY
from test_data import folder
from torch import nn

from replib.checkpoint import save_model
from replib.errors import UserError
from replib.experiments import cells, teachers
from replib.experiments.cells import dataset, plan, run_cell, teacher_of, trained_model
from replib.experiments.params import Table
from replib.experiments.store import Store
from replib.experiments.teachers import Restandardised, opened
from replib.models import build
from replib.report.results import Results
from replib.tools import plan_of
from replib.training.data import STATISTICS, load
from replib.training.evaluation import Split, accuracy

CELL = dict(data="digits", train_images=60, held_out=20, body="digits", epochs=1,
            batch_size=40, learning_rate=0.1)  # fmt: skip
DISTILL = {"alpha": 0.9, "temperature": 4.0}
IMAGENET = STATISTICS["imagefolder"]


@pytest.fixture(autouse=True)
def one_thread(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    teachers._opened.cache_clear()
    load.cache_clear()


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


def table(teacher=None, **cell):
    """A table of one row, which learns from this teacher."""
    distill = {"distill": DISTILL} if teacher else {}
    row = {"label": "row", "teacher": teacher, "set": distill}
    return Table.model_validate(
        dict(title="t", question="q", control="row", seeds=[0], cell=CELL | cell, rows={"row": row})
    )


def only(plan):
    """The last cell of a plan."""
    return list(plan.cells.values())[-1]


def trained(table, store):
    """Run every missing cell of a table in this process."""
    made = plan(table, store)
    for planned in made.missing(store):
        run_cell(planned, made.cells, store)
    return only(made)


def network(seed=3, body="digits_wide", block="acb", classes=10, in_channels=1):
    """A network of random weights and statistics, in eval mode."""
    torch.manual_seed(seed)
    model = build(body, block, classes=classes, in_channels=in_channels)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


def says_the_same(planned, store, model, data=None):
    """Whether the teacher of a cell computes this network, on real images."""
    data = data or dataset(planned.cell)
    x = data.normalised(data.test_images[:16])
    with torch.no_grad():
        got, want = teacher_of(planned, {}, store)(x), model(x)
    assert want.std() > 1e-3
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


# -- what a teacher can be -------------------------------------------------------------------------
@pytest.mark.parametrize("length", [16, 64])
def test_the_key_of_a_cell(store, length):
    parent = trained(table(body="digits_wide"), store)
    made = plan(table(parent.key[:length]), store)
    assert list(made.cells) == [parent.key, only(made).key] and made.missing(store) == [only(made)]
    child = trained(table(parent.key[:length]), store)
    assert child.cell.teacher == parent.key and child.cell.teacher_mean is None
    found = store.read(child.key)["result"]["teacher"]
    theirs = store.read(parent.key)["result"]["deployed"]
    assert (found["name"], found["digest"]) == ("digits_wide", parent.key)
    assert {k: found[k] for k in ("parameters", "test_accuracy")} == {
        k: theirs[k] for k in ("parameters", "test_accuracy")
    }


def test_a_safetensors_file_knows_its_structure(store, tmp_path):
    model, path = network(), tmp_path / "a.safetensors"
    save_model(model, path)
    planned = trained(table(str(path)), store)
    assert planned.cell.teacher.startswith("file:") and planned.parents == {}
    says_the_same(planned, store, model)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_state_dict_of_a_body_of_ours(store, tmp_path, wrapped):
    model, path = network(), tmp_path / "a.pth"
    state = model.state_dict()
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in state.items()}} if wrapped else state, path
    )
    planned = only(plan(table(f"digits_wide/acb={path}"), store))
    says_the_same(planned, store, model)
    assert not any(".branches." in name for name in teacher_of(planned, {}, store).state_dict())


def test_the_weights_that_a_cell_left(store):
    parent = trained(table(), store)
    path = store.folder(parent.key) / "weights.ckpt"
    planned = only(plan(table(f"digits={path}"), store))
    assert planned.parents == {}
    says_the_same(planned, store, trained_model(parent, store))


def images(tmp_path, size=(8, 8), classes=2):
    """A folder of colour images as parameters of a cell."""
    root = folder(tmp_path / "images", images=8, size=size)
    return dict(data="imagefolder", data_dir=str(root), train_images=16, held_out=4)


@pytest.mark.parametrize("form", ["cifar_resnet110={}", "repan_teacher_resnet110={}"])
def test_repans_teacher_of_cifar10(store, tmp_path, form):
    """A dictionary with `state_dict`, names that begin with module., as published."""
    model, path = network(7, "cifar_resnet110", classes=2, in_channels=3), tmp_path / "net.th"
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, path)
    planned = only(plan(table(form.format(path), body="digits", **images(tmp_path)), store))
    says_the_same(planned, store, model)


@pytest.mark.slow
def test_repans_teacher_of_cifar100(store, tmp_path):
    """A bare state dict whose layers have other names."""
    from replib import official

    model, path = network(7, "cifar_resnet101", classes=2, in_channels=3), tmp_path / "net.pth"
    state = official.export(model, "repan_teacher_resnet101")
    assert "conv2_x.0.residual_function.0.weight" in state
    torch.save(state, path)
    planned = only(plan(table(f"cifar_resnet101={path}", **images(tmp_path)), store))
    says_the_same(planned, store, model)


def torchvisions(seed, classes):
    from torchvision.models import shufflenet_v2_x0_5

    torch.manual_seed(seed)
    return shufflenet_v2_x0_5(num_classes=classes).eval()


def test_a_file_of_a_network_of_torchvision(store, tmp_path):
    """Trained for these classes: standardised as these images."""
    model, path = torchvisions(5, 2), tmp_path / "net.pth"
    torch.save(model.state_dict(), path)
    text = f"torchvision:shufflenet_v2_x0_5={path}"
    planned = trained(table(text, **images(tmp_path, (32, 32))), store)
    assert planned.cell.teacher.startswith("torchvision:shufflenet_v2_x0_5:")
    says_the_same(planned, store, model)
    data, found = dataset(planned.cell), store.read(planned.key)["result"]["teacher"]
    assert found["test_accuracy"] == accuracy(model, Split.test(data, "cpu"))
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert f"{found['name']}:{found['digest']}" == planned.cell.teacher


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_file_of_a_network_of_timm(store, tmp_path, suffix):
    """One that takes a single channel, as digits have."""
    timm = pytest.importorskip("timm")
    from safetensors.torch import save_file

    torch.manual_seed(5)
    model = timm.create_model("test_resnet", num_classes=10, in_chans=1).eval()
    path = tmp_path / f"net.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(model.state_dict(), path)
    planned = only(plan(table(f"timm:test_resnet={path}"), store))
    says_the_same(planned, store, model)


# -- published weights -----------------------------------------------------------------------------
def test_published_weights_of_torchvision(tmp_path, monkeypatch):
    from torchvision.models import get_model_weights

    url = get_model_weights("shufflenet_v2_x0_5").DEFAULT.url
    kept = tmp_path / "hub" / "checkpoints" / url.rpartition("/")[2]
    kept.parent.mkdir(parents=True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    found = []
    for seed in (1, 1, 2):
        model = torchvisions(seed, 1000)
        torch.save(model.state_dict(), kept)
        teachers._opened.cache_clear()
        found.append(opened("torchvision:shufflenet_v2_x0_5", classes=1000, shapes=[(3, 32, 32)]))
    assert found[0].identity == found[1].identity != found[2].identity
    assert (found[0].mean, found[0].deviation) == IMAGENET
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(found[2].network(x), model(x))


def test_published_weights_of_timm(tmp_path, monkeypatch):
    timm = pytest.importorskip("timm")
    torch.manual_seed(1)
    model = timm.create_model("test_resnet.r160_in1k").eval()
    config = model.pretrained_cfg
    monkeypatch.setattr(
        timm.models._builder, "load_state_dict_from_hf", lambda *a, **k: model.state_dict()
    )
    found = opened("timm:test_resnet.r160_in1k", classes=1000, shapes=[(3, 32, 32)])
    assert (found.mean, found.deviation) == (tuple(config["mean"]), tuple(config["std"]))
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(found.network(x), model(x))
    assert found.flops > 1e6


# -- its inputs ------------------------------------------------------------------------------------
def test_inputs_are_standardised_anew():
    """As if the images themselves had been standardised by the other mean and deviation."""
    pixels = torch.rand(2, 3, 5, 4, dtype=torch.float64)
    given, wanted = STATISTICS["cifar10"], ((0.3, 0.5, 0.7), (0.1, 0.2, 0.4))

    def standardised(mean, deviation):
        columns = [
            (pixels[:, i] - m) / s for i, (m, s) in enumerate(zip(mean, deviation, strict=True))
        ]
        return torch.stack(columns, dim=1).float()

    got = Restandardised(nn.Identity(), given, wanted)(standardised(*given))
    torch.testing.assert_close(got, standardised(*wanted), rtol=0, atol=1e-5)


def test_a_teacher_that_wants_another_mean_gets_it(store, tmp_path):
    model, path = network(), tmp_path / "a.safetensors"
    save_model(model, path)
    plain = only(plan(table(str(path)), store))
    wants = dict(teacher_mean=[0.25], teacher_deviation=[0.5])
    planned = only(plan(table(str(path), **wants), store))
    assert plain.key != planned.key
    data = dataset(planned.cell)
    pixels = data.test_images[:16] / 255
    x = data.normalised(data.test_images[:16])
    with torch.no_grad():
        want, other = model((pixels - 0.25) / 0.5), model(x)
        got = teacher_of(planned, {}, store)(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert (want - other).abs().max() > 0.01


def test_what_the_library_says_is_in_the_key(store, tmp_path, monkeypatch):
    """A mean of its own enters the parameters; the data's own does not."""
    model, settings = torchvisions(5, 2), images(tmp_path, (32, 32))

    def found(mean, deviation):
        monkeypatch.setitem(teachers.LIBRARIES, "torchvision", lambda *a: (model, mean, deviation))
        teachers._opened.cache_clear()
        return only(plan(table("torchvision:any", **settings), store)).cell

    half = (0.5, 0.5, 0.5)
    assert found(half, half).in_key["teacher_mean"] == list(half)
    assert "teacher_mean" not in found(*IMAGENET).in_key
    settings |= dict(teacher_mean=[0.1], teacher_deviation=[0.2])
    assert found(half, half).teacher_mean == [0.1]  # the user's word comes first


def test_a_cell_of_other_data_wants_their_mean(store, tmp_path, monkeypatch):
    """As a teacher trained on CIFAR-10 does, and a student on a folder of the same images."""
    settings = images(tmp_path)
    parent = trained(table(body="digits_wide", **settings), store)
    mean, deviation = STATISTICS["cifar10"]
    theirs = replace(dataset(parent.cell), mean=mean, deviation=deviation)
    found = cells.dataset
    monkeypatch.setattr(
        cells, "dataset", lambda cell: theirs if cell.body == "digits_wide" else found(cell)
    )
    child = only(plan(table(parent.key, **settings), store)).cell
    assert (child.teacher_mean, child.teacher_deviation) == (list(mean), list(deviation))


# -- identity --------------------------------------------------------------------------------------
def test_other_weights_make_another_cell_and_the_same_ones_do_not(store, tmp_path):
    keys = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        save_model(network(seed), tmp_path / f"{name}.safetensors")
        keys.append(only(plan(table(str(tmp_path / f"{name}.safetensors")), store)).key)
    assert keys[0] == keys[1] != keys[2]


def test_a_file_that_changes_after_planning_is_refused(store, tmp_path):
    path = tmp_path / "a.safetensors"
    save_model(network(1), path)
    made = plan(table(str(path)), store)
    save_model(network(2), path)
    with pytest.raises(UserError, match="has changed since"):
        run_cell(only(made), made.cells, store)


def test_a_cell_that_starts_from_a_taught_one(store, tmp_path):
    """Its evidence is enough; to train it again, its own table is needed."""
    path = tmp_path / "a.safetensors"
    save_model(network(1), path)
    taught = trained(table(str(path)), store)
    values = table().model_dump()
    values["rows"]["row"]["start"] = taught.key
    child = Table.model_validate(values)
    shutil.rmtree(store.folder(trained(child, store).key))
    (store.folder(taught.key) / "weights.ckpt").unlink()
    with pytest.raises(UserError, match=r"learns from file:.* run the table that it is of"):
        trained(child, store)


# -- errors ----------------------------------------------------------------------------------------
WRONG = {
    "an unknown row": ("techer", ["'techer'", "row"]),
    "no file": ("no/such/file.pth", ["no/such/file.pth", "No such file"]),
    "an unknown key": ("0123456789abcdef", ["0123456789abcdef", "evidence"]),
    "an unknown library": ("keras:resnet18", ["'keras'", "torchvision, timm"]),
    "an unknown network": ("torchvision:resnet81", ["no such network", "resnet18"]),
    "an unknown one of timm": ("timm:efficientnet_b44", ["no such network", "efficientnet_b4"]),
    "a thousand classes": ("torchvision:resnet18", ["1000 classes", "have 10"]),
    "the same in timm": ("timm:efficientnet_b4", ["1000 classes", "have 10"]),
    "no body": ("{net}", ["does not say", "BODY="]),
    "an unknown body": ("cifar_resnet111={net}", ["'cifar_resnet111'", "cifar_resnet110"]),
    "an unknown block": ("digits/abc={net}", ["no block 'abc'", "acb"]),
    "another body": ("digits/acb={net}", ["size mismatch"]),
    "another number of classes": ("digits_wide/acb={seven}", ["7 classes", "have 10"]),
    "the same, and it knows": ("{seven_safe}", ["7 classes", "have 10"]),
    "another number of channels": ("{colour}", ["cannot take", "(1, 8, 8)"]),
    "a damaged file": ("digits_wide/acb={cut}", ["cannot be read"]),
    "a damaged network": ("{cut_safe}", ["cannot be read"]),
    "weights of another network": ("torchvision:resnet18={net}", ["Missing key"]),
}


@pytest.mark.parametrize("text, parts", WRONG.values(), ids=WRONG)
def test_mistakes_are_named_in_one_line(store, tmp_path, text, parts):
    files = {}
    for name, options in {"net": {}, "seven": {"classes": 7}, "colour": {"in_channels": 3}}.items():
        model = network(**options)
        files[name], files[f"{name}_safe"] = (
            tmp_path / f"{name}.pth",
            tmp_path / f"{name}.safetensors",
        )
        torch.save(model.state_dict(), files[name])
        save_model(model, files[f"{name}_safe"])
    files["colour"] = files["colour_safe"]
    for name in ("net", "net_safe"):
        cut = files[name].with_name(f"cut_{files[name].name}")
        cut.write_bytes(files[name].read_bytes()[:3000])
        files[name.replace("net", "cut")] = cut
    if "timm" in text:
        pytest.importorskip("timm")
    with pytest.raises(ValueError) as error:  # of the table, or of the plan
        plan(table(text.format(**files)), store)
    said = str(error.value)
    assert all(part in said for part in parts), said
    if isinstance(error.value, UserError):
        assert said.startswith("teacher (=") and "\n" not in said and len(said) < 900


def test_timm_is_missing(store, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"timm is not installed: pip install"):
        plan(table("timm:resnet18"), store)


@pytest.mark.parametrize("text", ["torchvision:resnet18", "timm:test_resnet.r160_in1k"])
def test_no_network_to_download_from(text, tmp_path, monkeypatch):
    def offline(*arguments, **options):
        raise URLError("Name or service not known")

    if text.startswith("timm"):
        timm = pytest.importorskip("timm")
        monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(UserError, match=r"could not be downloaded .*NAME=FILE") as error:
        opened(text, classes=1000, shapes=[(3, 64, 64)])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("changes, part", [
    (dict(teacher_mean=[0.5]), "teacher_deviation"),
    (dict(teacher_mean=[0.5], teacher_deviation=[0.5, 0.5]), "together"),
    (dict(teacher_mean=[0.5], teacher_deviation=[0.0]), "greater than 0"),
    (dict(teacher_mean=[0.5] * 3, teacher_deviation=[0.5] * 3), "as the images have channels"),
])  # fmt: skip
def test_a_mean_that_cannot_be(store, tmp_path, changes, part):
    save_model(network(), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=part):
        plan(table(str(tmp_path / "a.safetensors"), **changes), store)


# -- where else it is named ------------------------------------------------------------------------
def test_replib_train_takes_a_path_from_where_it_is_run(store, tmp_path, monkeypatch):
    save_model(network(), tmp_path / "a.safetensors")
    monkeypatch.chdir(tmp_path)
    values = CELL | {"seed": 0, "distill": DISTILL, "teacher": "a.safetensors"}
    planned = only(plan_of(values, store))
    assert planned.taught_by == str(tmp_path / "a.safetensors") and planned.teacher_flops > 0
    torch.save(network().state_dict(), "a.pth")
    planned = only(plan_of(values | {"teacher": "digits_wide/acb=a.pth"}, store))
    assert planned.taught_by == f"digits_wide/acb={tmp_path / 'a.pth'}"


def test_a_page_shows_the_accuracy_of_a_teacher_from_outside(project, in_process):
    model = network()
    save_model(model, project.folder / "net.safetensors")
    project.table("tiny9", TINY)
    left_out = [f"rows.{row}=null" for row in ("official", "preserving", "teacher")]
    settings = ["seeds=[0, 1]", "rows.distilled.teacher=net.safetensors", *left_out]
    results = Results("tiny9", "tiny", settings)
    assert results.train(device="cpu").trained == 6
    taught = results.teacher_accuracy("distilled")
    assert taught.n == 1  # one teacher, whatever the number of students
    assert taught.mean == pytest.approx(100 * accuracy(model, Split.test(load("digits"), "cpu")))
    assert results.teacher_accuracy("control") is None
    assert results.frame().loc["distilled", "teacher_flops"] > 0
