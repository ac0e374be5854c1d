"""How long work takes on several devices: by hand, by its bounds, and on the page."""

import random

import pytest
from test_slurm import FAMILY, table

from replib.analysis.scaling import Work, enough, finished, lines, longest_line
from replib.errors import UserError
from replib.experiments import queue
from replib.report.results import Results
from replib.report.scaling_figures import Scaling, of_entry

# a 3, b 2; c 4 after a; d 1 after a and b
SMALL = {"a": Work(3), "b": Work(2), "c": Work(4, ("a",)), "d": Work(1, ("a", "b"))}


def test_by_hand():
    assert lines(SMALL) == {"a": 7, "b": 3, "c": 4, "d": 1}
    assert longest_line(SMALL) == 7
    assert finished(SMALL, 1) == 10
    assert finished(SMALL, 2) == 7  # a, then c; b, then (at 3) d
    assert finished(SMALL, 64) == 7 and enough(SMALL) == 2
    assert finished({}, 3) == 0 and longest_line({}) == 0


def test_what_is_not_asked_about_was_done_before():
    assert finished({"c": Work(4, ("a",))}, 1) == 4


@pytest.mark.parametrize("seed", range(20))
def test_it_is_within_its_bounds(seed):
    """Graham's: at most twice the best, which is at least the longest line and an even share."""
    draw = random.Random(seed)
    work = {}
    for i in range(40):
        before = draw.sample(sorted(work), k=min(len(work), draw.randrange(3)))
        work[str(i)] = Work(draw.uniform(0.1, 10), tuple(before))
    total = sum(one.seconds for one in work.values())
    assert finished(work, 1) == pytest.approx(total)
    for devices in (2, 3, 8, 64):
        least = max(longest_line(work), total / devices)
        took = finished(work, devices)
        assert least * (1 - 1e-12) <= took <= longest_line(work) + total / devices
    assert finished(work, 64) == pytest.approx(longest_line(work))


def test_an_entry_is_dealt_out_by_epochs(project):
    """Parents are there once, and before what starts from them; minutes are the entry's."""
    options = dict(table="table2", profile="smoke", rows=["official"], seeds=[0, 1], minutes=6)
    work = of_entry(queue.Entry(**options, why="w"))
    assert sum(one.seconds for one in work.values()) == pytest.approx(360)
    after = {name.split()[-2]: one.after for name, one in work.items()}
    assert after["official"] and all(
        parent in work for one in work.values() for parent in one.after
    )
    assert len(work) == 2 * len(after)
    with pytest.raises(UserError, match="no such row"):
        of_entry(queue.Entry(**options | {"rows": ["offical"]}, why="w"))


def test_a_family_is_as_long_as_its_longest_line():
    """The plan of a table gives the same lines."""
    made = table(FAMILY)
    work = {k: Work(1.0, tuple(p.parents.values())) for k, p in made.cells.items()}
    assert longest_line(work) == 3 and finished(work, 8) == 3


@pytest.mark.slow
def test_the_page_computes_from_evidence(shared_project, monkeypatch):
    """A measured table has its lines; one without evidence is named, and left out."""
    monkeypatch.setenv("REPLIB_HOME", str(shared_project.folder))
    made = Scaling(["tiny9/tiny", "table2/smoke"], [1, 2], start=10, price=3)
    results = Results("tiny9", "tiny")
    seconds = {k: e["context"]["wall_seconds"] for k, e in results.own.items()}
    assert {k: w.seconds for k, w in made.work["tiny9/tiny"].items()} == seconds
    hours = (sum(seconds.values()) + 10 * len(seconds)) / 3600
    words = made.table().data
    assert (
        f"<td>{hours:.3g}</td><td>{86400 * 6 / (3600 * hours):,.0f}</td>".replace(",", "\u202f")
        in words
    )
    assert f"<td>{3 * hours:.2f}</td><td>{3 * hours:.2f}</td>" in words
    assert "6 cells on a core of a processor" in words
    assert "Without evidence of every cell: table2/smoke." in words
    assert "alt=" in made.figure().data
