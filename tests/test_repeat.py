"""Cells that are trained a second time, and what is said where they come out otherwise."""

import copy
import json
import math

import pytest
from conftest import CONTEXT, TINY, at_home, whole

from replib.__main__ import main
from replib.experiments import repeat
from replib.experiments.executor import run_plan
from replib.experiments.store import Store, sha256
from replib.report.page import Page
from replib.report.results import Results


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A project in which one cell, its start included, has been trained and published."""
    with at_home(tmp_path_factory.mktemp("repeated"), {"tiny7": TINY}) as made:
        results = Results("tiny7", "tiny")
        wanted = [results.plan.by_row[row, 0] for row in ("base", "control")]
        run_plan(results.plan.of(wanted), results.store, device="cpu")
        for key in wanted:
            results.store.publish(key)
        yield made


def command(*arguments: str) -> int:
    return main(["repeat", "tiny7", "--profile", "tiny", "--device", "cpu", *arguments])


def forget(store: Store) -> None:
    """The second time, and what was written about it."""
    repeat.second_store("cpu").clean()
    repeat.path_of(store, "tiny7", "tiny", "cpu").unlink(missing_ok=True)


def test_trained_again_on_this_machine_it_is_the_same_to_the_bit(trained, capsys):
    page = Page("tiny7", "tiny")
    assert "No cell was trained a second time" in page.repeated()
    assert command("--rows", "control", "--seeds", "0") == 0
    out = capsys.readouterr().out
    assert "2 cells trained again, 0 were" in out, "what it starts from is trained again, too"
    assert "1 of 1 results are equal to the bit." in out
    assert "1 of 1 weights are equal to the bit." in out and "were the same both times" in out
    assert "control (seed 0)" in page.repeated() and "1 of 1 results" in page.repeated()
    assert command() == 0, "all that has evidence; nothing is left to train"
    out = capsys.readouterr().out
    assert "0 cells trained again, 2 were" in out and "2 of 2 results" in out
    forget(Store())


def test_what_other_code_has_trained_is_no_second_time(trained, monkeypatch, capsys):
    assert command("--rows", "base") == 0
    assert command("--rows", "base") == 0
    assert "0 cells trained again, 1 were" in capsys.readouterr().out
    here = repeat.context_here("cpu")
    with monkeypatch.context() as patch:
        patch.setattr(repeat, "context_here", lambda device: here | {"commit": "another"})
        assert command("--rows", "base") == 0
    out = capsys.readouterr().out
    assert "is not used (changed since: commit)" in out and "1 cells trained again, 0 were" in out
    assert command("--rows", "base", "--fresh") == 0
    out = capsys.readouterr().out
    assert "is not used (it was asked for)" in out and "1 cells trained again, 0 were" in out
    forget(Store())


def planted(store: Store, key: str, **changes) -> dict:
    """Publish other evidence of a cell, as if it had been so; the first, to put it back."""
    path = store.published_path(key)
    before = path.read_bytes()
    evidence = json.loads(before)
    evidence["context"] |= changes.get("context", {})
    for name, value in changes.get("history", {}).items():
        evidence["result"]["history"][name][1] = value
    evidence["result"]["final"] |= changes.get("final", {})
    evidence["result_sha256"] = sha256(evidence["result"])
    path.write_text(json.dumps(evidence))
    return before


def test_what_is_not_what_it_was_is_told_and_is_an_error_only_on_the_same_machine(trained, capsys):
    store, key = Store(), Results("tiny7", "tiny").plan.by_row["base", 0]
    changed = {"history": {"train_loss": 0.125}, "final": {"selected": 0.25}}
    before = planted(store, key, **changed)
    assert command("--rows", "base") == 1
    out, error = capsys.readouterr()
    assert "0 of 1 results are equal to the bit." in out and "1 of 1 weights" in out
    assert "in a seed; seeds: 1." in out
    assert key[:16] in error and "from epoch 2 on" in error and len(error.splitlines()) == 1
    assert "0 of 1 results" in Page("tiny7", "tiny").repeated(), "the page says it, too"
    other = {"context": {"processor": "Another", "weights_sha256": "0" * 64}}
    planted(store, key, **changed, **other)
    assert command("--rows", "base") == 0
    out, error = capsys.readouterr()
    assert "processor: Another the first time" in out and error == ""
    assert "0 of 1 weights" in out and "the same both times" not in out
    store.published_path(key).write_bytes(before)
    page = Page("tiny7", "tiny")
    assert "No cell was trained a second time" in page.repeated(), "of evidence that is no more"
    planted(store, key, context={"weights_sha256": "0" * 64})
    assert command("--rows", "base") == 1
    assert "in what is behind its history" in capsys.readouterr().err
    store.published_path(key).write_bytes(before)
    forget(store)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--rows", "nought"], "rows (=nought): this table has none such; it has base, control"),
        (["--seeds", "7"], "seeds (=7): this table has none such; it has 0."),
        (["--rows", "official"], "no evidence of these cells is here"),
    ],
)
def test_what_cannot_be_trained_again_is_an_error_in_one_line(trained, capsys, arguments, said):
    assert command(*arguments) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1


def made(selected: float, losses=(2.0, 1.0), **context) -> dict:
    """Evidence with these losses."""
    history = {"train_loss": list(losses), "test_accuracy": [0.5] * len(losses)}
    result = whole({"key": "a" * 64, "history": history, "final": {"selected": selected}})
    return {
        "result": result,
        "result_sha256": sha256(result),
        "context": copy.deepcopy(CONTEXT) | {"device": "cpu"} | context,
    }


def test_a_row_is_compared_seed_by_seed():
    """By hand: +1, +2 and +3 points are 2 in the mean, and the interval (n = 3) is ±2.484."""
    cells = []
    for seed, (was, is_now) in enumerate([(0.50, 0.51), (0.60, 0.62), (0.70, 0.73)]):
        pair = made(was), made(is_now, losses=(2.0, 1.5), device="a GPU")
        cells.append(repeat.compared(*pair) | {"rows": ["one"], "seed": seed, "key": f"{seed}"})
    assert [cell["epoch"] for cell in cells] == [2, 2, 2]
    assert repeat.broken(cells) == [], "another device"
    (moved,) = repeat.shifts(cells).values()
    assert moved.mean == pytest.approx(2) and moved.high == pytest.approx(
        2 + 4.303 / math.sqrt(3), abs=1e-3
    )
    said = "\n".join(repeat.sentences(cells))
    assert "one: +2.00 points the second time, at most 3.00 in a seed" in said
    assert "the interval -0.48 to +4.48 holds 0; seeds: 3." in said
    compiled = repeat.compared(made(0.5), made(0.6, compile="default"))
    assert compiled["machine"] == {"compile": [None, "default"]} and not repeat.broken([compiled])
    cells[0]["selected"], cells[2]["selected"] = [0.5, 0.5199], [0.7, 0.7201]
    assert "does NOT hold 0" in "\n".join(repeat.sentences(cells))


def test_a_damaged_file_of_comparisons_is_none(tmp_path):
    path = tmp_path / "repeated.json"
    for text in ("", "[]", "{}", '{"cells": [{}], "device": "cpu"}', '{"cells": 3, "device": ""}'):
        path.write_text(text)
        assert repeat.read(path) is None
    cell = repeat.compared(made(0.5), made(0.5)) | {"rows": ["one"], "seed": 0}
    cell |= {"key": "a" * 64, "result_sha256": "b" * 64}
    repeat.write(path, "cpu", [cell])
    repeat.write(path, "cpu", [cell | {"key": "c" * 64}])
    assert [one["key"] for one in repeat.read(path)["cells"]] == ["a" * 64, "c" * 64]
