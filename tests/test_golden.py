"""Golden traces: the losses of 20 training steps for every block and method.

They fail when numbers move. If that is meant, raise the `version` of the block family, or the
`VERSION` of the method or of the engine, so that older evidence is shown as stale, and then write
the new traces with `REPLIB_WRITE_GOLDEN=1 python -m pytest tests/test_golden.py`.
They run in float64: small networks with norms are chaotic, and in float32 the rounding of another
processor grows to a percent within a few steps. The tolerance is far below any change of method.
"""

import json
import os
from pathlib import Path

import pytest
import torch

from replib.blocks import BLOCKS
from replib.experiments.cells import method_of, new_model, recipe_of, split_of, versions_of
from replib.experiments.params import Cell
from replib.methods.cycle import decay_groups
from replib.methods.distill import distillation_loss
from replib.training.data import load
from replib.training.loop import Task, fit

FILE = Path(__file__).with_name("golden_traces.json")
METHODS = {
    "plain": {},
    "control": {"cycle": {"warmup": 3, "freeze": "skip", "restructure": "none"}},
    "redraw": {"cycle": {"warmup": 3, "freeze": "zero", "restructure": "redraw"}},
    "official": {"cycle": {"warmup": 3, "freeze": "skip"}},
    "preserving": {"cycle": {"warmup": 3, "fidelity": "preserving"}},
    "distilled": {"distill": {"alpha": 0.9, "temperature": 10.0}, "teacher": "none"},
    "dyrep": {
        "phases": 1,
        "epochs": 10,
        "dyrep": {
            "interval": 2,
            "last_epoch": 8,
            "score": "snip",
            "calibration_batches": 2,
            "recalibration_batches": 1,
        },
    },
}
CASES = [
    (block, method)
    for block, family in BLOCKS.items()
    if family.default_kernel_size == 3
    for method in METHODS
    if block in ("repvgg", "convbn") or method == "official"
]


def trace(block: str, method: str) -> tuple[list[float], dict]:
    """Losses of 20 steps (ten epochs of two, in two phases or one) and the versions in force."""
    cell = Cell.model_validate(
        dict(data="digits", train_images=80, held_out=16, seed=0, body="digits", block=block,
             phases=2, epochs=5, batch_size=32, learning_rate=0.01, weight_decay=1e-3,
             decay="weights", clip_norm=10.0, clip="decayed", crop_padding=1)
        | METHODS[method]
    )  # fmt: skip
    data, splits, model = load("digits"), split_of(cell), new_model(cell).double()
    losses: list[float] = []

    def loss(logits, labels, inputs):
        if cell.distill is None:
            value = torch.nn.functional.cross_entropy(logits, labels)
        else:
            taught = inputs.flatten(1)[:, :10]  # any fixed function of the inputs
            value = distillation_loss(logits, taught, labels, **cell.distill.model_dump())
        losses.append(value.item())
        return value

    method = method_of(cell, model)
    groups = lambda: decay_groups(model, cell.weight_decay, cell.decay)  # noqa: E731
    fit(
        Task(model, data, splits.train, splits.validation, recipe_of(cell), groups, loss, 0, method)
    )
    return [float(f"{value:.6g}") for value in losses[:20]], versions_of(cell)


IN_THE_FAST_TIER = ("repvgg", "dbb", "orepa")
MARKED = [
    pytest.param(*case, marks=[] if case[0] in IN_THE_FAST_TIER else [pytest.mark.slow])
    for case in CASES
]


@pytest.mark.parametrize("block, method", MARKED, ids=lambda value: value)
def test_trace(block, method):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    losses, versions = trace(block, method)
    torch.set_num_threads(threads)
    stored = json.loads(FILE.read_text()) if FILE.exists() else {}
    if os.environ.get("REPLIB_WRITE_GOLDEN"):
        stored[f"{block} {method}"] = {"losses": losses, "versions": versions}
        FILE.write_text(json.dumps(stored, indent=0, sort_keys=True) + "\n")
    want = stored[f"{block} {method}"]
    assert versions == want["versions"], "a version was raised: write the new traces"
    assert len(losses) == 20
    assert losses == pytest.approx(want["losses"], rel=1e-5), (
        "numbers moved: raise a version (see the head of this file), or find out why"
    )
