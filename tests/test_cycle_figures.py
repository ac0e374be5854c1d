"""Figures of the cycles draw the numbers of the evidence: planted, so that they are known."""

import math

import numpy as np
import pytest
from conftest import CONTEXT, ROOT, whole

from replib.analysis.statistics import estimate
from replib.experiments.params import Cell, load_table
from replib.report import cycle_figures
from replib.report.results import Results

TABLE = """
title: "Planted"
question: "?"
proxy: "A test."
control: control
seeds: [0, 1]
cell: {data: digits, train_images: 60, held_out: 20, body: digits, batch_size: 20}
recipes:
  base: {epochs: 3, learning_rate: 0.2}
  cycles: {phases: 2, epochs: 2, learning_rate: 0.5, cycle: {warmup: 1, restructure: none}}
rows:
  base: {label: "Base", use: [base]}
  long: {label: "Long $x", use: [base], as_long_as: control}
  control: {label: "Control <b>", use: [cycles], start: base}
  official: {label: "Official", use: [cycles], set: {cycle: {restructure: cycle}}, start: base}
"""
# seed -> test accuracies in percent, epoch by epoch, and validation accuracies that select
TEST = {
    "base": {0: [50, 60, 70], 1: [52, 62, 72]},
    "long": {0: [50, 55, 60, 64, 65, 68, 90], 1: [51, 56, 61, 63, 66, 69, 91]},
    "control": {0: [71, 75, 76, 80], 1: [70, 76, 79, 78]},
    "official": {0: [60, 78, 61, 83], 1: [59, 80, 62, 81]},
}
VALIDATION = {  # equal ones: the later epoch is selected
    "base": {0: [1, 2, 2], 1: [1, 3, 2]},
    "long": {0: [1, 2, 3, 4, 4, 5, 6], 1: [1, 2, 3, 4, 3, 5, 6]},
    "control": {0: [5, 6, 6, 7], 1: [5, 6, 8, 7]},
    "official": {0: [5, 6, 5, 7], 1: [5, 6, 5, 7]},
}
JUMPS = {"control": [0.0, 0.0], "official": [0.5, 0.7]}


