"""What is measured of trained cells: tied to their evidence, shown without weights."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, TINY
from test_catalogue import papers_columns

from replib.__main__ import main
from replib.analysis.kernel_statistics import norm_slopes
from replib.analysis.statistics import estimate
from replib.experiments import measurements
from replib.experiments.cells import trained_model
from replib.experiments.params import MEASURES, load_table
from replib.report import measured_figures
from replib.report.catalogue import catalogue
from replib.report.layer_figures import spread
from replib.report.results import Results

SLOW = {kind: pytest.mark.slow for kind in ("similarity", "sparsity", "conversion")}
ROWS = ["base", "control", "official", "preserving", "distilled"]


@pytest.fixture(scope="module")
def home(shared_project):
    """The cells of `tiny9`, in a table for every kind of measurement."""
    for kind in MEASURES:
        shared_project.table(f"{kind}9", TINY.replace("proxy:", f"measure: {kind}\nproxy:"))
    return shared_project


@pytest.fixture
def at(home, monkeypatch):
    """Of a kind of measurement: its table, none of whose files are there."""
    monkeypatch.setenv("REPLIB_HOME", str(home.folder))

    def open(kind: str) -> Results:
        results = Results(f"{kind}9", "tiny")
        for published in (False, True):
            path = measurements.path_of(results.store, f"{kind}9", "tiny", published)
            path.unlink(missing_ok=True)
        return results

    return open


def test_there_is_a_figure_and_a_measurement_of_every_kind():
    assert set(MEASURES) == set(measurements.KINDS) == set(measured_figures.DRAWN)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [pytest.param(k, marks=SLOW.get(k, ())) for k in MEASURES])
def test_a_page_is_the_same_from_a_published_file(kind, at, monkeypatch, capsys):
    monkeypatch.setattr(measurements, "SHARES", (0.0, 0.4))
    monkeypatch.setattr(measurements, "DRAWS", 2)
    results = at(kind)
    page = measured_figures.shown(results).data
    assert page.count("<img") == page.count('alt="') >= 1
    assert "nan" not in re.sub('base64,[^"]*', "", page).lower()
    for row in ROWS:
        assert results.table.rows[row].label in page
    assert "Measured on this machine" in page
    assert main(["publish", f"{kind}9", "--profile", "tiny"]) == 0
    assert f"measurements/{kind}9-tiny.json" in capsys.readouterr().out
    monkeypatch.setattr(type(results.store), "has_weights", lambda self, key: False)
    own = measurements.path_of(results.store, f"{kind}9", "tiny")
    own.unlink()
    again = measured_figures.shown(Results(f"{kind}9", "tiny")).data
    assert "Published measurement" in again and not own.exists()
    tables = re.compile(r"<td>.*?</td>")
    numbers = [re.sub("href=.*?>", "", cell) for cell in tables.findall(page)]
    assert numbers == [re.sub("href=.*?>", "", cell) for cell in tables.findall(again)]


def test_a_measurement_is_of_the_selected_weights_and_made_once(at, monkeypatch):
    results, asked = at("norm_slopes"), []
    kind = measurements.KINDS["norm_slopes"]

    def measure(*what):
        asked.append(what)
        return kind.measure(*what)

    counted = measurements.Kind(measure, kind.version, kind.of)
    monkeypatch.setitem(measurements.KINDS, "norm_slopes", counted)
    first = results.measure("cpu")
    assert [cell["row"] for cell in first["cells"]] == ROWS, "the teacher is hidden"
    for cell, found in zip(first["cells"], first["found"], strict=True):
        evidence = results.store.read(cell["key"])
        assert evidence["result_sha256"] == cell["result_sha256"]
        model = trained_model(results.plan.cells[cell["key"]], results.store)
        for block, branches in norm_slopes(model).items():
            for branch, values in branches.items():
                expected = sorted(values.tolist(), reverse=True)
                assert found[block]["slopes"][branch] == pytest.approx(expected, rel=1e-5)
    made = len(asked)
    assert results.measure("cpu") == first and len(asked) == made == len(ROWS)
    path = measurements.path_of(results.store, "norm_slopes9", "tiny")
    other = json.loads(path.read_text())
    other["cells"][0]["result_sha256"] = "of other weights"
    path.write_text(json.dumps(other))
    again = [results.measure("cpu")]
    other = json.loads(path.read_text())
    short = json.dumps(other | {"found": other["found"][:-1]})
    nobodys = json.dumps(other | {"context": {}})
    nothings = json.dumps(other | {"cells": [{"row": "base"}] * made})
    other["settings"]["version"] += 1  # measured in another way
    for damaged in (json.dumps(other), short, nobodys, nothings, "{}"):
        path.write_text(damaged)
        again.append(results.measure("cpu"))
    assert len(asked) == made + 1 + 5 * made, "what was damaged, then all of them"
    assert all(one["found"] == first["found"] for one in again)


def test_a_measurement_names_the_commits_at_which_its_parts_were_made(at, monkeypatch):
    """What an earlier file has is taken from it, and is not of today's commit."""
    results = at("magnitudes")
    path = measurements.path_of(results.store, "magnitudes9", "tiny")
    results.measure("cpu")
    part = json.loads(path.read_text())
    part |= {"cells": part["cells"][:1], "found": part["found"][:1]}
    part["context"]["commit"] = "aaa-dirty, bbb"
    path.write_text(json.dumps(part))
    context = measurements.machine.context("cpu", ROOT) | {"commit": "ccc"}
    monkeypatch.setattr(measurements.machine, "context", lambda *of: context)
    for _ in range(2):
        assert results.measure("cpu")["context"]["commit"] == "aaa-dirty, bbb, ccc"
    other = path.rename(path.with_name("another.json"))
    assert results.measure("cpu")["context"]["commit"] == "aaa-dirty, bbb, ccc"
    path.unlink()
    other.unlink()


