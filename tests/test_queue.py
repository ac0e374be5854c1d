"""Queues: entries one after the other, what is here and what is not, from machine to machine."""

import json
import shutil

import pytest
import yaml
from conftest import ROOT, TINY, Project
from test_cells import CELL

from replib import parallel
from replib.__main__ import main
from replib.errors import UserError
from replib.experiments import executor, queue
from replib.experiments.claims import Claims
from replib.experiments.store import Store
from replib.training import checkpoint


def table(**epochs):
    """A table of rows that differ in their epochs; one that is called `after_X` starts from X."""
    rows = {
        name: dict(
            label=name, set={"epochs": count, "learning_rate": 0.01 + 0.01 * place},
            start=name.removeprefix("after_") if name.startswith("after_") else None,
        )
        for place, (name, count) in enumerate(epochs.items())
    }  # fmt: skip
    made = dict(title="t", question="q", proxy="p", control=next(iter(rows)), cell=CELL, rows=rows)
    return yaml.safe_dump(made | {"seeds": [0]})


def entry(name, *rows, **more):
    return {
        "table": name, "profile": "tiny", "rows": [*rows], "seeds": [0], "minutes": 6.0, "why": "w",
    } | more  # fmt: skip


@pytest.fixture
def line_up(project):
    """Write a queue of entries; its path."""

    def write(*entries):
        path = project.folder / "params" / "queue.yaml"
        path.write_text(yaml.safe_dump({"entries": [*entries]}), encoding="utf-8")
        return path

    project.table("one9", table(a=1, b=3, c=1, after_c=2))
    project.table("two9", table(d=9, e=1))
    return write


@pytest.fixture
def trained(monkeypatch):
    """Nothing is trained: the rows are listed, in the order in which they would be."""
    order = []
    monkeypatch.setattr(executor, "run_cell", lambda p, *_, **__: order.append(p.rows[0]))
    return order


def planning(path):
    return queue.Planning(queue.read(path), Store())


def test_entries_come_one_after_the_other(line_up, in_process, trained, capfd):
    """Even where a later one is longer; what a row starts from comes with it, and nothing else."""
    path = line_up(
        entry("one9", "a", "after_c"), entry("one9", "a", "b", seeds=[1]), entry("two9", seeds=[0])
    )
    assert main(["run", "--queue", str(path), "--workers", "2", "--device", "cpu"]) == 0
    assert trained == ["a", "c", "after_c", "b", "a", "d", "e"]
    out = capfd.readouterr().out.splitlines()
    assert (
        out[-3] == "one9 tiny a, after_c, seeds 0: 0 of 3 cells, 6 GPU minutes left (an estimate)"
    )
    assert out[-1].startswith("two9 tiny, seeds 0: 0 of 2 cells")


def test_a_cell_of_two_entries_is_trained_with_the_first(line_up, in_process, trained):
    path = line_up(entry("one9", "a", "b", "c"), entry("two9"), entry("one9", "b"))
    assert main(["run", "--queue", str(path), "--workers", "2", "--device", "cpu"]) == 0
    assert trained == ["a", "c", "b", "d", "e"]


def test_settings_of_an_entry_are_those_of_the_command_line(line_up):
    path = line_up(entry("one9", "a"), entry("one9", "a", set=["rows.a.set.epochs=7"]))
    assert sorted(p.epochs for p in planning(path).plan.cells.values()) == [1, 7]


def test_published_evidence_counts_as_trained(line_up, in_process, trained, capfd):
    """But for a cell that another one starts from, whose weights are wanted."""
    path = line_up(entry("one9", "a", "b"), entry("one9", "after_c"))
    found = planning(path).plan
    rows = {planned.rows[0]: key for key, planned in found.cells.items()}
    store = Store()
    for row in ("a", "c"):
        store.write(rows[row], {"key": rows[row]}, {})
        store.publish(rows[row])
    shutil.rmtree(store.runs)
    assert main(["run", "--queue", str(path), "--list"]) == 0
    first, second = capfd.readouterr().out.splitlines()
    assert first.endswith("a, b, seeds 0: 1 of 2 cells, 3 GPU minutes left (an estimate)")
    assert second.endswith("after_c, seeds 0: 1 of 2 cells, 3 GPU minutes left (an estimate)")
    assert trained == []
    assert main(["run", "--queue", str(path), "--workers", "1", "--device", "cpu"]) == 0
    assert trained == ["b", "c", "after_c"]


def test_an_entry_that_cannot_be_planned_keeps_nothing_else_back(
    line_up, in_process, trained, capfd
):
    missing = entry("two9", set=["cell.data=imagefolder", "cell.data_dir=absent"])
    path = line_up(missing, entry("one9", "nothing"), entry("one9", "a", measured="an A100"))
    assert main(["run", "--queue", str(path), "--workers", "2", "--device", "cpu"]) == 0
    assert trained == ["a"]
    absent, unknown, last = capfd.readouterr().out.splitlines()[-3:]
    assert "not here: " in absent and "absent" in absent
    assert "not here: rows (=nothing)" in unknown and "after_c" in unknown
    assert last.endswith("0 of 1 cells, 6 GPU minutes left (measured on an A100)")


