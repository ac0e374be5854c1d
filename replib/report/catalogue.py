"""The catalogue: every table and figure of the papers, and what reproduces it here.

    catalogue/PAPER.yaml    the paper, its items, and the numbers that it prints

A row of params/ names cells of these tables as `paper: PAPER/ITEM/ROW/COLUMN`; their numbers are
looked up here and typed nowhere else. Only a number that was read in its source is ever given out.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from replib.errors import UserError
from replib.experiments.params import QUANTITIES, Network, Paper, Strict, parse_yaml, short
from replib.experiments.store import home

# What an item is whose command trains nothing for it, or nothing that a verdict could be about.
KINDS = ("counted", "drawn", "measured", "proved", "stated", "example")
CONFIDENCE = Literal["read", "recalled", "unknown"]
# What is counted of a network: the first two in millions, operations in billions of multiply-adds.
COUNTS = ("training_parameters", "parameters", "flops", "multiplications")


class Item(Strict):
    """A table or figure of a paper, in our own words.

    Exactly one of `here`, `cannot_run` and `not_implemented` is stated.
    """

    where: str | None  # "Table 4"; None: its number in the paper is not known to us
    shows: Annotated[str, Field(min_length=1)]
    here: list[str] = Field(
        default_factory=list
    )  # folders of params/ and notebooks that reproduce it
    kind: Literal[KINDS] | None = None  # None: it is trained, and verdicts say how it went
    cannot_run: str | None = None  # why not here
    not_implemented: str | None = None  # what is not here
    note: str | None = None
    source: str | None = None  # where its numbers were seen
    confidence: CONFIDENCE = "unknown"  # of the numbers, where a row does not say otherwise
    columns: list[str] = Field(default_factory=list)
    rows: dict[str, dict[str, Any]] = Field(
        default_factory=dict
    )  # values by column; `_confidence`: by column, `_note`
    networks: dict[str, Network] = Field(
        default_factory=dict
    )  # row -> the network that it is here, which is built and counted
    counts: dict[Literal[COUNTS], str] = Field(default_factory=dict)  # -> the column that has it

    @model_validator(mode="after")
    def consistent(self):
        """It has one way to be here or not to be, and its rows have its columns."""
        ways = ("here", "cannot_run", "not_implemented")
        stated = [name for name in ways if getattr(self, name)]
        if len(stated) != 1:
            raise ValueError(f"one of {', '.join(ways)} must be stated, not {len(stated)}")
        if self.kind is not None and not self.here:
            raise ValueError(f"kind (={self.kind!r}) needs here: what shows it")
        for name, row in self.rows.items():
            own = row.get("_confidence", {})
            for column in [*(key for key in row if key not in ("_confidence", "_note")), *own]:
                if column not in self.columns:
                    raise ValueError(
                        f"rows.{name}: no column {column!r}; there are {', '.join(self.columns)}"
                    )
        for name in self.networks:
            if name not in self.rows:
                raise ValueError(
                    f"networks.{name}: no row {name!r}; there are {', '.join(self.rows)}"
                )
        for name, column in self.counts.items():
            if column not in self.columns:
                have = ", ".join(self.columns)
                raise ValueError(f"counts.{name}: no column {column!r}; there are {have}")
        return self

    @property
    def commands(self) -> list[str]:
        """What reproduces it."""
        parts = (entry.split("/") for entry in self.here)
        return [
            f"make reproduce-{name}" + "".join(f" PROFILE={one}" for one in profile)
            for name, *profile in parts
        ]

    @property
    def title(self) -> str:
        """Where it is in the paper, and what it shows."""
        return f"{self.where}: {self.shows}" if self.where else self.shows

    def confidence_of(self, row: str, column: str) -> str:
        """How sure we are of a cell."""
        return self.rows[row].get("_confidence", {}).get(column, self.confidence)


class Work(Strict):
    """A paper, or a repository that has none of its own, with its items."""

    name: str  # as it is called: "RepVGG"
    title: str
    year: int | None  # None: nobody's paper, what is ours
    venue: str | None = None
    links: list[str] = Field(default_factory=list)  # the paper, its code
    items: Annotated[dict[str, Item], Field(min_length=1)]


def catalogue() -> dict[str, Work]:
    """All papers by the names of their files, the oldest first, what is ours last."""
    found = {path.stem: work(path.stem) for path in sorted(folder().glob("*.yaml"))}
    return dict(sorted(found.items(), key=lambda pair: (pair[1].year or 9999, pair[0])))


def folder() -> Path:
    """Where its files are."""
    return home() / "catalogue"


def work(name: str) -> Work:
    """One paper. Raises: UserError in one line."""
    path = folder() / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(one.stem for one in folder().glob("*.yaml")))
        raise UserError(f"no paper {name!r} in the catalogue; there are {known or 'none'}.")
    return read(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=64)
def read(path: Path, _changed: int) -> Work:
    """A file of the catalogue. Raises: UserError in one line."""
    try:
        return Work.model_validate(parse_yaml(path.read_text(encoding="utf-8"), str(path)))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        value = first.get("input")
        shown = "" if isinstance(value, dict) else f" (={short(value)})"
        said = first["msg"].removeprefix("Value error, ")
        raise UserError(f"{path}: {key}{shown}: {said}.") from None


def uncatalogued(names: Iterable[str]) -> list[str]:
    """Of these tables and notebooks, those that no item names."""
    items = (item for one in catalogue().values() for item in one.items.values())
    named = {entry.split("/")[0] for item in items for entry in item.here}
    return [name for name in names if name not in named]


def item_of(reference: str) -> str:
    """PAPER/ITEM of PAPER/ITEM/ROW."""
    return reference.rpartition("/")[0]


def number(reference: str, column: str) -> float:
    """The number in a column of PAPER/ITEM/ROW, if it was read in its source.

    Raises: UserError in one line.
    """
    said = f"paper (={'/'.join(filter(None, (reference, column)))})"
    parts = reference.split("/")
    if len(parts) != 3:
        raise UserError(f"{said}: expected PAPER/ITEM/ROW/COLUMN, names of the catalogue.")
    paper, item, row = parts
    try:
        items = work(paper).items
    except UserError as error:
        raise UserError(f"{said}: {error}") from None
    where = f"catalogue/{paper}.yaml"
    if item not in items:
        raise UserError(f"{said}: no item {item!r} in {where}; there are {', '.join(items)}.")
    found = items[item]
    if row not in found.rows:
        raise UserError(
            f"{said}: no row {row!r} in {item} of {where}; there are {', '.join(found.rows)}."
        )
    if column not in found.columns:
        raise UserError(
            f"{said}: no column {column!r} in {item} of {where}; there are "
            f"{', '.join(found.columns)}."
        )
    value, confidence = found.rows[row].get(column), found.confidence_of(row, column)
    if confidence != "read" or type(value) not in (int, float):
        raise UserError(
            f"{said}: {short(value)} with confidence {confidence} is not to be shown: only a "
            "number that was read in its source is."
        )
    return value


def numbers(paper: Paper | None) -> dict[str, float]:
    """quantity or view -> what the paper has for it. Raises: UserError in one line."""
    if paper is None:
        return {}
    columns = {name: getattr(paper, name) for name in QUANTITIES} | paper.views
    return {name: number(paper.row, column) for name, column in columns.items() if column}