def test_what_was_measured_stays_when_weights_go(at, monkeypatch):
    """Of some cells or of all; what is missing is measured where weights are."""
    results = at("magnitudes")
    first = results.measure("cpu")
    kept, store = first["cells"][0]["key"], type(results.store)
    monkeypatch.setattr(store, "has_weights", lambda self, key: key == kept)
    assert results.measure("cpu") == first
    monkeypatch.setattr(store, "has_weights", lambda self, key: False)
    assert results.measure("cpu") == first
    measurements.path_of(results.store, "magnitudes9", "tiny").unlink()
    assert results.measure("cpu") is None


def test_published_numbers_without_their_evidence_are_not_shown(at):
    results = at("norm_slopes")
    first = results.measure("cpu")
    main(["publish", "norm_slopes9", "--profile", "tiny"])
    where = "norm_slopes9", "tiny", results.table, results.plan, results.store
    assert measurements.published(*where) == first
    path = measurements.path_of(results.store, *where[:2], published=True)
    text = path.read_text()
    path.write_text(text.replace('"version":', '"version":1'))
    assert measurements.published(*where) is None, "another way to measure"
    path.write_text(text)
    assert measurements.published(*where) == first
    results.store.published_path(first["cells"][1]["key"]).unlink()
    assert measurements.published(*where) is None


def test_run_measures_too_and_a_page_without_weights_says_how(at, monkeypatch, capsys):
    results = at("magnitudes")
    assert main(["run", "magnitudes9", "--profile", "tiny"]) == 0
    assert "networks are measured" in capsys.readouterr().out
    path = measurements.path_of(results.store, "magnitudes9", "tiny")
    for found in json.loads(path.read_text())["found"]:
        grid = np.array(found["magnitudes"])
        assert grid.shape == (3, 3) and 0 < grid.min() <= grid.max() <= 1
    path.unlink()
    monkeypatch.setattr(type(results.store), "has_weights", lambda self, key: False)
    said = measured_figures.shown(Results("magnitudes9", "tiny")).data
    assert "make reproduce-magnitudes9 PROFILE=tiny" in said
    assert measured_figures.shown(Results("tiny9", "tiny")).data == ""


def test_numbers_of_a_file_are_short_and_plain():
    rounded = measurements.rounded({1: [0.123456789, float("nan"), 3, True], "a": ("b", None)})
    assert rounded == {"1": [0.123457, None, 3, True], "a": ["b", None]}
    assert isinstance(rounded["1"][3], bool)


def test_means_of_a_page_by_hand():
    grid = [[1, -0.5, None], [-0.5, 1, 0.25], [None, 0.25, 1]]
    seeds = [{"a": {"cka": grid}, "b": {"cka": [[1, 0.1], [0.3, 1]]}}]
    assert measured_figures.off_diagonal(seeds, "cka") == [[0.375, pytest.approx(0.2)]]
    one, two = (np.array(x) for x in ([1.0, np.nan, np.nan], [3.0, np.nan, 4.0]))
    means = measured_figures.mean_of(np.array([one, two]), axis=0)
    assert np.array_equal(means, [2, np.nan, 4], equal_nan=True)
    assert measured_figures.examples([1, 1, 2, 1, 1, 2, 1, 2, 1]) == [5, 6]
    assert measured_figures.examples([1, 1, 1, 1]) == [2, 3]
    strided = [False, True, False]
    assert measured_figures.means_where([[1, 5, 3], [2, 7, 4]], strided, True).startswith("6 <")
    assert measured_figures.means_where([[1, 5, 3]], strided, False) == "2"
    assert measured_figures.means_where([[1, 5, 3]], [False] * 3, True) == measured_figures.NONE


def drawn_page(table: str, found: dict) -> str:
    """The tables of what was measured of a table's rows, in the profile `quick`."""
    loaded = load_table(ROOT / "params" / table / "quick.yaml", networks=False, cells=False)
    drawn = measured_figures.DRAWN[loaded.measure](
        SimpleNamespace(table=loaded), {n: found for n, r in loaded.rows.items() if not r.hidden}
    )
    return "".join(part for part in drawn if isinstance(part, str))


