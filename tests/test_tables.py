"""Tables as their user runs them: the notebook of the smoke profile, and the folder profiles."""

import json
from types import ModuleType

import numpy as np
import pytest
from conftest import ROOT, at_home
from IPython.core.interactiveshell import InteractiveShell
from PIL import Image

from replib.__main__ import main
from replib.report.render import GENERIC, notebook_of
from replib.report.results import Results

WITH_NOTEBOOKS = ["bfloat16", "repan-ablation", "table3"]
OTHERS = sorted(
    path.name
    for path in (ROOT / "params").glob("*/")
    if not (ROOT / "notebooks" / f"{path.name}.ipynb").exists()
)


THROUGH_PAPERMILL = "orepa-supplement"  # those that share a notebook run its cells here, but for it
# Minutes each, on the way of dbb-table3 and repvgg-table8; test_params builds their networks.
NOT_RUN = {"orepa-table5", "repopt-table7"}


def whole(page, table):
    """Whether a page shows every row of a table's smoke profile, trained."""
    results = Results(table, "smoke", ["seeds=[0]"])
    for row in results.rows:
        assert results.table.rows[row].label.split(": ")[-1] in page
        assert results.accuracy(row) is not None


@pytest.mark.slow
@pytest.mark.parametrize("table", [*WITH_NOTEBOOKS, THROUGH_PAPERMILL])
def test_the_smoke_profile_makes_a_page(project, table):
    assert (notebook_of(table) == GENERIC) == (table in OTHERS)
    project.run_here("reproduce", table, "--profile", "smoke", "--set", "seeds=[0]")
    page = (project.folder / "reports" / f"{table}-smoke.html").read_text(encoding="utf-8")
    whole(page, table)
    assert "Traceback" not in page


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """One project for all of them: a cell that two tables share is trained once."""
    with at_home(tmp_path_factory.mktemp("tables"), {}) as made:
        yield made


