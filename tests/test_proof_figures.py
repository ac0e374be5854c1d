"""What the figures of the proofs draw are the numbers that were measured."""

from html import escape

import numpy as np
import pytest
import torch

from replib.analysis import precision
from replib.analysis.annealing import History
from replib.analysis.scale_invariance import against_theory, equilibrium_angle
from replib.report import proof_figures, why_figures


@pytest.fixture(scope="module")
def measured():
    names = ["convbn", "repvgg", "replk"]
    return precision.measure(families=names, depths=(1, 2), channels=2, space=4)


def drawn(axis):
    """Label -> (x, y) of the lines of an axis that have one."""
    lines = {line.get_label(): line.get_data() for line in axis.get_lines()}
    return {label: data for label, data in lines.items() if not label.startswith("_")}


def test_the_lines_over_depth_are_the_medians(measured):
    figure = proof_figures.precision_by_depth({"here": measured, "there": measured})
    axes = np.array(figure.axes).reshape(2, 4)
    assert [axis.get_title().split("\n")[0] for axis in axes[0]] == [
        "float64", "float32", "float16", "bfloat16"
    ]  # fmt: skip
    lines = drawn(axes[1, 2])
    assert lines.keys() == {"branches", "merged", "merged in its precision", "nudged input"}
    for way, (x, y) in lines.items():
        assert list(x) == [1, 2]
        assert y * 2.0**-11 == pytest.approx(precision.typical(measured["rows"], "float16", way))
    assert "branches" not in drawn(axes[0, 0]), "the reference itself"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(lines)


def test_the_dots_by_family_are_the_first_errors(measured):
    figure = proof_figures.precision_by_family(measured)
    labels = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    assert labels == ["repvgg, 3×3", "replk, 7×7", "convbn, 3×3"]  # from below
    rows = {(r["family"], r["precision"]): r for r in precision.by_family(measured)}
    marks = [line for line in figure.axes[3].get_lines() if line.get_marker() == "s"]
    assert len(marks) == 3
    for line, family in zip(marks, ("repvgg", "replk", "convbn"), strict=True):
        assert line.get_xdata()[0] == pytest.approx(rows[family, "bfloat16"]["merged"])


def test_published_measurements_are_found_by_their_device(measured, project):
    assert proof_figures.published_precision() == {}
    assert proof_figures.published().data == "<p>None.</p>"
    folder = project.folder / "reports" / "measurements"
    on_gpu = measured | {"context": measured["context"] | {"device": "a GPU"}}
    precision.write(folder / "precision-a-gpu.json", on_gpu)
    precision.write(folder / "precision-a-processor.json", measured)
    (folder / "latency-a-gpu.json").write_text("{}")
    assert proof_figures.published_precision() == {
        "a GPU": on_gpu,
        measured["context"]["processor"]: measured,
    }
    page = proof_figures.published().data
    assert page.index("<b>a GPU</b>, commit") < page.index(escape(measured["context"]["processor"]))
    sentences = precision.statements(measured)
    assert page.count("<li>") == 2 * len(sentences) and escape(sentences[-1]) in page


def history():
    """Two epochs of two layers, invented."""
    out = History()
    for epoch in range(2):
        row = {"epoch": epoch, "cycle": 0, "learning_rate": 0.2 - 0.1 * epoch, "rate": 1.0}
        out.epochs.append(row | {"loss": 1.0 / (1 + epoch)})
        for name, role in (("a", "main"), ("b", "side")):
            row = {"epoch": epoch, "cycle": 0, "role": role, "convolution": name, "length": 0.5}
            out.filters.append(row | {"unit_gradient": 0.3, "angle": 0.1, "effective": 1.0})
    for mode in ("eval", "train"):
        out.restarts.append({"epoch": 0, "mode": mode, "before": 0.1, "after": 2.0})
    return out


def test_equilibrium_shows_prediction_and_length():
    figure = why_figures.equilibrium({(0.1, 0.01): history(), (0.1, 0.0): history()})
    lengths, free, angles, _ = figure.axes
    dashed = [line.get_ydata()[0] for line in lengths.get_lines() if line.get_linestyle() == "--"]
    rows = against_theory(history().filters, 0.1, 0.01)
    assert dashed == [row["predicted_length"] for row in rows]
    assert not [line for line in free.get_lines() if line.get_linestyle() == "--"]
    assert angles.get_lines()[-1].get_ydata()[0] == equilibrium_angle(0.1, 0.01)


def test_cycles_show_the_loss_after_every_restart():
    figure = why_figures.cycles({"official": history(), "control": history()})
    lines = drawn(figure.axes[0])
    assert list(lines["training, mean"][1]) == [1.0, 0.5]
    assert list(lines["after restart, eval mode"][1]) == [2.0]
    assert list(drawn(figure.axes[2])["learning rate, of its start"][1]) == pytest.approx([1, 0.5])


def test_restores_show_factors_by_role():
    rows = [
        {"block": "b", "convolution": c, "role": role, "factor": factor}
        | {"angle_before": 0.1, "angle_after": 0.2}
        for c, role, factor in (("dense.0", "main", 0.5), ("1x1.0", "side", 100.0))
    ]
    figure = why_figures.restores({"keep": rows, "unit": rows})
    lines = drawn(figure.axes[0])
    assert list(lines["main branch"][0]) == [0.5] and list(lines["side branch"][0]) == [100.0]
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["b  dense.0", "b  1x1.0"]


def test_taps_are_relative_to_the_slowest():
    figure = why_figures.taps({"a": torch.tensor([[0.5, 1.0], [2.0, 0.5]])})
    assert [text.get_text() for text in figure.axes[0].texts] == ["1.00", "2.00", "4.00", "1.00"]
