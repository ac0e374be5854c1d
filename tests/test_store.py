"""Evidence and checkpoints are whole or they are not used; published evidence is never lost."""

import hashlib
import io
import json
import os
import pickle
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import CONTEXT, ROOT, TINY, whole
from hypothesis import given, settings
from hypothesis import strategies as st

from replib.__main__ import main
from replib.blocks import BLOCKS
from replib.experiments.store import Store, compact, read_evidence, sha256
from replib.report.results import Results
from replib.training import checkpoint
from replib.training.checkpoint import MAGIC, BadCheckpoint

TWO_CELLS = [f"rows.{row}=" for row in ("official", "preserving", "distilled", "teacher")]
KEY, OTHER = "a" * 64, "b" * 64
RESULT = {"key": KEY, "history": {"loss": [0.1, 1e-300], "none": [None]}, "final": {"selected": 1}}
STATE = {"model": {"w": torch.arange(6.0).view(2, 3)}, "progress": [{"score": 0.5}], "seconds": 1.5}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.sampled_from('[]{},:" \\\nab'), max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=20,
)  # fmt: skip


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path)


@given(JSON)
@settings(max_examples=300, deadline=None)
def test_compact_is_the_same_json(value):
    assert json.loads(compact({"evidence": value})) == {"evidence": value}


def test_compact_is_one_line_per_column():
    lines = compact({"b": [1, [2, 3], {"c": [4]}], "a": {"d": []}}).decode().splitlines()
    assert lines == ["{", ' "a": {', '  "d": []', " },", ' "b": [1, [2, 3], {"c": [4]}]', "}"]


def test_evidence_comes_back(store):
    store.write(KEY, RESULT, {"device": "cpu"})
    assert store.read(KEY)["result"] == RESULT
    assert store.read(KEY, published=True) is None and store.read(OTHER) is None
    store.publish(KEY)
    assert store.read(KEY, published=True) == store.read(KEY)


def test_a_diverged_loss_is_null(store):
    store.write(KEY, RESULT | {"history": {"loss": [0.1, float("nan"), float("inf")]}}, {})
    assert store.read(KEY)["result"]["history"]["loss"] == [0.1, None, None]


def changed(evidence: dict, how: str) -> bytes:
    """An evidence file that must not be believed."""
    text = json.dumps(evidence)
    if how == "a result changed":
        evidence["result"]["final"]["selected"] = 2
    elif how == "of another cell":
        evidence["result"]["key"] = OTHER
        evidence["result_sha256"] = sha256(evidence["result"])
    elif how == "no context":
        del evidence["context"]
    elif how == "no hash":
        del evidence["result_sha256"]
    raw = {
        "cut short": text[: len(text) // 2].encode(),
        "empty": b"",
        "a list": b"[]",
        "a text": b'"result"',
        "not a number": b'{"result": NaN, "result_sha256": "", "context": {}}',
        "not UTF-8": b"\xff\xfe\xff",
        "deep": b"[" * 100_000,
    }
    return raw.get(how, json.dumps(evidence).encode())


@pytest.mark.parametrize("published", [False, True], ids=["own", "published"])
@pytest.mark.parametrize(
    "how",
    "a result changed/of another cell/no context/no hash/cut short/empty/a list/a text/"
    "not a number/not UTF-8/deep".split("/"),
)
def test_damaged_evidence_is_absent(how, published, store):
    store.write(KEY, RESULT, {})
    store.publish(KEY)
    path = store.published_path(KEY) if published else store.own_path(KEY)
    path.write_bytes(changed(json.loads(path.read_bytes()), how))
    assert store.read(KEY, published) is None
    assert store.read(KEY, not published)["result"] == RESULT


def test_a_damaged_result_is_trained_again_and_comes_out_the_same(project, in_process):
    project.table("table9", TINY)
    changes = [*TWO_CELLS, "rows.control=", "control=base", "recipes.base.epochs=2"]
    results = Results("table9", "tiny", changes)
    assert results.train(device="cpu").trained == 1
    (path,) = map(results.store.own_path, results.plan.cells)
    first = path.read_bytes()
    assert results.train(device="cpu").trained == 0
    path.write_bytes(first[:-100])
    assert results.train(device="cpu").trained == 1
    assert json.loads(path.read_bytes())["result"] == json.loads(first)["result"]


# -- checkpoints ---------------------------------------------------------------------------------
def saved(store) -> bytes:
    """A good checkpoint file's bytes."""
    store.save(KEY, "checkpoint", STATE)
    return (store.folder(KEY) / "checkpoint.ckpt").read_bytes()


def refused(store, content: bytes, name: str = "checkpoint") -> str:
    """The word with which the content is refused; the file is out of the way then, and kept."""
    path = store.folder(KEY) / f"{name}.ckpt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    state, problem = store.load(KEY, name)
    assert state is None and str(path) in problem and "starts again" in problem
    assert problem.isprintable() and not path.exists()
    assert path.with_name(f"{path.name}.refused").read_bytes() == content
    return problem


def test_a_checkpoint_comes_back(store):
    saved(store)
    state, problem = store.load(KEY, "checkpoint")
    assert problem is None and torch.equal(state["model"].pop("w"), STATE["model"]["w"])
    assert state["progress"] == STATE["progress"] and state["seconds"] == 1.5
    assert store.load(OTHER, "checkpoint") == (None, None)


def test_a_checkpoint_cut_at_any_length(store):
    whole = saved(store)
    for length in {*range(0, 200), *range(200, len(whole), 41), len(whole) - 1}:
        refused(store, whole[:length])


def test_a_checkpoint_with_a_wrong_bit(store):
    whole = saved(store)
    for at in {*range(0, 60), *range(60, len(whole), 101), len(whole) - 1}:
        refused(store, whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])


