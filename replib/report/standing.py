"""How every item of the catalogue stands: computed from evidence, without opening any data.

counted, drawn, ...    its kind: the command shows it, no training run decides it
not reproduced         one of its verdicts is that
within noise           none is, and one is that
reproduced             all verdicts on the paper's gains are that
not comparable         it was run, but only where nothing can be said of the paper's numbers
not run                nothing of it has evidence here, own or published
cannot be run here, not implemented    as the catalogue states, with the reason
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from pydantic import ValidationError

from replib.errors import UserError
from replib.experiments.cells import Plan, Planned, key_of, versions_of
from replib.experiments.evidence import problem
from replib.experiments.params import Cell, Table, load_table
from replib.experiments.store import Store, home, read_evidence
from replib.report.catalogue import KINDS, Item, catalogue, item_of
from replib.report.results import Results, papers_numbers, profiles

COMPARED = ("not reproduced", "within noise", "reproduced")  # the first that there is counts
VERDICTS = (*COMPARED, "not comparable", "not run")
CANNOT, MISSING = "cannot be run here", "not implemented"
PARENTS = ("start", "teacher", "scales")
DATA = ("data", "image_size", "image_resize", "classes")  # what a cell opens, and how


@dataclass(frozen=True)
class Standing:
    """How an item stands."""

    status: str
    verdicts: dict[str, int] = field(default_factory=dict)  # verdict -> rows
    why: str = ""

    @property
    def said(self) -> str:
        """Status, with the count of rows or the reason."""
        counts = ", ".join(f"{count} {verdict}" for verdict, count in self.verdicts.items())
        if self.why or not counts:
            return f"{self.status}: {self.why}" if self.why else self.status
        return self.status if len(self.verdicts) == 1 else f"{self.status} ({counts})"


class Evidence:
    """All evidence that is here, read once."""

    def __init__(self, store: Store | None = None):
        self.store = store or Store()
        self.own = by_key(self.store.runs.glob("*/result.json"))
        self.published = by_key(self.store.published.glob("*.json"))
        self.all = self.published | self.own
        self.digests: dict[tuple, list[str]] = {}  # of data, as cells name them; our own first
        for evidence in (*self.own.values(), *self.published.values()):
            result = evidence["result"]
            known = self.digests.setdefault(data_of(result.get("parameters", {})), [])
            if (digest := result.get("data", {}).get("digest")) not in known:
                known.append(digest)

    def key(self, cell: Cell, chosen: dict[tuple, str], outside: bool) -> str | None:
        """The key of a cell that has evidence; or None.

        chosen: the digests of the data that cells of a table were found on: others are to be on
        the same ones, or gains would be over other images. outside: a parent is no row, so that
        what it is was only known once it was opened.
        """
        names = data_of(cell.in_key)
        digests = [chosen[names]] if names in chosen else self.digests.get(names, ())
        for digest in digests:
            if outside:
                key = next((k for k, e in self.all.items() if alike(e, cell, digest)), None)
            else:
                key = key_of(cell, digest)
            if key in self.all:
                chosen[names] = digest
                return key
        return None


def by_key(paths: Iterable[Path]) -> dict[str, dict]:
    """key -> evidence."""
    found = (read_evidence(path) for path in sorted(paths))
    return {e["result"]["key"]: e for e in found if e is not None and not problem(e)}


def data_of(values: dict) -> tuple:
    """What a cell of these parameters opens, and how."""
    return tuple(values.get(name) for name in DATA)


def parentless(cell: Cell) -> dict:
    """What a cell is, but for its parents and what depends on a teacher that was opened."""
    nothing = dict.fromkeys((*PARENTS, "teacher_mean", "teacher_deviation"))
    return {name: value for name, value in cell.in_key.items() if name not in nothing}


def alike(evidence: dict, cell: Cell, digest: str) -> bool:
    """Whether evidence is of a cell on these data, as far as that is known without its parents."""
    result = evidence["result"]
    found = result.get("parameters", {})
    if result.get("data", {}).get("digest") != digest or result.get("versions") != versions_of(
        cell
    ):
        return False
    if any(found.get(name) != getattr(cell, name) for name in ("seed", "body", "epochs")):
        return False  # surely another; it need not be read
    try:
        return parentless(Cell.model_validate(found)) == parentless(cell)
    except ValueError:  # parameters that there are no more
        return False


class Recorded(Results):
    """The results of a profile as far as there is evidence; nothing is opened for them.

    Its plan has the cells that have evidence, on whichever data of that name.
    """

    def __init__(self, table: str, profile: str, evidence: Evidence):
        self.id, self.profile, self.settings = table, profile, []
        path = home() / "params" / table / f"{profile}.yaml"
        self.table = load_table(path, networks=False, cells=False)
        self.paper = papers_numbers(self.table.rows)
        self.paper_networks = papers_numbers(self.table.networks)
        self.evidence_here, self.store = evidence, evidence.store

    @cached_property
    def plan(self) -> Plan:
        return recorded(self.table, self.evidence_here)

    def read(self, published: bool) -> dict[str, dict]:
        source = self.evidence_here.published if published else self.evidence_here.own
        return {key: source[key] for key in self.plan.cells if key in source}


def recorded(table: Table, evidence: Evidence) -> Plan:
    """The plan of `Recorded`."""
    out, order, chosen = Plan(), [], {}
    for row in table.rows:
        order += [r for r in (*table.ancestors(row), row) if r not in order]
    for row in order:
        spec, cell = table.rows[row], None
        parents = {role: getattr(spec, role) for role in PARENTS}
        outside = any(text is not None and text not in table.rows for text in parents.values())
        for seed in table.seeds:
            out.by_row[row, seed] = f"{row} {seed}"
            values = table.cell_of(row, seed) if cell is None else {}
            if cell is None and data_of(values) not in evidence.digests:
                continue
            changes = {
                role: out.by_row[text, seed] if text in table.rows else text
                for role, text in parents.items()
            }
            if cell is None:  # checked once; its other seeds differ in nothing that is
                cell = Cell.model_validate(values | changes)
            cell = cell.model_copy(update=changes | {"seed": seed})
            if (key := evidence.key(cell, chosen, outside)) is not None:
                out.cells[key] = Planned(key, cell, rows=(row,))
                out.by_row[row, seed] = key
    return out


class Standings:
    """How the items of the catalogue stand; profiles are read once, as they are asked for."""

    def __init__(self, evidence: Evidence | None = None):
        self.evidence = evidence or Evidence()
        self.profiles = profiles()
        self.loaded: dict[str, list[Recorded]] = {}
        self.refused: dict[str, str] = {}  # TABLE PROFILE -> why it could not be read

    def tables(self, name: str) -> list[Recorded]:
        """The profiles of a table, without `smoke`, which is about the machinery alone."""
        if name not in self.loaded:
            found = self.loaded[name] = []
            for profile in self.profiles.get(name, []):
                if profile == "smoke":
                    continue
                try:
                    one = Recorded(name, profile, self.evidence)
                    one.plan  # noqa: B018 - its cells are checked as they are made
                    found.append(one)
                except (UserError, ValidationError) as error:  # must not hide the others
                    self.refused[f"{name} {profile}"] = str(error).partition("\n")[0]
        return self.loaded[name]

    def of(self, reference: str, item: Item) -> Standing:
        """How PAPER/ITEM stands, by the rule at the top of this file.

        Verdicts are those of the rows that name the item as their paper's, or of all rows where
        none does; of profiles that stand in for the paper's data, those of all that was run.
        """
        if item.cannot_run or item.not_implemented:
            status = CANNOT if item.cannot_run else MISSING
            return Standing(status, why=item.cannot_run or item.not_implemented)
        if item.kind is not None:
            return Standing(item.kind)
        found = [(entry, one) for entry in item.here for one in self.tables(entry.split("/")[0])]
        cited = any(cites(one, row, reference) for _, one in found for row in one.rows)
        counts: Counter[str] = Counter()
        for entry, one in found:
            named = entry in (one.id, f"{one.id}/{one.profile}")
            for row in one.rows:
                if one.against(row) == row:  # a control has no gain
                    continue
                verdict, names_it = one.verdict(row), cites(one, row, reference)
                if verdict in COMPARED and not names_it:  # with the numbers of another item
                    verdict = "not comparable"
                if one.comparable:
                    counts[verdict] += named and (names_it or not cited)
                else:
                    counts[verdict] += verdict != "not run"
        status = next((verdict for verdict in VERDICTS if counts[verdict]), "not run")
        return Standing(status, {v: counts[v] for v in VERDICTS if counts[v]})

    def all(self) -> dict[str, Standing]:
        """PAPER/ITEM -> how it stands, in the catalogue's order."""
        return {
            f"{name}/{key}": self.of(f"{name}/{key}", item)
            for name, work in catalogue().items()
            for key, item in work.items.items()
        }


def cites(results: Results, row: str, reference: str) -> bool:
    """Whether a row names a cell of PAPER/ITEM as its paper's."""
    paper = results.table.rows[row].paper
    return paper is not None and item_of(paper.row) == reference


def catalogue_counts(standings: Mapping[str, Standing]) -> dict[str, int]:
    """status -> the papers' items that have it: what was run first, what is not here last."""
    papers = {name for name, work in catalogue().items() if work.year is not None}
    counts = Counter(
        standing.status for name, standing in standings.items() if name.split("/")[0] in papers
    )
    order = ("reproduced", *COMPARED[1::-1], *VERDICTS[3:], *KINDS, CANNOT, MISSING)
    return {status: counts[status] for status in order if counts[status]}