def plant(results: Results, rows=tuple(TEST), rule="validation") -> None:
    """Evidence of every cell of the rows, as a run would have left it."""
    for row in rows:
        phases, epochs = (2, 2) if row in JUMPS else (1, len(TEST[row][0]))
        for seed in results.table.seeds:
            history = {
                "phase": [i // epochs for i in range(phases * epochs)],
                "epoch": [i % epochs for i in range(phases * epochs)],
                "test_accuracy": [value / 100 for value in TEST[row][seed]],
                "train_loss": [0.5] * len(TEST[row][seed]),
                "validation_accuracy": [value / 100 for value in VALIDATION[row][seed]],
            }
            jumps = [value * (1 + seed) for value in JUMPS.get(row, [])]
            restarts = {
                "phase": list(range(len(jumps))),
                "jump_eval": jumps,
                "jump_train": [2 * value for value in jumps],
                "same_class": [1.0] * len(jumps),
            }
            key = results.plan.by_row[row, seed]
            result = {
                "key": key,
                "parameters": {},
                "history": history,
                "restarts": restarts if jumps else {},
                "final": {"selected_by": rule},
            }
            results.store.write(key, whole(result), CONTEXT)


@pytest.fixture
def results(project) -> Results:
    project.table("planted", TABLE)
    return Results("planted", "tiny")


def lines_of(frame, row, seed, *columns):
    part = frame[(frame.row == row) & (frame.seed == seed)]
    return part[["cycle", "epoch", *columns]].to_numpy().tolist()


def test_cycles_are_those_of_the_evidence(results):
    plant(results)
    frame = cycle_figures.by_cycle(results)
    assert set(frame.row) == set(TEST)
    columns = ("selected", "last")
    assert lines_of(frame, "base", 0, *columns) == [[0, 3, 70, 70]]
    assert lines_of(frame, "base", 1, *columns) == [[0, 3, 62, 72]]
    expected = [[0, 3, 62, 72], [1, 5, 76, 76], [2, 7, 79, 78]]
    assert np.array(lines_of(frame, "control", 1, *columns)) == pytest.approx(np.array(expected))
    expected = [[0, 3, 60, 60], [1, 5, 65, 65], [2, 7, 90, 90]]  # cut where the cycles end
    assert np.array(lines_of(frame, "long", 0, *columns)) == pytest.approx(np.array(expected))
    assert lines_of(frame, "long", 1, *columns)[1] == [1, 5, pytest.approx(63), pytest.approx(66)]
    columns = ("jump_eval", "jump_train", "change")
    first, second, third = lines_of(frame, "official", 1, *columns)
    assert all(math.isnan(value) for value in first[2:])
    assert second[2:] == pytest.approx([1.0, 2.0, 80 - 62])
    assert third[2:] == pytest.approx([1.4, 2.8, 81 - 80])
    assert all(math.isnan(line[2]) for line in lines_of(frame, "long", 0, "jump_eval"))


def test_the_paper_protocol_selects_by_the_first_of_the_best_tests(results):
    TEST["control"][0][1] = TEST["control"][0][0]  # equal: the first
    try:
        plant(results, rule="test")
    finally:
        TEST["control"][0][1] = 75
    frame = cycle_figures.by_cycle(results)
    assert frame[(frame.row == "control") & (frame.seed == 0)].selected.tolist() == [70, 71, 80]
    epochs = results.history()
    part = epochs[(epochs.row == "control") & (epochs.seed == 0) & (epochs.total_epoch > 3)]
    assert cycle_figures.selected(part, "test") == part.index[3]
    tied = part[part.phase == 0]
    assert cycle_figures.selected(tied, "test") == tied.index[0]
    assert (
        cycle_figures.selected(tied.assign(validation_accuracy=1.0), "validation")
        == (tied.index[1])
    )


def test_gains_are_paired_by_seed_at_the_same_cycle(results):
    plant(results)
    frame = cycle_figures.by_cycle(results)
    gains = cycle_figures.cycle_gains(results, frame, "official", "last")
    assert gains.keys() == {1, 2}, "cycle 0 is the same network"
    assert gains[1].points == pytest.approx((78 - 75, 80 - 76))
    assert gains[2] == estimate(gains[2].points)
    assert gains[2].points == pytest.approx((83 - 80, 81 - 78))
    long = cycle_figures.cycle_gains(results, frame, "long", "selected")
    assert long[1].points == pytest.approx((65 - 75, 63 - 76))


def drawn(axis):
    """Label -> (x, y) of the lines that have one."""
    lines = {line.get_label(): line.get_data() for line in axis.get_lines()}
    return {label: data for label, data in lines.items() if not label.startswith("_")}


def test_the_lines_are_the_means(results):
    plant(results)
    upper, _, lower, _ = axes = cycle_figures.cycle_accuracy(results).axes
    found = drawn(upper)
    assert list(found) == [r"Long \$x", "Control <b>", "Official"], "base has no cycles"
    x, y = found["Official"]
    assert y == pytest.approx([(70 + 62) / 2, (78 + 80) / 2, (83 + 81) / 2])
    assert x.round().tolist() == [0, 1, 2]
    assert drawn(axes[1])["Control <b>"][1] == pytest.approx([71, 75.5, 79])
    means = [line.get_ydata() for line in lower.get_lines() if line.get_marker() in "osD"]
    assert means[0] == pytest.approx([-11.5, 11.0]) and means[1] == pytest.approx([3.5, 2.5])
    low, high = axes[0].get_ylim()
    assert low < 60 and high > 90


def test_jumps_by_cycle_and_against_the_change(results):
    plant(results)
    left, right = cycle_figures.cycle_jumps(results).axes
    assert drawn(left)["Official"][1] == pytest.approx([0.75, 1.05])
    assert drawn(right)["Official"][1] == pytest.approx([1.5, 2.1])
    assert drawn(left)["Control <b>"][1] == pytest.approx([cycle_figures.FLOOR] * 2)
    assert set(drawn(left)) == {"Official", "Control <b>"}, "a long cosine has no restart"
    left, _ = cycle_figures.change_against_jump(results).axes
    x, y = drawn(left)["Official"]
    assert np.array(x) == pytest.approx([0.5, 0.7, 1.0, 1.4])
    assert np.array(y) == pytest.approx([78 - 70, 83 - 78, 80 - 62, 81 - 80])


def test_the_table_holds_the_numbers_and_escapes_the_words(results):
    assert "Nothing yet" in cycle_figures.summary(results).data
    assert cycle_figures.cycle_accuracy(results) is None
    assert cycle_figures.cycle_jumps(results) is cycle_figures.change_against_jump(results) is None
    plant(results, ("base",))
    results = Results("planted", "tiny")
    assert "Nothing yet" in cycle_figures.summary(results).data, "no cycles were run"
    plant(results)
    html = cycle_figures.summary(Results("planted", "tiny")).data
    assert "Control &lt;b&gt;" in html and "epoch 7" in html
    for shown in ("79.50", "82.00", "+3.00", "-11.50"):  # control, official; gains
        assert shown in html, shown
    assert html.count("<table") == 4


def test_seeds_that_are_missing_are_left_out(results):
    plant(results)
    results.store.own_path(results.plan.by_row["control", 1]).unlink()
    results.__dict__.pop("own", None)
    frame = cycle_figures.by_cycle(Results("planted", "tiny"))
    gains = cycle_figures.cycle_gains(results, frame, "official", "last")
    assert [gain.n for gain in gains.values()] == [1, 1]
    assert len(lines_of(frame, "long", 1)) == 3, "the other seed says where cycles end"


# -- the profiles themselves ----------------------------------------------------------------------
def cells(table: str, profile: str) -> dict[str, dict]:
    """row -> what its key is made of, parents by their names."""
    loaded = load_table(ROOT / "params" / table / f"{profile}.yaml")
    out = {}
    for name, row in loaded.rows.items():
        parents = {"start": row.start, "teacher": row.teacher}
        out[name] = Cell.model_validate(loaded.cell_of(name, 0) | parents).in_key
    return out


@pytest.mark.parametrize(
    "table, profile, other",
    [
        ("repan-cycles", "cifar10", "table2"),
        ("repan-cycles", "cifar100", "table2"),
        ("repan-layers", "cifar100", "table2"),
        ("repan-layers", "quick", "repan-cycles"),
        ("repan-layers", "smoke", "repan-cycles"),
    ],
)
def test_cells_are_shared(table, profile, other):
    """Trained once, read by several pages; their keys are equal where their parameters are."""
    ours, theirs = cells(table, profile), cells(other, profile)
    own = {"plain"} if other == "repan-cycles" else set()
    assert ours.keys() - theirs.keys() == own
    for row in ours.keys() & theirs.keys():
        assert ours[row] == theirs[row], row


@pytest.mark.parametrize("profile", ["smoke", "quick", "cifar10", "cifar100"])
def test_the_long_cosine_is_as_long_as_the_cycles(profile):
    loaded = load_table(ROOT / "params" / "repan-cycles" / f"{profile}.yaml")
    assert loaded.total_epochs("repvgg_long") == loaded.total_epochs("official")
    assert loaded.cell_of("repvgg_long", 0)["phases"] == 1
    assert loaded.cell_of("official", 0)["phases"] >= 3


@pytest.mark.slow
@pytest.mark.parametrize("table", ["repan-cycles", "repan-layers"])
def test_the_notebook_runs_from_the_command_line(table, project, capfd):
    from test_report import offline

    project.run_here("reproduce", table, "--profile", "smoke", "--set", "seeds=[0]")
    page = project.folder / "reports" / f"{table}-smoke.html"
    assert capfd.readouterr().out.rstrip().endswith(f"The report: {page}")
    reader = offline(page)
    words = " ".join(reader.text)
    assert len([s for s in reader.all("src") if s.startswith("data:image/png;base64,")]) >= 1
    assert "Nothing yet" not in words and "not on this machine" not in words