def test_the_papers_magnitudes_stand_below_ours():
    page = drawn_page(
        "acnet-fig6", [{"magnitudes": [[0.25, 0.5, 0.25], [0.5, 1, 0.5], [0.25] * 3]}]
    )
    lines = re.findall(r"<tr><td>(.*?)</td></tr>", page)
    shown = {line.split("</td><td>")[0]: line.split("</td><td>")[1:] for line in lines}
    assert shown["<b>Plain</b>"] == ["1", "0.55", "0.25", "2.2"]
    assert shown["<b>Plain</b>, in the paper"] == ["0.935", "0.873", "0.827", "1.06"]
    assert shown["<b>ACNet</b>, in the paper"][0] == "1" and len(shown) == 6


def test_the_papers_deviations_stand_beside_ours():
    parts = {"overall": 0.5, "centre": 0.5, "surrounding": 0.25}
    blocks = {"stage1.0.block": dict.fromkeys(("trained", "folded", "deployed"), parts)}
    example = {"block": "stage1.0.block", "histograms": {}}
    page = drawn_page("repopt-table11", [{"blocks": blocks, "example": example}])
    rows = catalogue()["repopt"].items["table11"].rows.values()
    read = [f"{row[c]:g}" for row in rows for c in ("overall", "central", "surrounding")]
    assert papers_columns(page) == read and len(read) == 12


def layer(name: str, part: str, peak: float) -> dict:
    numbers = {"weight_min": -peak, "weight_max": peak / 2, "weight_peak": peak, "output_peak": 2.0}
    return {"layer": name, "part": part} | numbers


@pytest.mark.parametrize(
    "values, said",
    [
        ([0.1, 0.2, -0.3], "0 <"),
        ([1e-12, 2e-12], "1.5e-12 <"),
        ([0.5], "0.5"),
        ([10.0, 30.0], "20 <"),
    ],
)
def test_a_mean_of_zero_but_for_rounding_is_zero(values, said):
    """What points lost add up to need not be 0, where as many are won."""
    shown = spread(estimate(values))
    assert shown.startswith(said) and sum([0.1, 0.2, -0.3]) != 0


def in_eight_bits(accuracy: float, lost: float, deviation: float) -> dict:
    """What is found of a network of one block that loses so much."""
    parts = {"overall": deviation, "centre": 2 * deviation, "surrounding": deviation}
    schemes = measurements.SCHEMES
    return {
        "float": accuracy,
        "eight_bits": {name: accuracy - lost for name in schemes},
        "same_class": dict.fromkeys(schemes, 0.75),
        "before": [layer("b", part, 3.0) for part in ("dense", "1x1", "sum")],
        "after": [layer("b", "", 4.0)],
        "conversion": {"blocks": {"b": {"deployed": parts}}, "example": {"block": "b"}},
    }


@pytest.mark.parametrize("deviation, told", [(1.0, "is tried here"), (0.3, "is not tried here")])
def test_losses_in_eight_bits_by_hand(deviation, told):
    path = ROOT / "params" / "repopt-table10" / "quick.yaml"
    table = load_table(path, networks=False, cells=False)
    found = {
        "repvgg": [in_eight_bits(0.9, 0.2, deviation), in_eight_bits(0.8, 0.3, deviation)],
        "repopt": [in_eight_bits(0.9, 0.1, 0.25), in_eight_bits(0.8, 0.1, 0.25)],
        "repopt_trained": [{"eight_bits": {"trained": 0.85}}, {"eight_bits": {"trained": 0.75}}],
    }
    cells = [{"row": row, "seed": seed} for row in found for seed in (0, 1)]
    results = SimpleNamespace(
        table=table,
        measurement={"cells": cells},
        against=lambda row: table.rows[row].against or table.control,
    )
    drawn = measured_figures.draw_quantization(results, found)
    page = "".join(part for part in drawn if isinstance(part, str))
    lines = re.findall(r"<tr><td><b>(.*?)</td></tr>", page)
    numbers = [re.sub(" <small>.*?</small>", "", one).split("</td><td>") for one in lines]
    assert numbers[0][:5] == ["RepVGG</b>", "85", "60", "54.55", "25"]
    assert numbers[1][:5] == ["RepOpt-VGG</b>", "85", "75", "75.89", "10"]
    assert numbers[0][-1] == "25", "images whose class changes"
    assert numbers[2][1:] == [
        "RepVGG", "one scale a kernel", numbers[2][-1]
    ] and "+15.00 points" in numbers[2][-1]  # fmt: skip
    trained = next(one for one in numbers if "trained" in one[0])
    assert trained[1:] == ["80", "78.24", "5"]
    assert told in page and "deviate 3.55 times" in page
    assert f"here {deviation / 0.25:.3g} times" in page
