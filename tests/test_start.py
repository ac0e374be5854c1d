"""A run can start from a row, from the key of any finished cell, and from a checkpoint file."""

import pytest
import torch

from replib import official
from replib.errors import UserError
from replib.experiments.cells import plan, run_cell, trained_model
from replib.experiments.params import Table
from replib.experiments.store import Store
from replib.models import build
from replib.training.data import load

CELL = dict(data="digits", train_images=60, held_out=20, body="digits", epochs=1,
            batch_size=40, learning_rate=0.1)  # fmt: skip


def table(start=None, **cell):
    """A table of one row."""
    row = {"label": "row", "start": start}
    return Table.model_validate(
        dict(title="t", question="q", control="row", seeds=[0], cell=CELL | cell, rows={"row": row})
    )


def only(plan):
    """The last cell of a plan."""
    return list(plan.cells.values())[-1]


@pytest.fixture
def store(tmp_path):
    torch.set_num_threads(1)
    return Store(tmp_path)


def trained(table, store):
    """Run every missing cell of a table in this process."""
    made = plan(table, store)
    for planned in made.missing(store):
        run_cell(planned, made.cells, store)
    return only(made)


@pytest.mark.parametrize("length", [16, 64])
def test_from_a_key(store, length):
    parent = trained(table(), store)
    made = plan(table(parent.key[:length], learning_rate=0.0), store)
    assert list(made.cells) == [parent.key, only(made).key] and made.missing(store) == [only(made)]
    child = trained(table(parent.key[:length], learning_rate=0.0), store)
    old = trained_model(parent, store).fc.weight
    assert torch.equal(trained_model(child, store).fc.weight, old)  # learning rate 0


def test_a_parent_without_weights_is_trained_again(store):
    parent = trained(table(), store)
    before = store.read(parent.key)["result"]
    (store.folder(parent.key) / "weights.ckpt").unlink()
    assert plan(table(parent.key), store).missing(store)[0].key == parent.key
    trained(table(parent.key), store)
    assert store.read(parent.key)["result"] == before


def test_from_our_own_file(store):
    parent = trained(table(), store)
    path = str(store.folder(parent.key) / "weights.ckpt")
    child = trained(table(path, learning_rate=0.0), store)
    assert child.cell.start.startswith("file:")
    old = trained_model(parent, store).fc.weight
    assert torch.equal(trained_model(child, store).fc.weight, old)


def test_from_repan_and_its_damage_is_named(store, tmp_path, monkeypatch):
    from test_data import folder

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    load.cache_clear()
    root = folder(tmp_path / "images", images=8, size=(16, 16))
    cell = dict(data="imagefolder", data_dir=str(root), body="cifar_repvgg_a0", train_images=16,
                held_out=4, learning_rate=0.0)  # fmt: skip
    torch.manual_seed(5)
    model = build("cifar_repvgg_a0", "repvgg", classes=2, in_channels=3)
    path = tmp_path / "repan.pyth"
    torch.save(official.export(model, "repan_repvgg_a0"), path)
    child = trained(table(str(path), **cell), store)
    assert torch.equal(trained_model(child, store).fc.weight, model.fc.weight)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"^start .*repan.pyth.\) is no checkpoint of cifar") as e:
        trained(table(str(path), **cell), store)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("start", ["0123456789abcdef", "no/such/file.pyth", "other_row"])
def test_an_unknown_start_is_named(store, start):
    with pytest.raises(UserError, match=rf"start \(='{start}'\)") as error:
        plan(table(start), store)
    assert "\n" not in str(error.value)


def test_a_file_that_changed_makes_another_cell(store, tmp_path):
    path = tmp_path / "a.pyth"
    path.write_bytes(b"one")
    one = only(plan(table(str(path)), store)).key
    path.write_bytes(b"two")
    assert only(plan(table(str(path)), store)).key != one
