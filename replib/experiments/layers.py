"""Scores of the layers of trained cells: a measurement that names the evidence it belongs to.

As those of replib.experiments.measurements, which says where the files are; this one has a list
of scores for all cells, and a notebook of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from replib import machine
from replib.analysis import layer_scores
from replib.experiments.cells import Cell, Plan, columns, dataset, split_of, trained_model
from replib.experiments.measurements import cells_of, path_of, weighed, write
from replib.experiments.store import Store, home
from replib.foreign import json_of
from replib.training import loader
from replib.training.evaluation import Normalise

IMAGES = 2000  # of a cell's own training images, at most
SETTINGS = {
    "version": layer_scores.VERSION,
    "images": IMAGES,
    "of": "the cell's own training images, not augmented, in full batches of its size",
    "weights": "those that the protocol selected",
    "loss": "cross-entropy, batch statistics",
}


def measure(plan: Plan, rows: list[str], store: Store, device: str = "cpu") -> dict:
    """{"context", "settings", "cells", "scores"}: plain data, of every cell whose weights are here.

    scores: a list per column: row, seed, and those of a record of `layer_scores`.
    """
    cells = weighed(plan, rows, store)
    scores = []
    for measured in cells:
        planned = plan.cells[measured["key"]]
        found = layer_scores.layer_scores(
            trained_model(planned, store).to(device), batches(planned.cell, device), F.cross_entropy
        )
        for record in found:
            record |= {name: float(f"{record[name]:.6g}") for name in layer_scores.SCORES}
            scores.append({"row": measured["row"], "seed": measured["seed"]} | record)
    where = machine.context(device, home())
    return {"context": where, "settings": SETTINGS, "cells": cells, "scores": columns(scores)}


def batches(cell: Cell, device: str) -> Iterator[tuple[Tensor, Tensor]]:
    """(images, labels) of a cell, see `SETTINGS`."""
    data = dataset(cell)
    chunks = split_of(cell).train[:IMAGES].split(cell.batch_size)
    if len(chunks) > 1 and len(chunks[-1]) < cell.batch_size:
        chunks = chunks[:-1]  # its statistics would be those of few images
    normalise = Normalise(data, device)
    images = loader.batches(data.train_images, list(chunks), device)
    for x, chunk in zip(images, chunks, strict=True):
        yield normalise(x), data.train_labels[chunk].to(device)


def own(table: str, profile: str, plan: Plan, rows: list[str], store: Store) -> dict | None:
    """The measurement of this machine's weights, made where it is missing or of other weights; it
    stays when they go. None where there is nothing to measure."""
    path = path_of(store, table, profile)
    cells, there, known = weighed(plan, rows, store), cells_of(plan, rows, store), read(path)
    if known is not None and known["settings"] == SETTINGS:
        before = known["cells"]
        if all(cell in there for cell in before) and all(cell in before for cell in cells):
            return known
    if not cells:
        return None
    write(path, measure(plan, rows, store))
    return read(path)


def published(table: str, profile: str, plan: Plan, rows: list[str], store: Store) -> dict | None:
    """The published measurement, where it is of the cells whose evidence is published."""
    known = read(path_of(store, table, profile, published=True))
    if known is None or known["settings"]["version"] != layer_scores.VERSION:
        return None
    there = cells_of(plan, rows, store, published=True)
    return known if all(cell in there for cell in known["cells"]) else None


def read(path: Path) -> dict | None:
    """What was written there; None for no file, or any other one."""
    try:
        measurement = json_of(path)
        right = measurement["cells"] and {"row", "seed", "block"} <= measurement["scores"].keys()
        return measurement if right and "version" in measurement["settings"] else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