@pytest.mark.parametrize(
    "change, named",
    [
        ({"minutes": 0}, ["entries.0.minutes", "0"]),
        ({"seeds": []}, ["entries.0.seeds"]),
        ({"table": "../x"}, ["entries.0.table", "../x"]),
        ({"colour": 1}, ["entries.0.colour"]),
    ],
)
def test_a_mistake_in_a_queue_is_told_in_one_line(change, named, line_up, capfd):
    path = line_up(entry("one9") | change)
    assert main(["run", "--queue", str(path)]) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and all(text in error for text in [*named, str(path)]), error


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["table2", "--queue", "q.yaml"], "table2"),
        (["--queue", "q.yaml", "--set", "a=1"], "--set"),
        (["--queue", "absent.yaml"], "absent.yaml"),
        (["table2", "--list"], "--list"),
        ([], "no table is named"),
    ],
)
def test_a_table_or_a_queue(arguments, named, capfd):
    assert main(["run", *arguments]) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and named in error, error


def test_another_machine_goes_on(project, in_process, tmp_path, monkeypatch, capfd):
    """Evidence and checkpoints travel; the cell that was stopped is not begun again, and what comes
    out is what one machine alone makes."""
    text = json.dumps({"entries": [entry("tiny9", "official")]})
    homes = {name: Project(tmp_path / name) for name in ("one", "two", "alone")}

    def on(name, *more):
        homes[name].table("tiny9", TINY)
        path = homes[name].folder / "queue.json"
        path.write_text(text)
        monkeypatch.setenv("REPLIB_HOME", str(homes[name].folder))
        command = ["run", "--queue", str(path), "--device", "cpu", *more]
        assert main(command) == 0
        return capfd.readouterr().out

    bundle = tmp_path / "out" / "results.json"
    for _ in range(50):
        out = on("one", "--budget-seconds", "0.001", "--out", str(bundle))
        if "1 of 2 cells" in out and out.count("to go on from") == 2:
            break
    assert {p.name.partition("-")[2] for p in queue.states_folder(bundle).iterdir()} == {
        "checkpoint.ckpt",
        "weights.ckpt",
    }
    monkeypatch.setenv("REPLIB_HOME", str(homes["two"].folder))
    assert main(["evidence", "add", str(bundle)]) == 0
    assert "1 evidence files" in (said := capfd.readouterr().out) and "2 files to go on" in said
    out = on("two")
    assert "1 cells trained, 1 were there" in out and "2 of 2 cells" in out
    on("alone")
    results = {}
    for name, made in homes.items():
        store = Store(made.folder)
        paths = [*store.runs.glob("*/result.json"), *store.published.glob("*.json")]
        found = [json.loads(path.read_bytes())["result"] for path in paths]
        results[name] = {one["key"]: one for one in found}
    assert len(results["alone"]) == 2 and results["two"] == results["alone"]


def test_the_projects_own_queue():
    """Every entry names rows and settings that exist, whether or not its data are here."""
    made = queue.read(ROOT / "params" / "gpu-queue.yaml")
    for one in made.entries:
        path = ROOT / "params" / one.table / f"{one.profile}.yaml"
        found = queue.load_table(path, [f"seeds={one.seeds}", *one.set], networks=False)
        assert set(one.rows) <= set(found.rows), one.name


def test_a_bundle_takes_no_file_from_elsewhere(project, tmp_path):
    """Names that are not those of a cell's files stay where they are."""
    bundle = tmp_path / "results.json"
    folder = queue.states_folder(bundle)
    folder.mkdir()
    for name in ("0" * 16 + "-result.ckpt", "x-checkpoint.ckpt", "0" * 16 + "-weights.ckpt"):
        checkpoint.save(folder / name, "weights " + "0" * 64, {})
    store = Store()
    assert queue.take_states(bundle, store) == (1, [])
    assert [p.name for p in store.runs.rglob("*.ckpt")] == ["weights.ckpt"]


# -- what is here already --------------------------------------------------------------------------
KEY = "a" * 64


def at(epochs, batch=0, **more):
    """A checkpoint so far."""
    return {"progress": {"history": [{}] * epochs, "batch": batch}} | more


@pytest.fixture
def bundle(tmp_path):
    """A bundle beside which lie a checkpoint, after two epochs and three steps, and weights."""
    path = tmp_path / "results.json"
    folder = queue.states_folder(path)
    for name, state in (("checkpoint", at(2, 3)), ("weights", {"from": "elsewhere"})):
        checkpoint.save(folder / f"{KEY[:16]}-{name}.ckpt", f"{name} {KEY}", state)
    return path