def test_a_foreign_checkpoint(store):
    store.save(OTHER, "checkpoint", STATE)
    foreign = (store.folder(OTHER) / "checkpoint.ckpt").read_bytes()
    assert OTHER in refused(store, foreign)
    store.save(KEY, "weights", STATE)
    weights = (store.folder(KEY) / "weights.ckpt").read_bytes()
    assert "weights" in refused(store, weights), "one cell's weights are not its checkpoint"


OWN = {"key": f"checkpoint {KEY}"}


class Code:
    """Makes a folder when it is unpickled."""

    def __init__(self, made):
        self.made = made

    def __reduce__(self):
        return os.mkdir, (str(self.made),)


@pytest.mark.parametrize("way", ["torch", "pickle"])
@pytest.mark.parametrize("sealed", [True, False], ids=["with a right digest", "bare"])
def test_a_checkpoint_with_code_runs_none(way, sealed, store, tmp_path):
    buffer, state = io.BytesIO(), {"key": f"checkpoint {KEY}", "state": Code(tmp_path / "made")}
    torch.save(state, buffer) if way == "torch" else pickle.dump(state, buffer, 2)
    payload = buffer.getvalue()
    head = MAGIC + hashlib.sha256(payload).digest() if sealed else b""
    refused(store, head + payload)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("inside", [None, 1, [], {}, {"key": KEY}, OWN | {"state": 3}, OWN])
def test_a_checkpoint_of_another_shape(inside, store):
    buffer = io.BytesIO()
    torch.save(inside, buffer)
    payload = buffer.getvalue()
    refused(store, MAGIC + hashlib.sha256(payload).digest() + payload)


CLAIMS = torch.zeros(1).expand(10**9, 512)


@pytest.mark.parametrize("state", [{"w": CLAIMS}, {"a": [1, {"b": ({"w": CLAIMS},)}]}])
def test_a_checkpoint_that_claims_more_than_it_has(state, store):
    store.save(KEY, "checkpoint", state)
    path = store.folder(KEY) / "checkpoint.ckpt"
    assert "'w' of shape (1000000000, 512) has values for 4 bytes only" in refused(
        store, path.read_bytes()
    )


def test_a_checkpoint_may_hold_itself_and_what_is_empty(store):
    """As the scores of DyRep before the first step; a circle is no endless way down."""
    state = {"total": torch.zeros(0, 3), "inside": []}
    state["inside"].append(state["inside"])
    store.save(KEY, "checkpoint", state)
    assert store.load(KEY, "checkpoint")[0]["total"].shape == (0, 3)


@pytest.mark.parametrize("block", BLOCKS)
def test_no_state_of_ours_claims_more_than_it_has(block, store):
    made = BLOCKS[block](4, 4, 1 if block == "orepa_1x1" else 3)
    store.save(KEY, "weights", {"model": made.state_dict()})
    assert store.load(KEY, "weights")[1] is None


