"""Trained networks as files: what is in them, and how they stand to the published evidence."""

import hashlib
import json

import pytest
import torch

from replib.checkpoint import load_model
from replib.errors import UserError
from replib.experiments.cells import dataset, plan, run_cell
from replib.experiments.model_files import write_networks
from replib.experiments.params import Table
from replib.experiments.store import Store, compact
from replib.experiments.weights import weights_digest
from replib.training.checkpoint import write_bytes
from replib.training.evaluation import Split, accuracy

CELL = dict(data="digits", train_images=60, held_out=20, body="digits", epochs=2, batch_size=20,
            learning_rate=0.3)  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    torch.set_num_threads(1)
    row = {"label": "row", "set": {}}
    table = Table.model_validate(
        dict(title="t", question="q", control="one", seeds=[0, 1], cell=CELL,
             rows={"one": row, "longer": row | {"set": {"epochs": 3}}})
    )  # fmt: skip
    made, store = plan(table), Store(tmp_path_factory.mktemp("store"))
    for planned in made.cells.values():
        run_cell(planned, made.cells, store)
    return made, store


def test_every_row_and_seed_is_a_network_that_can_be_used(trained, tmp_path):
    made, store = trained
    assert write_networks(made, store, tmp_path) == {"unknown": 4}
    records = json.loads((tmp_path / "models.json").read_text())
    assert {(r["row"], r["seed"]): r["cell"] for r in records} == made.by_row
    sums = dict(
        reversed(line.split("  "))
        for line in (tmp_path / "SHA256SUMS").read_text().split("\n")[:-1]
    )
    assert len({r["weights_sha256"] for r in records}) == len(sums) == 4
    for record in records:
        path = tmp_path / record["file"]
        assert sums[path.name] == hashlib.sha256(path.read_bytes()).hexdigest()
        network = load_model(path).eval()
        data = dataset(made.cells[record["cell"]].cell)
        assert accuracy(network, Split.test(data, "cpu")) == record["test_accuracy"]
        evidence = store.read(record["cell"])
        assert evidence["context"]["weights_sha256"] == record["weights_sha256"]
        assert weights_digest(network.state_dict()) == record["weights_sha256"]


def test_what_the_published_evidence_says(trained, tmp_path):
    made, store = trained
    store = Store(store.runs.parents[1])
    keys = list(made.cells)
    for key in keys[:2]:
        store.publish(key)
    other = store.read(keys[1])
    other["context"]["weights_sha256"] = "0" * 64
    write_bytes(store.published_path(keys[1]), compact(other))
    assert write_networks(made, store, tmp_path) == {"same": 1, "other": 1, "unknown": 2}
    for key in keys[:2]:
        store.published_path(key).unlink()


def test_a_name_a_type_or_a_shape_is_part_of_the_digest():
    value = torch.arange(4.0)
    states = (
        {"a": value}, {"b": value}, {"a": value.view(2, 2)}, {"a": value + 1}, {"a": value.int()},
        {"a": value, "b": value},
    )  # fmt: skip
    assert len({weights_digest(state) for state in states}) == len(states)
    two = {"b": value, "a": value}
    assert weights_digest(two) == weights_digest(dict(reversed(two.items())))
    kernel = torch.rand(2, 3, 3, 3)
    last = kernel.contiguous(memory_format=torch.channels_last)
    assert weights_digest({"k": kernel}) == weights_digest({"k": last})


def test_weights_that_are_not_here_are_asked_for(trained, tmp_path):
    made, _ = trained
    with pytest.raises(UserError, match="run the table again"):
        write_networks(made, Store(tmp_path), tmp_path / "out")
