"""Pruning in cells: what a cell deploys, what it says of it, and what it refuses."""

import pytest
from torch import nn

from replib.errors import UserError
from replib.experiments import cells
from replib.experiments.params import Cell
from replib.experiments.store import Store


def cell(**changes):
    values = dict(
        data="digits", train_images=80, held_out=20, seed=0, body="digits", block="convbn",
        epochs=6, batch_size=20, learning_rate=0.1, momentum=0.9, weight_decay=1e-3,
    )  # fmt: skip
    return Cell.model_validate(values | changes)


PRUNED = {"target": 0.5, "warmup": 1, "interval": 1, "rows": 8, "drop": "target", "measure": 2}


def test_a_cell_deploys_what_is_left(tmp_path, one_thread):
    store = Store(tmp_path)
    planned = cells.Planned("0" * 64, cell(resrep=PRUNED))
    cells.run_cell(planned, {}, store, say=lambda text: None)
    result = store.read("0" * 64)["result"]
    pruning, history = result["pruning"], result["history"]
    assert result["final"]["selected_epoch"] == 5 and result["final"]["selected_by"] == "last"
    assert pruning["flops_after"] == result["deployed"]["flops"] <= 0.5 * pruning["flops_before"]
    assert pruning["accuracy_before"] == history["test_accuracy"][-1]
    assert pruning["accuracy_after"] == result["deployed"]["test_accuracy"]
    assert history["pruned_accuracy"][0] is None
    assert history["pruned_accuracy"][-1] == pruning["accuracy_after"]
    assert history["unmasked_flops"][0] == 1 > history["unmasked_flops"][-1]
    assert result["versions"]["resrep"] == 1
    model = cells.trained_model(planned, store)
    assert sum(p.numel() for p in model.parameters()) == result["deployed"]["parameters"]
    widths = {name: after for name, (_, after) in pruning["widths"].items()}
    assert model.get_submodule("stages.1.0.block").out_channels == widths["stages.1.0.block"]
    assert history["training_parameters"][0] > result["deployed"]["parameters"]


def test_cells_that_begin_narrower(tmp_path, one_thread):
    store = Store(tmp_path)
    base = cells.Planned("1" * 64, cell(epochs=2))
    cells.run_cell(base, {}, store, say=lambda text: None)
    narrow = {"target": 0.5, "rule": "magnitude"}
    planned = cells.Planned("2" * 64, cell(epochs=2, narrow=narrow, start="1" * 64))
    cells.run_cell(planned, {"1" * 64: base}, store, say=lambda text: None)
    whole, small = (store.read(key * 64)["result"] for key in "12")
    assert small["deployed"]["flops"] <= 0.5 * whole["deployed"]["flops"]
    model = cells.trained_model(planned, store)
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert (
        small["history"]["training_parameters"] == [sum(p.numel() for p in model.parameters())] * 2
    )


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"resrep": PRUNED, "phases": 2}, ["phases (=2)", "resrep"]),
        ({"resrep": PRUNED, "ema": 0.9}, ["ema (=0.9)", "resrep"]),
        ({"resrep": PRUNED, "optimizer": "adamw", "momentum": 0.0}, ["optimizer (=adamw)"]),
        ({"resrep": PRUNED | {"warmup": 6}}, ["resrep.warmup (=6)", "epochs (=6)"]),
        ({"resrep": PRUNED, "cycle": {"warmup": 2}}, ["cycle and resrep exclude"]),
        ({"resrep": PRUNED, "narrow": {"target": 0.5, "rule": "uniform"}}, ["narrow and resrep"]),
    ],
)
def test_cells_that_make_no_sense_are_refused(changes, named):
    with pytest.raises(ValueError) as caught:
        cell(**changes)
    assert all(text in str(caught.value) for text in named), caught.value


@pytest.mark.parametrize("params", [{"resrep": PRUNED}, {"narrow": {"rule": "uniform"}}])
def test_a_target_out_of_reach_is_told_in_one_line(tmp_path, params):
    ((name, values),) = params.items()
    planned = cells.Planned("0" * 64, cell(**{name: values | {"target": 1e-3}}))
    with pytest.raises(UserError, match=rf"{name}: target \(=0.001\)"):
        cells.run_cell(planned, {}, Store(tmp_path), say=lambda text: None)
