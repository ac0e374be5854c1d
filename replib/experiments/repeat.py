"""The same cells, trained a second time: what `replib repeat` trains, compares and writes.

    reports/runs/repeated-DEVICE/KEY                           the second time
    reports/measurements/repeated-TABLE-PROFILE-DEVICE.json    how it compares, for the table's page

On the processor on which evidence was made, with its libraries, a result is the same to the bit.
Elsewhere, and on a GPU, it is another draw of rounding: then what counts is whether the accuracies
of a row differ by more than nothing, seed by seed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from replib import machine
from replib.analysis.statistics import Estimate, estimate
from replib.errors import UserError
from replib.experiments.cells import LIBRARIES, Plan
from replib.experiments.evidence import problem
from replib.experiments.store import Store, home
from replib.foreign import json_of
from replib.training.checkpoint import write_bytes

# What bits depend on, beside the code and the cell.
MACHINE = ("processor", "device", "python", "libraries", "system", "compile", "processes")
MADE_BY = ("commit", "processor", "python", "libraries", "system")  # of a second store, as a whole


def second_store(device: str) -> Store:
    """A store that has nothing of the first time in it."""
    store = Store()
    store.runs = store.runs / f"repeated-{device}"
    return store


def begun(again: Store, device: str, fresh: bool = False) -> str | None:
    """Keep in a second store only what this code has trained on this machine: nothing else says
    that it does the same today. Returns why it was emptied, or None.
    """
    now = context_here(device)
    now, path = {name: now[name] for name in MADE_BY}, again.runs / "made-by.json"
    before = json_of(path) if path.is_file() else None
    if not fresh and before == now:
        return None
    there = again.runs.is_dir()
    again.clean()
    write_bytes(path, (json.dumps(now, indent=1) + "\n").encode())
    if not there:
        return None
    changed = [name for name in MADE_BY if before and before.get(name) != now[name]]
    return "it was asked for" if fresh else f"changed since: {', '.join(changed) or 'all'}"


def context_here(device: str) -> dict:
    """Where something is trained now."""
    return machine.context(device, home(), LIBRARIES)


def first_time(key: str, store: Store) -> dict | None:
    """The published evidence of a cell, else this machine's; None where there is none to show."""
    for published in (True, False):
        evidence = store.read(key, published)
        if evidence is not None and problem(evidence) is None:
            return evidence
    return None


def chosen(plan: Plan, rows: Sequence[str], seeds: Sequence[int], store: Store) -> list[str]:
    """The keys to train again: of these rows and seeds (of none: all) that have evidence.

    Raises: UserError for a row or seed of no cell, and where none has evidence.
    """
    for name, wanted, known in (
        ("rows", rows, [row for row, _ in plan.by_row]),
        ("seeds", seeds, [seed for _, seed in plan.by_row]),
    ):
        if unknown := [one for one in wanted if one not in known]:
            there = ", ".join(map(str, dict.fromkeys(known)))
            raise UserError(f"{name} (={unknown[0]}): this table has none such; it has {there}.")
    keys = [
        key
        for (row, seed), key in plan.by_row.items()
        if (not rows or row in rows) and (not seeds or seed in seeds)
        if first_time(key, store) is not None
    ]
    if not keys:
        raise UserError("nothing was trained a first time: no evidence of these cells is here.")
    return list(dict.fromkeys(keys))


def compared(first: dict, second: dict) -> dict:
    """How two pieces of evidence of one cell differ, as plain data.

    equal: the results, to the bit. weights: the hashes of the weights, None where one has none.
    epoch: the first one (from 1) whose training loss or scores differ. machine: what differs in
    where they were made, {name: [first, second]}.
    """
    histories = [evidence["result"]["history"] for evidence in (first, second)]
    names = sorted(histories[0].keys() & histories[1].keys())
    rows = [list(zip(*(history[name] for name in names), strict=True)) for history in histories]
    differing = [i for i, (a, b) in enumerate(zip(*rows, strict=False), 1) if a != b]
    hashes = [evidence["context"].get("weights_sha256") for evidence in (first, second)]
    contexts = [evidence["context"] for evidence in (first, second)]
    return {
        "equal": first["result_sha256"] == second["result_sha256"],
        "weights": None if None in hashes else hashes[0] == hashes[1],
        "epoch": differing[0] if differing else None,
        "device": contexts[1]["device"],
        "selected": [evidence["result"]["final"]["selected"] for evidence in (first, second)],
        "machine": {
            name: [context.get(name) for context in contexts]
            for name in MACHINE
            if contexts[0].get(name) != contexts[1].get(name)
        },
    }


