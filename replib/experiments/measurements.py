"""What the weights of a table's trained cells say further: a file that names its evidence.

    reports/runs/measurements/ID-PROFILE.json   of this machine's weights
    reports/measurements/ID-PROFILE.json        published

A table asks for one by `measure:`. Cells, their keys and their evidence know nothing of it, so that
tables measure the very networks that other tables have trained; a measurement counts only beside
the evidence whose key and hash it carries. It is made once the weights are here, and shown
without them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from replib import machine, quantization
from replib.analysis import kernel_statistics, similarity
from replib.experiments.cells import Cell, Plan, calibration, dataset, trained_model
from replib.experiments.params import Table
from replib.experiments.store import Store, finite, home
from replib.foreign import json_of
from replib.fusing import deployed_copy, fuse
from replib.training import loader
from replib.training.checkpoint import write_bytes
from replib.training.data import derive
from replib.training.evaluation import Normalise, Split, accuracy

DIGITS = 6  # of a number in a file
SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.44)  # of weights set to zero; corners are 4 of 9
DRAWS = 5  # of these weights
BINS = 101
NAMES = ("row", "key", "result_sha256")  # of a measured cell, beside its seed
IMAGES, BATCH = 1024, 128
# How networks are quantized after training: what has one scale, how ranges of maps are found.
# Raise replib.quantization.VERSION when they change.
SCHEMES = {
    "tensor": ("tensor", "minmax"),
    "channel": ("channel", "minmax"),
    "histogram": ("tensor", "histogram"),
    "weights": ("tensor", None),
}
TRAINED = "trained"  # in their place, of a network that was trained for 8 bits


@dataclass(frozen=True)
class Kind:
    """How trained networks are measured. version: raise it when the numbers change."""

    measure: Callable[[nn.Module, Cell, str], dict]  # network in eval mode, cell, device
    version: int
    of: str  # in words, for the page
    settings: dict | None = None  # that the numbers depend on

    @property
    def stated(self) -> dict:
        """What a file says of how it was made."""
        return {"version": self.version, "of": self.of} | (self.settings or {})


def path_of(store: Store, table: str, profile: str, published: bool = False) -> Path:
    """The file of a profile's measurement."""
    folder = store.published.parent if published else store.runs
    return folder / "measurements" / f"{table}-{profile}.json"


def cells_of(plan: Plan, rows: list[str], store: Store, published: bool = False) -> list[dict]:
    """{row, seed, key, result_sha256} of the rows' cells that have evidence."""
    found = []
    for (row, seed), key in plan.by_row.items():
        evidence = store.read(key, published) if row in rows else None
        if evidence is not None:
            cell = {"row": row, "seed": seed, "key": key}
            found.append(cell | {"result_sha256": evidence["result_sha256"]})
    return found


def weighed(plan: Plan, rows: list[str], store: Store) -> list[dict]:
    """Those of them whose weights are on this machine."""
    return [c for c in cells_of(plan, rows, store) if store.has_weights(c["key"])]


def write(path: Path, measurement: dict) -> None:
    """Keep a measurement, in as few bytes; blocks and branches in their order."""
    text = json.dumps(measurement, separators=(",", ":"))
    write_bytes(path, text.encode() + b"\n")


def publish(store: Store, table: str, profile: str) -> Path | None:
    """Copy this machine's measurement, if there is one, to the published ones."""
    path = path_of(store, table, profile)
    if not path.is_file():
        return None
    out = path_of(store, table, profile, published=True)
    write_bytes(out, path.read_bytes())
    return out


