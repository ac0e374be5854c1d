"""What a rented machine trains next: cells of several tables, those that teach most first.

    params/gpu-queue.yaml    entries: [{table, profile, rows, seeds, set, minutes, why}, ...]

An entry's cells are trained before those of the next; within it the usual rule holds, parents
first and long ones early. Published evidence counts as trained.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from replib.errors import UserError
from replib.experiments.cells import Plan, plan
from replib.experiments.claims import Claims
from replib.experiments.params import Strict, in_one_line, load_table, parse_yaml
from replib.experiments.store import KEY_LENGTH, Store, compact, home
from replib.foreign import text_of
from replib.training import checkpoint
from replib.training.checkpoint import BadCheckpoint, write_bytes

STATE = re.compile(r"([0-9a-f]{16})-(checkpoint|weights)\.ckpt")


class Entry(Strict):
    """Some cells of a table."""

    table: Annotated[str, Field(pattern=r"^[\w-]+$")]
    profile: Annotated[str, Field(pattern=r"^[\w-]+$")]
    rows: list[str] = Field(
        default_factory=list
    )  # with all that they start from or learn from; none: all of them
    seeds: Annotated[list[int], Field(min_length=1)]
    set: list[str] = Field(default_factory=list)  # key=value, as on the command line
    minutes: Annotated[float, Field(gt=0)]  # of one GPU, for all its cells
    measured: str | None = None  # where `minutes` was measured; None: it is an estimate
    why: Annotated[str, Field(min_length=1)]  # what it teaches

    @property
    def name(self) -> str:
        """As it is told to the user."""
        rows = f" {', '.join(self.rows)}" if self.rows else ""
        return f"{self.table} {self.profile}{rows}, seeds {', '.join(map(str, self.seeds))}"


class Queue(Strict):
    """A file of entries."""

    entries: Annotated[list[Entry], Field(min_length=1)]


def read(path: Path) -> Queue:
    """A queue. Raises: UserError in one line."""
    try:
        text = text_of(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--queue (={path}) cannot be read: {error}.") from None
    try:
        return Queue.model_validate(parse_yaml(text, str(path)))
    except ValidationError as error:
        raise in_one_line(error, str(path)) from None


def planned(entry: Entry, store: Store) -> Plan:
    """The cells of an entry. Raises: UserError for a table, row or data that are not here."""
    path = home() / "params" / entry.table / f"{entry.profile}.yaml"
    if not path.is_file():
        raise UserError(f"no profile {entry.profile!r} of {entry.table!r}; make list has them.")
    table = load_table(path, [f"seeds={entry.seeds}", *entry.set])
    if unknown := [row for row in entry.rows if row not in table.rows]:
        raise UserError(f"rows (={unknown[0]}): no such row; there are {', '.join(table.rows)}.")
    whole = plan(table, store)
    rows = entry.rows or list(table.rows)
    return whole.of([key for (row, _), key in whole.by_row.items() if row in rows])


class Planning:
    """The entries of a queue that can be trained here as one plan, in their order."""

    def __init__(self, queue: Queue, store: Store):
        self.store, self.plan = store, Plan(published=True)
        self.entries: list[tuple[Entry, Plan | str]] = []  # its cells, or why it has none here
        for entry in queue.entries:
            try:
                one = planned(entry, store)
                self.plan.take(one)
            except UserError as error:  # must not keep the others from being trained
                one = str(error)
            self.entries.append((entry, one))

    def state(self) -> list[str]:
        """How far every entry is, each in a line."""
        return [f"{entry.name}: {self.said(entry, one)}" for entry, one in self.entries]

    def said(self, entry: Entry, one: Plan | str) -> str:
        """How far an entry is, by its share of cells with evidence, here or published."""
        if isinstance(one, str):
            return f"not here: {one}"
        done = sum(self.plan.finished(key, self.store) for key in one.cells)
        took = f"measured on {entry.measured}" if entry.measured else "an estimate"
        left = entry.minutes * (1 - done / len(one.cells))
        ahead = f", {left:.3g} GPU minutes left ({took})" if left else ""
        return f"{done} of {len(one.cells)} cells{ahead}"


# -- from one machine to the next ------------------------------------------------------------------
def states_folder(bundle: Path) -> Path:
    """Where checkpoints lie beside a bundle of evidence."""
    return bundle.with_name(f"{bundle.stem}-states")


def save_states(plan: Plan, store: Store, bundle: Path) -> list[Path]:
    """Copy what the next machine needs to go on: checkpoints of cells that are not finished, and
    weights of finished ones that these start from."""
    missing = {planned.key for planned in plan.missing(store)}
    waited_for = {key for one in missing for key in plan.cells[one].parents.values()}
    out = []
    for key, name in [(k, "checkpoint") for k in missing] + [(k, "weights") for k in waited_for]:
        source = store.folder(key) / f"{name}.ckpt"
        if source.is_file():
            target = states_folder(bundle) / f"{source.parent.name}-{name}.ckpt"
            write_bytes(target, source.read_bytes())
            out.append(target)
    for path in states_folder(bundle).glob("*.ckpt"):
        if path not in out:  # of a cell that has been finished since
            path.unlink()
    return sorted(out)


def take_evidence(found: list[dict], store: Store) -> None:
    """Put evidence to what is published. Where a cell's result is there already its file stays.

    Raises: UserError, and nothing is taken, where a cell would have two results.
    """
    new: dict[str, dict] = {}
    for one in found:
        key = one["result"]["key"]
        there = store.read(key, published=True)
        if (there or new.setdefault(key, one))["result_sha256"] != one["result_sha256"]:
            where = store.published_path(key) if there else "the same bundle"
            raise UserError(
                f"cell {key[:KEY_LENGTH]} has another result in {where}; nothing was taken: keep "
                "one of the two."
            )
    for key, one in new.items():
        write_bytes(store.published_path(key), compact(one))


def take_states(bundle: Path, store: Store) -> tuple[int, list[str]]:
    """Put what is to go on from where cells look for it; (how many files, why others were not
    taken)."""
    taken, left = 0, []
    for source in sorted(states_folder(bundle).glob("*.ckpt")):
        if match := STATE.fullmatch(source.name):
            if why := take_state(source, *match.groups(), store):
                left.append(f"{source} is not taken: {why}.")
            else:
                taken += 1
    return taken, left


def take_state(source: Path, short: str, name: str, store: Store) -> str | None:
    """Take one such file for the cell `short`, unless what is here is as good: then, why not."""
    try:
        owner, state = checkpoint.opened(source)
    except BadCheckpoint as error:
        return str(error)
    kind, _, key = owner.partition(" ")
    if (kind, key[:KEY_LENGTH]) != (name, short):
        return "it is of another cell"
    claim, finished = Claims().take(store.folder(key)), False
    if claim is None:
        return "a run trains this cell, add it when that has ended"
    try:
        if finished := store.read(key) is not None:
            return "this cell is finished here"
        own, _ = store.load(key, name)
        if own is not None and name == "weights":
            return "this cell has weights here"
        if name == "checkpoint" and how_far(own) >= how_far(state):
            return "this cell is as far here"
        write_bytes(store.folder(key) / f"{name}.ckpt", source.read_bytes())
    finally:
        claim.release(finished)
    return None


def how_far(state: dict | None) -> tuple[int, int]:
    """Epochs that a checkpoint has behind it, and steps of the next one; below 0 where it is
    none."""
    try:
        return len(state["progress"]["history"]), int(state["progress"]["batch"])
    except (KeyError, TypeError, ValueError):
        return -1, -1