def taken(bundle, name):
    """(what a cell finds afterwards, why the file was not taken)."""
    count, left = queue.take_states(bundle, Store())
    assert count + len(left) == len(list(queue.states_folder(bundle).iterdir()))
    why = [line for line in left if f"-{name}.ckpt is not taken: " in line]
    return Store().load(KEY, name)[0], why and why[0].rpartition(": ")[2]


@pytest.mark.parametrize("own", [at(1, 9), at(2, 2), None])
def test_a_checkpoint_that_is_further_is_taken(own, project, bundle):
    if own is not None:
        Store().save(KEY, "checkpoint", own)
    assert taken(bundle, "checkpoint") == (at(2, 3), [])


@pytest.mark.parametrize("own", [at(2, 3, mine=1), at(2, 4), at(3, 0)])
def test_a_checkpoint_that_is_as_far_is_kept(own, project, bundle):
    Store().save(KEY, "checkpoint", own)
    assert taken(bundle, "checkpoint") == (own, "this cell is as far here.")


def test_whole_weights_are_kept_and_damaged_ones_replaced(project, bundle):
    Store().save(KEY, "weights", {"from": "here"})
    assert taken(bundle, "weights") == ({"from": "here"}, "this cell has weights here.")
    (Store().folder(KEY) / "weights.ckpt").write_bytes(b"damaged")
    assert taken(bundle, "weights") == ({"from": "elsewhere"}, [])


def test_a_finished_cell_takes_nothing(project, bundle):
    store = Store()
    store.write(KEY, {"key": KEY}, {})
    for name in ("checkpoint", "weights"):
        assert taken(bundle, name) == (None, "this cell is finished here.")
    assert [path.name for path in store.folder(KEY).iterdir()] == ["result.json"]


def test_a_cell_that_is_being_trained_takes_nothing(project, bundle):
    claim = Claims().take(Store().folder(KEY))
    kept, why = taken(bundle, "checkpoint")
    assert kept is None and why == "a run trains this cell, add it when that has ended."
    claim.release()
    assert taken(bundle, "checkpoint") == (at(2, 3), [])


@pytest.mark.parametrize("how", ["damaged", "of another cell", "of another kind", "no run's"])
def test_a_file_that_is_not_what_it_says_is_not_taken(how, project, bundle):
    """However far it says to be: what is here would be lost."""
    Store().save(KEY, "checkpoint", at(1))
    path = queue.states_folder(bundle) / f"{KEY[:16]}-checkpoint.ckpt"
    if how == "damaged":
        path.write_bytes(path.read_bytes()[:-1])
    elif how == "no run's":
        checkpoint.save(path, f"checkpoint {KEY}", {"progress": None})
    else:
        owner = f"weights {KEY}" if "kind" in how else "checkpoint " + "b" * 64
        checkpoint.save(path, owner, at(9))
    kept, why = taken(bundle, "checkpoint")
    assert kept == at(1) and why.isprintable() and why


def test_what_is_not_taken_is_told(project, bundle, capfd):
    bundle.write_text('{"evidence": []}')
    Store().save(KEY, "weights", {})
    assert main(["evidence", "add", str(bundle)]) == 0
    said, line = capfd.readouterr().out.splitlines()
    assert "1 files to go on from" in said
    assert line.endswith(f"{KEY[:16]}-weights.ckpt is not taken: this cell has weights here.")


# -- of several processes --------------------------------------------------------------------------
@pytest.mark.parametrize("place", [0, 1])
def test_the_first_of_several_processes_writes_the_bundle(
    place, line_up, monkeypatch, tmp_path, capfd
):
    """The others find no file that they could ask for its size; all wait for one another."""
    path = line_up(entry("one9", "a"))
    (key,) = planning(path).plan.cells
    Store().save(key, "checkpoint", at(1))
    waited, out = [], tmp_path / "out" / "results.json"
    monkeypatch.setattr(executor, "run_plan", lambda *_, **__: executor.Outcome(0, 0, 1))
    monkeypatch.setattr(parallel, "processes", lambda: 2)
    monkeypatch.setattr(parallel, "place", lambda: place)
    monkeypatch.setattr(parallel, "wait", lambda: waited.append(out.exists()))
    assert main(["run", "--queue", str(path), "--out", str(out)]) == 0
    assert waited == [False, place == 0] and out.exists() == (place == 0)
    assert ("to go on from" in capfd.readouterr().out) == (place == 0)
    assert len(list(queue.states_folder(out).glob("*"))) == (place == 0)


def test_an_unknown_table(project):
    with pytest.raises(UserError, match="no profile 'tiny' of 'nothing9'"):
        queue.planned(queue.Entry(**entry("nothing9")), Store())