def read(path: Path) -> dict | None:
    """What was written there; None for no file, or any other one."""
    try:
        measurement = json_of(path)
        cells, commit = measurement["cells"], measurement["context"]["commit"]
        right = cells and len(measurement["found"]) == len(cells) and isinstance(commit, str)
        right = right and all(isinstance(cell[name], str) for cell in cells for name in NAMES)
        return measurement if right and "version" in measurement["settings"] else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def own(
    name: str, profile: str, table: Table, plan: Plan, store: Store, device: str = "cpu"
) -> dict | None:
    """The measurement of this machine's cells, made where it is missing or of other weights; what
    another table has measured of the same weights is not measured again, and what was measured
    stays when its weights go.

    {"context", "settings", "cells", "found"}: found[i] is of cells[i]; context["commit"] names all
    at which they were measured. None for a table that asks for none, and where there is nothing to
    measure.
    """
    if not table.measure:
        return None
    kind, path = KINDS[table.measure], path_of(store, name, profile)
    before = measured_before(path.parent, kind.stated)
    trained = cells_of(plan, shown(table), store)
    cells = [c for c in trained if weights_of(c) in before or store.has_weights(c["key"])]
    if not cells:
        return None
    known = read(path)
    if known is not None and (known["cells"], known["settings"]) == (cells, kind.stated):
        return known
    made = {"context": machine.context(device, home()), "settings": kind.stated}
    made |= {"cells": [], "found": []}
    here, commits = made["context"]["commit"], set()
    missing = sum(weights_of(cell) not in before for cell in cells)
    look = {"desc": "measuring", "unit": "network", "file": sys.stdout, "ncols": 88}
    with tqdm(total=missing, disable=not missing, **look) as bar:
        for cell in cells:
            one, commit = before.get(weights_of(cell), (None, here))
            if one is None:
                planned = plan.cells[cell["key"]]
                model = trained_model(planned, store).to(device)
                one = rounded(kind.measure(model, planned.cell, device))
                bar.update()
            made["cells"].append(cell)
            made["found"].append(one)
            commits |= set(commit.split(", "))
            made["context"]["commit"] = ", ".join(sorted(commits))
            write(path, made)  # one that is stopped goes on from here
    return made


def weights_of(cell: dict) -> tuple[str, str]:
    """Which weights a measured cell is of, whatever its row is called."""
    return cell["key"], cell["result_sha256"]


def measured_before(folder: Path, settings: dict) -> dict[tuple[str, str], tuple[dict, str]]:
    """Weights -> (what was found, at which commits), of all files of this machine that were made in
    this way: tables share networks."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        known = read(path)
        if known is not None and known["settings"] == settings:
            pairs = zip(map(weights_of, known["cells"]), known["found"], strict=True)
            found |= {weights: (one, known["context"]["commit"]) for weights, one in pairs}
    return found


def published(name: str, profile: str, table: Table, plan: Plan, store: Store) -> dict | None:
    """The published measurement, where it is of the cells whose evidence is published."""
    known = read(path_of(store, name, profile, published=True))
    if known is None or not table.measure or known["settings"] != KINDS[table.measure].stated:
        return None
    there = cells_of(plan, shown(table), store, published=True)
    return known if all(cell in there for cell in known["cells"]) else None


def shown(table: Table) -> list[str]:
    """The rows on the page."""
    return [name for name, row in table.rows.items() if not row.hidden]


def rounded(value: object) -> object:
    """Tensors as lists, numbers to `DIGITS` digits, null for what is no number."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): rounded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(inner) for inner in value]
    return finite(float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value)


# -- kinds -----------------------------------------------------------------------------------------
def test_images(cell: Cell, device: str) -> Iterator[Tensor]:
    """`IMAGES` test images of all classes, mixed, normalised, in full batches of `BATCH`."""
    data = dataset(cell)
    drawn = torch.randperm(len(data.test_labels), generator=torch.Generator().manual_seed(0))
    chunks = [c for c in drawn[:IMAGES].split(BATCH) if len(c) == BATCH or len(drawn) < BATCH]
    normalise = Normalise(data, device)
    for images in loader.batches(data.test_images, chunks, device):
        yield normalise(images)


def similarities(model: nn.Module, cell: Cell, device: str) -> dict:
    """block -> branches, and their similarities."""
    return similarity.branch_similarity(model, test_images(cell, device))


def slopes(model: nn.Module, cell: Cell, device: str) -> dict:
    """block -> {"stride", "slopes": branch -> |slope| of its last norm, in descending order}; of
    blocks that have two branches or more."""
    found = {}
    for name, branches in kernel_statistics.norm_slopes(model).items():
        if len(branches) < 2:
            continue
        stride = max(model.get_submodule(name).geometry.stride)
        ordered = {b: values.sort(descending=True).values for b, values in branches.items()}
        found[name] = {"stride": stride, "slopes": ordered}
    return found


def magnitudes(model: nn.Module, cell: Cell, device: str) -> dict:
    """{"magnitudes"}: of 3 x 3 kernels, by position."""
    return {"magnitudes": kernel_statistics.position_magnitudes(deployed_copy(model))}