@pytest.mark.slow
@pytest.mark.parametrize("table", sorted({*OTHERS} - NOT_RUN - {THROUGH_PAPERMILL}))
def test_the_shared_notebook_serves_the_table(home, table, capsys):
    """The cells of the smoke profile, run in this process, which is quicker than a kernel."""
    notebook = json.loads((ROOT / "notebooks" / f"{GENERIC}.ipynb").read_text(encoding="utf-8"))
    _, *cells = ("".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code")
    shell = InteractiveShell(user_module=ModuleType("page"))  # __main__ stays what it is
    shell.push({"table": table, "profile": "smoke", "settings": ["seeds=[0]"]})
    made = []
    for cell in cells:
        done = shell.run_cell(cell)
        done.raise_error()
        made.append(getattr(done.result, "data", None) or "")
    whole("".join(made), table)


def keys(table, profile, row):
    found = Results(table, profile).plan.by_row
    return {seed: key for (name, seed), key in found.items() if name == row}


@pytest.mark.parametrize(
    "one, other",
    [
        (("dbb-table2", "quick", "resnet18_base"), ("dbb-table4", "quick", "base")),
        (("dbb-table2", "quick", "resnet18_dbb"), ("dbb-table4", "quick", "whole")),
        (("repvgg-table6", "quick", "both"), ("repvgg-table7", "quick", "whole")),
        (("repopt-table4", "quick", "repopt"), ("repopt-table5", "quick", "here_from_here")),
        (("repopt-table4", "quick", "search"), ("repopt-fig7", "quick", "search")),
        (("acnet-cifar", "quick", "vgg16_base"), ("dbb-table2", "quick", "vgg16_base")),
        (("orepa-fig7", "quick", "norms"), ("orepa-table3", "quick", "norms")),
        (("orepa-fig7", "quick", "channel"), ("orepa-table3", "quick", "channel")),
        (("orepa-fig7", "quick", "none"), ("orepa-table3", "quick", "none")),
        (("dbb-fig5", "quick", "dbb"), ("dbb-table2", "quick", "resnet18_dbb")),
        (("acnet-fig5", "quick", "acnet"), ("acnet-fig6", "quick", "acnet")),
        (("acnet-fig6", "quick", "border"), ("acnet-fig5", "quick", "border")),
        (("repopt-table11", "quick", "repopt"), ("repopt-table4", "quick", "repopt")),
        (("repopt-table8", "quick", "plain"), ("repopt-table4", "quick", "sgd")),
        (("repopt-table10", "quick", "repvgg"), ("repopt-table11", "quick", "repvgg")),
    ],
    ids=str,
)
def test_rows_that_are_the_same_are_trained_once(one, other):
    assert keys(*one) == keys(*other)


@pytest.mark.slow
@pytest.mark.parametrize("table", OTHERS)
def test_profiles_on_digits_are_planned_and_differ_row_from_row(table):
    """Every row is another cell, so that no difference of a table is a slip in its file."""
    for profile in ("quick", "smoke"):
        results = Results(table, profile)
        shown = {k: key for k, key in results.plan.by_row.items() if k[0] in results.rows}
        assert len({*shown.values()}) == len(shown), profile


def test_the_papers_gain_is_the_difference_of_its_accuracies():
    results = Results("dbb-table4", "smoke", ["rows.base.paper=dbb/table4/baseline/top1",
        "rows.whole.paper=dbb/table4/dbb/top1",
        "rows.linear_whole.paper=dbb/table4/linear_dbb/top1",
        "rows.double.paper={row: dbb/table2/cifar_10_vgg_16, accuracy: dbb, gain: gain}",
    ])  # fmt: skip
    found = {row: results.paper_gain(row) for row in results.rows}
    stated = {"whole": 1.45, "linear_whole": -0.87, "double": 0.67, "base": 0}
    assert {row: gain for row, gain in found.items() if gain is not None} == stated


@pytest.mark.slow
def test_table3_runs_on_a_folder_of_images(project, in_process, tmp_path, capfd):
    """Tiny-ImageNet's own layout, a few images, the smallest of its networks."""
    draw, folder = np.random.default_rng(0), tmp_path / "tiny-imagenet-200"
    lines = []
    for number in range(4):
        label = f"n0{number}"
        images = folder / "train" / label / "images"
        images.mkdir(parents=True)
        (folder / "val" / "images").mkdir(parents=True, exist_ok=True)
        for i in range(12):
            pixels = draw.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(images / f"{label}_{i}.JPEG")
        for i in range(3):
            name = f"val_{number}{i}.JPEG"
            pixels = draw.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "val" / "images" / name)
            lines.append(f"{name}\t{label}\t0\t0\t62\t62\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    others = ("repvgg_a1", "repvgg_b3", "resnet18_rep", "resnet18_acb")
    others += ("resnet34_dbb", "resnet50_dbb", "mobilenet_dbb")
    settings = [
        f"cell.data_dir={folder}", "cell.classes=3", "cell.held_out=6", "seeds=[0]",
        "cell.batch_size=8", "recipes.base.epochs=1", "recipes.cycles.batch_size=8",
        "recipes.cycles.epochs=1", "recipes.cycles.cycle.warmup=1",
        "variants.resnet18_dbb.cell.width=0.125", "rows.teacher.set.width=0.125",
        *(f"variants.{name}=" for name in others),
    ]  # fmt: skip
    options = [part for setting in settings for part in ("--set", setting)]
    status = main(["run", "table3", "--profile", "tiny-imagenet", "--workers", "1", *options])
    assert (status, capfd.readouterr().err.count("Traceback")) == (0, 0)
    results = Results("table3", "tiny-imagenet", settings)
    assert len(results.rows) == 9 and all(len(results.evidence(row)) == 1 for row in results.rows)
    found = results.evidence("resnet18_dbb_official_distilled")[0]["result"]
    assert found["images"] == {"train": 30, "held_out": 6} and found["data"]["test_images"] == 9
    assert len(found["restarts"]["phase"]) == 2 and found["teacher"]["test_accuracy"] is not None
