"""Scores of trained cells: measured once, tied to their evidence, and shown as they are."""

import json
import shutil

import numpy as np
import pytest
import torch.nn.functional as F

from replib.__main__ import main
from replib.analysis.layer_scores import layer_scores
from replib.experiments import layers
from replib.experiments.cells import dataset, split_of, trained_model
from replib.report.layer_figures import PARTS, Layers
from replib.report.results import Results

ROWS = ["base", "control", "official", "preserving", "distilled"]


@pytest.fixture
def results(shared_project, monkeypatch) -> Results:
    """The table `tiny9`, which has been run, without any measurement of it."""
    monkeypatch.setenv("REPLIB_HOME", str(shared_project.folder))
    for folder in ("runs/measurements", "measurements", "evidence"):
        shutil.rmtree(shared_project.folder / "reports" / folder, ignore_errors=True)
    return Results("tiny9", "tiny")


def own(results) -> dict | None:
    return layers.own("tiny9", "tiny", results.plan, results.rows, results.store)


def published(results) -> dict | None:
    return layers.published("tiny9", "tiny", results.plan, results.rows, results.store)


def test_scores_are_those_of_the_selected_weights(results):
    measurement = own(results)
    assert measurement == layers.read(layers.path_of(results.store, "tiny9", "tiny"))
    assert [cell["row"] for cell in measurement["cells"]] == ROWS, "the teacher is hidden"
    for cell in measurement["cells"]:
        evidence = results.store.read(cell["key"])
        assert evidence["result_sha256"] == cell["result_sha256"]
        planned = results.plan.cells[cell["key"]]
        data, chosen = dataset(planned.cell), split_of(planned.cell).train
        chunks = [part for part in chosen.split(20) if len(part) == 20]
        batches = [(data.normalised(data.train_images[c]), data.train_labels[c]) for c in chunks]
        expected = layer_scores(trained_model(planned, results.store), batches, F.cross_entropy)
        scores = measurement["scores"]
        at = [i for i, row in enumerate(scores["row"]) if row == cell["row"]]
        assert [scores["block"][i] for i in at] == [record["block"] for record in expected]
        for name in ("snip", "synflow", "grad_norm"):
            found = [scores[name][i] for i in at]
            scale = max(abs(record[name]) for record in expected)
            assert found == pytest.approx([r[name] for r in expected], rel=1e-3, abs=1e-5 * scale)


def test_a_measurement_is_made_once_and_again_for_other_weights(results, monkeypatch):
    asked = []
    measure = layers.measure
    monkeypatch.setattr(layers, "measure", lambda *what: asked.append(what) or measure(*what))
    first = own(results)
    assert own(results) == first and len(asked) == 1
    path = layers.path_of(results.store, "tiny9", "tiny")
    other = json.loads(path.read_text())
    other["cells"][0]["result_sha256"] = "of other weights"
    path.write_text(json.dumps(other))
    assert own(results)["cells"] == first["cells"] and len(asked) == 2
    path.write_text("{}")
    assert own(results)["scores"] == first["scores"] and len(asked) == 3
    monkeypatch.setattr(type(results.store), "has_weights", lambda self, key: False)
    assert own(results)["scores"] == first["scores"] and len(asked) == 3, "weights may go"
    path.unlink()
    assert own(results) is None


def test_publishing_takes_the_measurement_along(results, capsys):
    first = own(results)
    assert published(results) is None
    assert main(["publish", "tiny9", "--profile", "tiny"]) == 0
    path = layers.path_of(results.store, "tiny9", "tiny", published=True)
    assert path.parent.name == "measurements" and str(path) in capsys.readouterr().out
    assert published(results) == first
    results.store.published_path(first["cells"][1]["key"]).unlink()
    assert published(results) is None, "scores without the evidence that they belong to"


def test_the_page_shows_the_measurement(results):
    shown = Layers(results)
    assert shown.rows == ROWS
    scores = shown.measurement["scores"]
    sums = {}
    for i, row in enumerate(scores["row"]):
        at = (row, scores["block"][i], scores["role"][i])
        sums[at] = sums.get(at, 0) + scores["snip"][i]
    blocks = list(dict.fromkeys(scores["block"]))
    assert len(blocks) == 4
    axes = dict(zip(PARTS, shown.figure().axes, strict=True))
    for place, row in enumerate(ROWS):
        whole = sum(value for (name, _, _), value in sums.items() if name == row)
        for part, axis in axes.items():
            roles = ("main", "side") if part == "share" else (part,)
            expected = [sum(sums[row, block, role] for role in roles) for block in blocks]
            expected = np.array(expected) * (100 / whole if part == "share" else 1)
            assert axis.get_lines()[place].get_ydata() == pytest.approx(expected)
    networks = shown.networks().data
    assert networks.count("<tr>") == 1 + len(ROWS)
    side = sum(value for (name, _, role), value in sums.items() if (name, role) == ("base", "side"))
    whole = sum(value for (name, _, _), value in sums.items() if name == "base")
    assert f"<td>{whole:.3g}</td><td>{100 * side / whole:.3g}</td>" in networks
    assert shown.table().data.count("<tr>") == 1 + len(blocks)
    provenance = shown.provenance().data
    assert "Measured on this machine" in provenance
    for cell in shown.measurement["cells"]:
        assert f"<code>{cell['key'][:16]}</code>" in provenance


def test_several_side_branches_are_added_up(results):
    """As in DBB; the tables of this file have RepVGG blocks only."""
    shown = Layers(results)
    columns = {"row": ["base"] * 4, "seed": [0] * 4, "block": ["a", "a", "a", "b"]}
    columns |= {"role": ["main", "side", "side", "main"], "snip": [1.0, 2.0, 3.0, 4.0]}
    shown.measurement = shown.measurement | {"scores": columns | {"synflow": [0.1, -0.2, 0.0, 0.3]}}
    first, second = shown.frame.to_dict("records")
    assert first["block"] == "a" and [first[part] for part in PARTS] == [1.0, 5.0, 60.0]
    assert second["block"] == "b" and [second[part] for part in PARTS] == [4.0, 0.0, 40.0]
    assert (first["signed"], second["signed"]) == pytest.approx((0.3, 0.3))


def test_a_page_without_weights_says_how_to_make_them(results, monkeypatch):
    own(results)
    main(["publish", "tiny9", "--profile", "tiny"])
    monkeypatch.setattr(type(results.store), "has_weights", lambda self, key: False)
    layers.path_of(results.store, "tiny9", "tiny").unlink()
    there = Layers(results)
    assert "Published measurement" in there.provenance().data and there.rows == ROWS
    layers.path_of(results.store, "tiny9", "tiny", published=True).unlink()
    empty = Layers(results)
    assert empty.figure() is None and empty.rows == [] and empty.table().data == ""
    for part in (empty.networks, empty.provenance):
        assert "make reproduce-tiny9 PROFILE=tiny" in part().data
