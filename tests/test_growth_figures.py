"""What a page says of growth is what the evidence says, and a page without evidence says so."""

import re

import pytest
from conftest import at_home

from replib.report.growth_figures import MISSING, Growth, layer, live, place, positions
from replib.report.results import Results

TABLE = """
title: "Growing"
question: "Does the page hold?"
control: plain
seeds: [0, 1]
cell: {data: digits, train_images: 80, held_out: 20, body: digits, block: convbn, batch_size: 30}
recipes:
  base: {epochs: 6, learning_rate: 0.1, momentum: 0.9}
  grows: {dyrep: {interval: 1, last_epoch: 4, calibration_batches: 1}}
rows:
  plain: {label: "Plain", use: [base]}
  default: {label: "By <default>", use: [base, grows]}
  snip: {label: "By snip", use: [base, grows], set: {dyrep: {score: snip}}}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A project in which a small table that grows has been run."""
    with at_home(tmp_path_factory.mktemp("project"), {"growing": TABLE}):
        yield Results("growing", "tiny")


def text(html):
    return re.sub(r"<[^>]+>", " ", html.data)


def test_a_page_without_evidence_says_so(made):
    growth = Growth(made)
    assert growth.structure() is growth.costs() is growth.scores() is None
    for part in (growth.averages(), growth.events(), growth.agreement()):
        assert part.data == MISSING
    assert "as initialised" in growth.shares().data


@pytest.mark.slow
def test_a_page_says_what_the_evidence_says(made):
    results = made
    assert results.train(device="cpu").trained == 6
    growth = Growth(results)
    assert growth.rows == ["default", "snip"] and growth.seeds("snip") == [0, 1]
    entries = growth.adjustments["snip", 1]
    frame = growth.branches("snip", 1)
    assert list(frame.index) == ["stages.0.0", "stages.1.0", "stages.1.1", "stages.2.0"]
    assert frame.columns.tolist() == [1, 2, 3, 4, 5, 6]
    assert (frame[1] == 1).all() and frame[2].sum() > 4
    for entry in entries:  # by hand: what each block has beyond the convolution that it stands for
        for name in frame.index:
            inside = [names for path, names in entry["structure"].items() if f"{name}." in path]
            assert frame[entry["epoch"] + 2][name] == 1 + sum(len(n) - 1 for n in inside)
    history = results.own[results.plan.by_row["snip", 1]]["result"]["history"]
    other = results.own[results.plan.by_row["snip", 0]]["result"]["history"]
    means = [sum(h["training_flops"]) / 6 / h["training_flops"][0] for h in (history, other)]
    (line,) = re.findall(r"<tr><td><b>By snip</b>.*?</tr>", growth.averages().data)
    assert re.findall(r"<td>([^<]*)</td>", line)[0] == f"{sum(means) / 2:.2f}"
    rows = re.findall(r"<tr><td>By snip</td>.*?</tr>", growth.events().data)
    assert len(rows) == 8 and place(entries[0]["grown"]) in rows[4]
    assert "By &lt;default&gt;" in growth.agreement().data
    assert "the selected weights" in growth.shares().data
    assert len(growth.structure().axes) == 4 and len(growth.costs().axes) == 2
    marked = growth.scores("snip").axes[1].lines[1::2]
    entries = growth.adjustments["snip", 0]
    assert len(marked) == len(entries) == 4
    for point, entry in zip(marked, entries, strict=True):
        assert point.get_ydata()[0] == max(entry["scores"]["snip"])
        assert (
            entry["grown"] == entry["layers"][entry["scores"]["snip"].index(point.get_ydata()[0])]
        )


def test_paths_in_few_words():
    path = "stages.1.0.block.branches.conv.0"
    assert layer(path) == place(path) == "stages.1.0" and layer("stem") == "stem"
    assert place(f"{path}.branches.1x1_kxk.2") == "stages.1.0 > 1x1_kxk"
    assert place("stem.branches.kxk.0") == "stem > kxk" and layer("stem.branches.kxk.0") == "stem"
    full = ["1x1", "kxk", "id"]
    assert live({path: full, f"{path}.branches.kxk.0": ["kxk", "1xk"], "a": ["kxk"]}) == {
        "stages.1.0": 4,
        "a": 1,
    }
    names = ["a", "b"]
    assert positions(["a", "a.branches.kxk.0", "b"], names).tolist() == [0, 0.2, 1]