@pytest.mark.parametrize(
    "asked",
    [lambda: bytearray(1 << 60), lambda: torch.empty(1 << 58)],
    ids=["by Python", "by torch"],
)
@pytest.mark.parametrize("name", ["weights", "checkpoint"])
def test_nothing_is_refused_because_memory_is_short(name, asked, store, monkeypatch):
    """What has the right hash is whole; it is read when there is more."""
    store.save(KEY, name, STATE)
    with monkeypatch.context() as short, pytest.raises(MemoryError) as error:
        short.setattr(torch, "load", lambda *_, **__: asked())
        store.load(KEY, name)
    path = store.folder(KEY) / f"{name}.ckpt"
    assert str(error.value) == f"{path} needs more memory than there is"
    assert list(path.parent.iterdir()) == [path] and store.load(KEY, name)[1] is None


def test_of_two_processes_that_refuse_a_file_one_moves_it(store, monkeypatch):
    saved(store)
    path = store.folder(KEY) / "checkpoint.ckpt"
    path.write_bytes(b"damaged")
    inner = checkpoint.load

    def load(*arguments):
        with monkeypatch.context() as other:
            other.setattr(checkpoint, "load", inner)
            assert store.load(KEY, "checkpoint")[1] is not None
        raise BadCheckpoint("damaged")

    monkeypatch.setattr(checkpoint, "load", load)
    assert "starts again" in store.load(KEY, "checkpoint")[1]
    assert path.with_name("checkpoint.ckpt.refused").read_bytes() == b"damaged"


def test_a_bad_checkpoint_says_so_and_the_cell_starts_again(project, in_process, capfd):
    """Bad weights of a parent and a bad checkpoint of a child: both again, with a word."""
    project.table("table9", TINY)
    results = Results("table9", "tiny", TWO_CELLS)
    assert results.train(device="cpu").trained == 2
    store = results.store
    base, control = (results.plan.by_row[row, 0] for row in ("base", "control"))
    before = {key: store.read(key)["result"] for key in (base, control)}
    shutil.copy(store.folder(control) / "weights.ckpt", store.folder(base) / "weights.ckpt")
    store.own_path(control).unlink()
    (store.folder(control) / "checkpoint.ckpt").write_bytes(b"half a")
    capfd.readouterr()
    assert results.train(device="cpu").trained == 2
    assert capfd.readouterr().err.count("starts again") == 2
    assert {key: store.read(key)["result"] for key in (base, control)} == before


def test_half_written_files_are_ignored(store):
    store.write(KEY, RESULT, {})
    for name in ("result.json", "weights.ckpt", "checkpoint.ckpt"):
        (store.folder(KEY) / f".{name}.123.part").write_bytes(b"half")
    store.published.mkdir(parents=True)
    (store.published / ".x.json.1.part").write_bytes(b"half")
    assert store.read(KEY)["result"] == RESULT
    assert store.load(KEY, "weights") == store.load(KEY, "checkpoint") == (None, None)
    assert [path for path in store.published.glob("*.json") if read_evidence(path)] == []


def test_a_checkpoint_that_is_no_file_is_an_error_not_a_loss(store):
    path = store.folder(KEY) / "checkpoint.ckpt"
    path.mkdir(parents=True)
    with pytest.raises(OSError, match="directory"):
        store.load(KEY, "checkpoint")
    assert path.is_dir()


def test_refusals_are_one_class():
    assert issubclass(BadCheckpoint, ValueError) and checkpoint.load(ROOT / "absent", KEY) is None


def test_publishing_says_what_it_replaces(shared_project, monkeypatch, capsys):
    monkeypatch.setenv("REPLIB_HOME", str(shared_project.folder))
    results, command = Results("tiny9", "tiny"), ["publish", "tiny9", "--profile", "tiny"]
    key, evidence = next(iter(results.own.items()))
    other = evidence["result"] | {"versions": evidence["result"]["versions"] | {"engine": 1}}
    other = {"result": other, "result_sha256": sha256(other), "context": evidence["context"]}
    results.store.published_path(key).parent.mkdir(parents=True, exist_ok=True)
    results.store.published_path(key).write_bytes(compact(other))
    for said in (1, 0):
        assert main(command) == 0
        out = capsys.readouterr().out
        assert out.count("\n1 of them replaced a different result: see git diff.\n") == said
        assert results.store.read(key, published=True) == evidence
    shutil.rmtree(results.store.published)


# -- cleaning ------------------------------------------------------------------------------------
@pytest.mark.parametrize("how", ["make", "store"])
def test_cleaning_never_touches_published_evidence(how, store, tmp_path):
    store.write(KEY, RESULT, {})
    store.publish(KEY)
    page = tmp_path / "reports" / "table2-quick.html"
    page.write_text("a page")
    if how == "make":
        shutil.copy(ROOT / "Makefile", tmp_path)
        subprocess.run(["make", "clean"], cwd=tmp_path, check=True, capture_output=True)
        assert not page.exists()
    else:
        store.clean()
    assert not store.runs.exists()
    assert store.read(KEY, published=True)["result"] == RESULT