def sparsities(model: nn.Module, cell: Cell, device: str) -> dict:
    """place -> share of weights set to zero -> accuracies, one for each draw."""
    network, test = deployed_copy(model), Split.test(dataset(cell), device)
    drawn = torch.Generator().manual_seed(derive(cell.seed, "zeroed"))
    whole = accuracy(network, test)

    def tried(place: str, share: float) -> float:
        return accuracy(kernel_statistics.zeroed(network, place, share, drawn), test)

    return {
        place: {
            f"{share:g}": [tried(place, share) if share else whole for _ in range(DRAWS)]
            for share in SHARES
        }
        for place in kernel_statistics.PLACES
    }


def conversions(model: nn.Module, cell: Cell, device: str) -> dict:
    """{"blocks": block -> step -> deviations by part, "example": histograms of one block}.

    The example is the block in the middle of those that keep their channels and their map, as the
    paper takes the 8th layer of 16; its bins are equal and reach to the largest |weight| of a step.
    """
    blocks = kernel_statistics.outermost_blocks(model)
    blocks = {n: b for n, b in blocks.items() if min(b.geometry.kernel_size) > 1}
    steps = {name: kernel_statistics.conversion(block) for name, block in blocks.items()}
    square = [name for name, block in blocks.items() if block.geometry.keeps_shape] or [*blocks]
    example = square[len(square) // 2]

    def histogram(values: Tensor, limit: float) -> Tensor:
        return torch.histc(values.float(), BINS, -limit, limit).int()

    drawn = {}
    for step, weight in steps[example].items():
        limit = weight.abs().max().item()
        counts = {p: histogram(v, limit) for p, v in kernel_statistics.parts(weight).items()}
        drawn[step] = {"limit": limit, "counts": counts}
    deviations = {
        name: {step: kernel_statistics.spread(weight) for step, weight in found.items()}
        for name, found in steps.items()
    }
    return {"blocks": deviations, "example": {"block": example, "histograms": drawn}}


def in_eight_bits(model: nn.Module, cell: Cell, device: str) -> dict:
    """{"float": test accuracy of the deployed network, "eight_bits": scheme -> of the network in 8
    bits, "same_class": scheme -> share of images that get the class they had, "before" and
    "after": `layer_ranges` of blocks and of what they are deployed as, "conversion"}.

    Of a network that was trained for 8 bits {"eight_bits": {"trained": accuracy}} alone.
    """
    test = Split.test(dataset(cell), device)
    if isinstance(model, quantization.Trainable):
        eight_bits = model if model.diverged else quantization.converted(model)
        return {"eight_bits": {TRAINED: accuracy(eight_bits, test)}}
    fused, images = fuse(model), list(calibration(cell, device, IMAGES))
    whole = classes(fused, test)
    found = {
        "float": right(whole, test),
        "eight_bits": {},
        "same_class": {},
        "before": quantization.layer_ranges(model, images),
        "after": quantization.layer_ranges(fused, images),
        "conversion": conversions(model, cell, device),
    }
    for name, (weights, activations) in SCHEMES.items():
        given = classes(quantization.quantize(fused, images, weights, activations), test)
        found["eight_bits"][name] = right(given, test)
        found["same_class"][name] = (given == whole).double().mean().item()
    return found


@torch.no_grad()
def classes(model: nn.Module, split: Split) -> Tensor:
    """The class that every image is given, (N,)."""
    return torch.cat([model(x).argmax(1) for x in split.inputs()])


def right(given: Tensor, split: Split) -> float:
    """The fraction of images whose class is their label."""
    return (given == torch.cat(list(split.labels))).double().mean().item()


KINDS = {
    "similarity": Kind(
        similarities, 1, "test images of all classes", {"images": IMAGES, "batch": BATCH}
    ),
    "norm_slopes": Kind(slopes, 1, "norms at the end of branches"),
    "magnitudes": Kind(magnitudes, 1, "3 × 3 kernels, deployed"),
    "sparsity": Kind(
        sparsities, 1, "all test images", {"shares": list(SHARES), "draws": DRAWS}
    ),
    "conversion": Kind(conversions, 1, "kernels larger than 1 × 1", {"bins": BINS}),
    "quantization": Kind(
        in_eight_bits,
        quantization.VERSION,
        "all test images, ranges from training images",
        {"images": IMAGES},
    ),
}  # fmt: skip