def comparison(plan: Plan, keys: list[str], store: Store, again: Store) -> list[dict]:
    """Of every cell that has been trained again, with its rows and seed."""
    out = []
    for key in keys:
        first, second = first_time(key, store), again.read(key)
        if first is None or second is None:
            continue
        names = [row for (row, _), other in plan.by_row.items() if other == key]
        named = {"key": key, "rows": names, "seed": plan.cells[key].cell.seed}
        named["result_sha256"] = first["result_sha256"]
        out.append(named | compared(first, second))
    return out


def broken(cells: list[dict]) -> list[dict]:
    """Those that should be equal to the bit and are not: on a processor, nothing else differs."""
    return [
        cell
        for cell in cells
        if not cell["machine"] and cell["device"] == "cpu"
        if not cell["equal"] or cell["weights"] is False
    ]


def complaint(cell: dict) -> str:
    """What is said of one of these."""
    what = f"from epoch {cell['epoch']} on" if cell["epoch"] else "in what is behind its history"
    return (
        f"cell {cell['key'][:16]} ({', '.join(cell['rows'])}, seed {cell['seed']}) is not what it "
        f"was, {what}, though processor and libraries are said to be the same."
    )


def shifts(cells: list[dict]) -> dict[str, Estimate]:
    """row -> by how many points accuracy is higher the second time, over seeds."""
    rows = dict.fromkeys(row for cell in cells for row in cell["rows"])
    moved = {
        row: [100 * (c["selected"][1] - c["selected"][0]) for c in cells if row in c["rows"]]
        for row in rows
    }
    return {row: estimate(points) for row, points in moved.items()}


def sentences(cells: list[dict]) -> Iterator[str]:
    """What is said of a comparison, in words."""
    equal = [cell for cell in cells if cell["equal"]]
    yield f"{len(equal)} of {len(cells)} results are equal to the bit."
    if not any(cell["machine"] for cell in cells):
        yield "Processor, device and libraries were the same both times."
    if known := [cell for cell in cells if cell["weights"] is not None]:
        yield f"{sum(c['weights'] for c in known)} of {len(known)} weights are equal to the bit."
    machines = {json.dumps(cell["machine"], sort_keys=True): cell["machine"] for cell in cells}
    for found in machines.values():
        for name, (was, is_now) in found.items():
            yield f"{name}: {words(was)} the first time, {words(is_now)} the second."
    if len(equal) == len(cells):
        return
    for row, moved in shifts([cell for cell in cells if not cell["equal"]]).items():
        largest = max(map(abs, moved.points))
        text = f"{row}: {moved.mean:+.2f} points the second time, at most {largest:.2f} in a seed"
        if moved.n > 1:
            inside = "holds" if moved.low <= 0 <= moved.high else "does NOT hold"
            text += f"; the interval {moved.low:+.2f} to {moved.high:+.2f} {inside} 0"
        yield f"{text}; seeds: {moved.n}."


def words(value: object) -> str:
    """A value of a context, for reading."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {inner}" for name, inner in value.items())
    return str(value)


# -- files -----------------------------------------------------------------------------------------
def path_of(store: Store, table: str, profile: str, device: str) -> Path:
    """The file of a comparison."""
    folder = store.published.parent / "measurements"
    return folder / f"repeated-{table}-{profile}-{device}.json"


def standing(store: Store, table: str, profile: str, evidence: dict[str, dict]) -> dict[str, list]:
    """device -> cells of a profile that were trained again on it, of evidence that still stands."""
    out = {}
    for device in ("cpu", "cuda"):
        found = read(path_of(store, table, profile, device)) or {"cells": []}
        out[device] = [
            cell
            for cell in found["cells"]
            if cell["key"] in evidence
            if evidence[cell["key"]]["result_sha256"] == cell["result_sha256"]
        ]
    return {device: cells for device, cells in out.items() if cells}


def write(path: Path, device: str, cells: list[dict]) -> None:
    """Keep a comparison, with those of other cells that the file has."""
    before = (read(path) or {"cells": []})["cells"]
    keys = {cell["key"] for cell in cells}
    cells = [cell for cell in before if cell["key"] not in keys] + cells
    whole = {"device": device, "context": context_here(device), "cells": cells}
    write_bytes(path, (json.dumps(whole, indent=1) + "\n").encode())


def read(path: Path) -> dict | None:
    """What was written; None for no file, or any other one."""
    try:
        found = json_of(path)
        needed = {"key", "result_sha256", "rows", "seed", "equal", "weights", "selected", "machine"}
        right = all(needed <= cell.keys() for cell in found["cells"]) and "device" in found
        return found if right else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