# -- bundles from another machine ----------------------------------------------------------------
def test_a_bundle_is_taken_in(project, capfd):
    store = Store()
    result = whole({"parameters": {"seed": 0}, "data": {"digest": "d"}})
    key = sha256({name: result[name] for name in ("parameters", "versions")} | {"data": "d"})
    store.write(key, result | {"key": key}, CONTEXT)
    bundle = project.folder / "bundle.json"
    bundle.write_bytes(compact({"evidence": [store.read(key)]}))
    assert main(["evidence", "add", str(bundle)]) == 0
    assert store.read(key, published=True) == store.read(key)
    assert main(["evidence", "check"]) == 0
    assert "1 evidence files are whole" in capfd.readouterr().out
    store.published_path(key).rename(store.published_path(OTHER))
    assert main(["evidence", "check"]) == 2
    assert capfd.readouterr().err.count("\n") == 1


def bundle_of(project, *accuracies: float) -> Path:
    """A bundle with a cell for every seed from 0, whose tests come out so."""
    found = []
    for seed, accuracy in enumerate(accuracies):
        result = whole({"parameters": {"seed": seed}, "data": {"digest": "d"}})
        result["deployed"]["test_accuracy"] = accuracy
        made = {name: result[name] for name in ("parameters", "versions")} | {"data": "d"}
        result["key"] = sha256(made)
        found.append(sealed(result) | {"context": CONTEXT | {"commit": f"{accuracies}"}})
    path = project.folder / "bundle.json"
    path.write_bytes(compact({"evidence": found}))
    return path


def test_a_published_result_is_not_replaced_by_another(project, capfd):
    """The cell is named, and the others of the bundle are not taken either."""
    assert main(["evidence", "add", str(bundle_of(project, 0.5))]) == 0
    (path,) = Store().published.iterdir()
    before = path.read_bytes()
    capfd.readouterr()
    assert main(["evidence", "add", str(bundle_of(project, 0.25, 0.75))]) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "nothing was taken" in error
    assert str(path) in error and f"cell {path.stem} " in error
    assert list(Store().published.iterdir()) == [path] and path.read_bytes() == before
    assert main(["evidence", "add", str(bundle_of(project, 0.5, 0.75))]) == 0
    assert path.read_bytes() == before  # the same result: also of when and where it was found
    assert len(list(Store().published.iterdir())) == 2


def test_a_bundle_with_two_results_of_a_cell_is_refused(project, capfd):
    first, second = (json.loads(bundle_of(project, a).read_bytes()) for a in (0.5, 0.25))
    both = {"evidence": first["evidence"] + second["evidence"]}
    (project.folder / "bundle.json").write_bytes(compact(both))
    assert main(["evidence", "add", str(project.folder / "bundle.json")]) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "another result in the same bundle" in error
    assert not Store().published.exists()


def sealed(result: object) -> dict:
    """Evidence with a right hash."""
    return {"result": result, "result_sha256": sha256(result), "context": {}}


BAD_BUNDLES = {
    "no JSON": b"{",
    "a list": b"[]",
    "deep": b"[" * 100_000,
    "numbers": b'{"evidence": [1]}',
    "a wrong hash": compact({"evidence": [sealed(RESULT) | {"result_sha256": "0"}]}),
    "no context": compact({"evidence": [{"result": RESULT, "result_sha256": sha256(RESULT)}]}),
    "no key": compact({"evidence": [sealed({})]}),
    "a list as result": compact({"evidence": [sealed([])]}),
    "a short key": compact({"evidence": [sealed({"key": "abc"})]}),
    "a key that climbs": compact(
        {"evidence": [sealed({"key": "../../../../evil".ljust(64, "a")})]}
    ),
    "no result": compact({"evidence": [sealed({"key": KEY})]}),
    "of other parameters": compact(
        {"evidence": [sealed(whole({"key": KEY})) | {"context": CONTEXT}]}
    ),
    "good, then bad": compact({"evidence": [sealed(RESULT), sealed({"key": "x"})]}),
}


@pytest.mark.parametrize("how", BAD_BUNDLES)
def test_a_bad_bundle_is_refused_whole(how, project, capfd):
    (project.folder / "bundle.json").write_bytes(BAD_BUNDLES[how])
    assert main(["evidence", "add", str(project.folder / "bundle.json")]) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "bundle.json" in error
    assert not Store().published.exists()
