"""What a page says of pruning is what the evidence says, and a page without evidence says so."""

import re

import pytest
from conftest import at_home

from replib.report.page import Page
from replib.report.pruning_figures import Pruning
from replib.report.results import Results

TABLE = """
title: "Pruning"
question: "Does the page hold?"
control: base
seeds: [0, 1]
cell: {data: digits, train_images: 80, held_out: 20, body: digits, block: convbn, batch_size: 30}
recipes:
  base: {epochs: 2, learning_rate: 0.1, momentum: 0.9}
  resrep:
    resrep: {target: 0.5, warmup: 0, interval: 1, rows: 20, drop: target, measure: 2}
rows:
  base: {label: "Base", use: [base]}
  first: {label: "First", use: [base], start: base, set: {narrow: {target: 0.6, rule: uniform}}}
  resrep: {label: "By <ResRep>", use: [base, resrep], start: base}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A project with a small table that prunes, not yet run."""
    with at_home(tmp_path_factory.mktemp("project"), {"pruning": TABLE}):
        yield Page("pruning", "tiny")


@pytest.mark.slow
def test_a_page_says_what_the_evidence_says(made):
    assert made.pruning().data == ""
    pruning = Pruning(made.results)
    assert pruning.course() is pruning.widths() is pruning.arms() is pruning.share_left() is None
    made.train(device="cpu")
    results: Results = made.results
    pruning = Pruning(results)
    assert pruning.rows == ["resrep"] and pruning.seeds("resrep") == [0, 1]
    base, first, pruned = (
        [e["result"] for e in results.evidence(row).values()] for row in results.rows
    )
    whole = base[0]["deployed"]["flops"]
    for row, found in (("first", first), ("resrep", pruned)):
        left = [result["deployed"]["flops"] / whole for result in found]
        assert pruning.pruned_share(row) == pytest.approx(100 * (1 - sum(left) / 2))
        assert all(share <= (0.6 if row == "first" else 0.5) for share in left)
    assert pruning.pruned_share("base") == 0
    columns = [result["history"]["pruned_accuracy"] for result in pruned]
    assert [column[0] for column in columns] == [None, None]
    measured = pruning.mean("resrep", "pruned_accuracy")  # only where it was measured
    assert measured.to_dict() == {2: pytest.approx(sum(column[1] for column in columns) / 2)}
    losses = [result["history"]["train_loss"] for result in pruned]
    assert pruning.mean("resrep", "train_loss")[1] == pytest.approx(
        (losses[0][0] + losses[1][0]) / 2
    )
    text = re.sub(r"<[^>]+>", " ", made.pruning().data)
    before = 100 * sum(result["pruning"]["accuracy_before"] for result in pruned) / 2
    assert "By &lt;ResRep&gt;" in text and f"{before:.2f}" in text
    name, (wide, narrow) = next(iter(pruned[0]["pruning"]["widths"].items()))
    assert f"{name}: {wide} → {narrow}" in text
    widths = pruning.widths().axes[0]
    bars = [bar.get_height() for bar in widths.patches]
    assert bars == [
        w for i in (0, 1) for w in [v[i] for v in pruned[0]["pruning"]["widths"].values()]
    ]
    assert len(pruning.course().axes) == 2 and len(pruning.arms().axes) == 3
    percent = (100 * pruning.mean("resrep", "test_accuracy")).tolist()
    course = pruning.course().axes[1].lines[1]  # after that of "first"
    (trained,) = pruning.arms().axes[1].lines
    assert list(course.get_ydata()) == list(trained.get_ydata()) == pytest.approx(percent)
    assert (
        course.get_color()
        == trained.get_color()
        == pruning.share_left().axes[0].lines[0].get_color()
    )
    dots = [line for line in pruning.arms().axes[0].lines if len(line.get_xdata()) == 1]
    assert [d.get_ydata()[0] for d in dots] == [
        pytest.approx(results.accuracy(row).mean) for row in results.rows
    ]
    assert len(pruning.share_left().axes[0].lines) == 2
