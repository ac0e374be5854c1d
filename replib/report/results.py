"""From evidence files to the numbers of a page; the only source of what is shown."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import ValidationError

from replib.analysis.statistics import Estimate, estimate, paired_gain, statement, verdict
from replib.errors import UserError
from replib.experiments import measurements
from replib.experiments.cells import Plan, plan, versions_of
from replib.experiments.evidence import problem
from replib.experiments.executor import Outcome, device_here, run_plan
from replib.experiments.params import Cell, Counted, Row, Table, load_table
from replib.experiments.store import Store, canonical, home, read_evidence
from replib.report.catalogue import numbers
from replib.training.shapes import DRAWN

OWN_PROFILE = "own"  # what the profile of a file that is in no folder of params/ is called


def profiles() -> dict[str, list[str]]:
    """Tables and figures with their profiles: the files params/ID/PROFILE.yaml."""
    folders = sorted(path for path in (home() / "params").iterdir() if path.is_dir())
    return {folder.name: sorted(f.stem for f in folder.glob("*.yaml")) for folder in folders}


def profile_path(table: str, profile: str) -> Path:
    """The params file of a table's profile. Raises: UserError that lists what there is."""
    known = profiles()
    if table not in known:
        raise UserError(f"no table {table!r}; there are {', '.join(known)}.")
    if profile not in known[table]:
        raise UserError(f"{table} has no profile {profile!r}; it has {', '.join(known[table])}.")
    return home() / "params" / table / f"{profile}.yaml"


@dataclass(frozen=True)
class Cost:
    """What a row costs per seed, parents included; a teacher's share apart."""

    epochs: float = 0
    flops: float = 0
    seconds: float = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.epochs + other.epochs, self.flops + other.flops, self.seconds + other.seconds
        )


class Results:
    """One profile of one table: its parameters, its cells, and the evidence that exists.

    Accuracies are in percent, gains in points, both of the deployed network on the test split,
    at the checkpoint that the protocol selects. Of a row that detects or segments, its metric (mAP,
    mIoU) stands wherever an accuracy is spoken of.
    """

    def __init__(self, table: str, profile: str, settings: list[str] = (), store=None):
        self.id, self.profile, self.settings = table, profile, list(settings)
        if table.endswith(".yaml"):  # a file of one's own, of no folder of params/
            path, self.id, self.profile = Path(table), Path(table).stem, OWN_PROFILE
        else:
            path = profile_path(table, profile)
        self.table: Table = load_table(path, self.settings)
        self.paper = papers_numbers(self.table.rows)
        self.paper_networks = papers_numbers(self.table.networks)
        self.store = store or Store()
        self.plan: Plan = plan(self.table, self.store)

    def train(self, **options) -> Outcome:
        """Train the cells that are missing on this machine (options of `run_plan`)."""
        outcome = run_plan(self.plan, self.store, title=f"{self.id} {self.profile}:", **options)
        for name in ("own", "published", "measurement"):
            self.__dict__.pop(name, None)
        return outcome

    def measure(self, device: str | None = None) -> dict | None:
        """What this table asks of its trained networks, of the weights on this machine; made where
        it is missing. None for a table that asks nothing, and without weights."""
        where = self.id, self.profile, self.table, self.plan, self.store
        return measurements.own(*where, device_here(device))

    @cached_property
    def measurement(self) -> dict | None:
        """The same, else what is published of it."""
        where = self.id, self.profile, self.table, self.plan, self.store
        return self.measure() or measurements.published(*where)

    @cached_property
    def own(self) -> dict[str, dict]:
        """key -> evidence of this machine."""
        return self.read(published=False)

    @cached_property
    def published(self) -> dict[str, dict]:
        """key -> published evidence."""
        return self.read(published=True)

    def read(self, published: bool) -> dict[str, dict]:
        found = {key: self.store.read(key, published) for key in self.plan.cells}
        return {key: one for key, one in found.items() if one is not None and not problem(one)}

    @cached_property
    def stale(self) -> list[Path]:
        """Published files of this table's cells that were made by an older version."""
        wanted = {
            nameless(planned.cell): versions_of(planned.cell)
            for planned in self.plan.cells.values()
        }
        found = []
        for path in sorted(self.store.published.glob("*.json")):
            key, parameters, versions = about(path, path.stat().st_mtime_ns)
            if key not in self.plan.cells and wanted.get(parameters, versions) != versions:
                found.append(path)
        return found

    @property
    def fallback(self) -> bool:
        """Whether only published evidence is here, so that a page must show that."""
        return bool(self.published) and not self.own

    @property
    def rows(self) -> list[str]:
        """The rows on the page."""
        return [name for name, row in self.table.rows.items() if not row.hidden]

    def evidence(self, row: str, published: bool = False) -> dict[int, dict]:
        """seed -> evidence of a row."""
        source = self.published if published else self.own
        keys = {seed: self.plan.by_row[row, seed] for seed in self.table.seeds}
        return {seed: source[key] for seed, key in keys.items() if key in source}

    def reported(self, name: str) -> dict[tuple[str, int], Any]:
        """(row, seed) -> what the evidence that a page shows has under a name, where it has it; in
        the table's order."""
        return {
            (row, seed): evidence["result"][name]
            for row in self.rows
            for seed, evidence in self.evidence(row, self.fallback).items()
            if evidence["result"].get(name) is not None
        }

    def accuracies(self, row: str, published: bool = False) -> dict[int, float]:
        """seed -> test accuracy in percent of the deployed network, or another metric."""
        found, name = self.evidence(row, published).items(), f"test_{self.table.metric(row)}"
        return {seed: 100 * e["result"]["deployed"][name] for seed, e in found}

    @property
    def metrics(self) -> list[str]:
        """What the scores on the page are."""
        return list(dict.fromkeys(self.table.metric(row) for row in self.rows))

    def further(self, row: str, published: bool = False) -> dict[str, Estimate]:
        """Scores beside the metric: name -> mean and interval, in percent."""
        found = [e["result"]["deployed"] for e in self.evidence(row, published).values()]
        metric = f"test_{self.table.metric(row)}"
        names = [name for name in (found[0] if found else {}) if name.startswith("test_")]
        return {
            name.removeprefix("test_"): estimate([100 * one[name] for one in found])
            for name in names
            if name != metric
        }

    @property
    def views(self) -> list[str]:
        """The views of the test images on which rows of this table are tested too."""
        cells = (planned.cell for planned in self.plan.cells.values())
        return list(dict.fromkeys(view for cell in cells for view in cell.views))

    def view_accuracy(self, row: str, view: str, published: bool = False) -> Estimate | None:
        """Mean and interval of a row on a view of the test images."""
        found = self.evidence(row, published).values()
        seen = [e["result"]["deployed"].get("views", {}).get(view) for e in found]
        values = [100 * value for value in seen if value is not None]
        return estimate(values) if values else None

    def accuracy(self, row: str, published: bool = False) -> Estimate | None:
        """Mean and interval of a row."""
        values = list(self.accuracies(row, published).values())
        return estimate(values) if values else None

    def diverged(self, row: str, published: bool = False) -> dict[int, int]:
        """seed -> the first epoch, from 1, whose training loss is no number."""
        found = self.evidence(row, published).items()
        losses = {seed: e["result"]["history"]["train_loss"] for seed, e in found}
        return {seed: column.index(None) + 1 for seed, column in losses.items() if None in column}

    def against(self, row: str) -> str:
        """The row over which a row's gain is taken."""
        return self.table.rows[row].against or self.control(row)

    def control(self, row: str) -> str:
        """The row over which gains are taken by default: of the same variant, if there are any."""
        return self.table.controls.get(self.table.rows[row].variant, self.table.control)

    def gain(self, row: str, published: bool = False) -> Estimate | None:
        """The paired gain in points, None for the control itself or without evidence."""
        other = self.against(row)
        if other == row:
            return None
        return paired_gain(self.accuracies(row, published), self.accuracies(other, published))

    def paper_gain(self, row: str) -> float | None:
        """The gain in points that the paper has for this row; None where none is established."""
        stated = self.paper[row].get("gain")
        ours, theirs = (self.paper[one].get("accuracy") for one in (row, self.against(row)))
        if stated is not None or None in (ours, theirs):
            return stated
        return round(ours - theirs, 4)

    def verdict(self, row: str) -> str:
        """The verdict on the paper's gain of this row."""
        if self.against(row) == row:
            return "the control"
        return verdict(self.gain(row, self.fallback), self.paper_gain(row), self.comparable)

    @cached_property
    def comparable(self) -> bool:
        """Whether results of this profile can be compared with the paper's."""
        seed = self.table.seeds[0]
        data = {self.table.cell_of(row, seed).get("data") for row in self.table.rows}
        return not self.settings and not data & {"digits", *DRAWN} and self.table.proxy is None

    def cost(self, row: str, seed: int, published: bool = False) -> tuple[Cost, Cost] | None:
        """(own and starts, teachers) of one seed; None where evidence is missing."""
        source = self.published if published else self.own
        students, teachers, seen = Cost(), Cost(), set()

        def visit(key: str, taught: bool) -> bool:
            nonlocal students, teachers
            if key in seen:
                return True
            seen.add(key)
            if key not in source:
                return False
            compute = source[key]["result"]["compute"]
            seconds = source[key]["context"]["wall_seconds"]
            own = Cost(compute["epochs"], compute["training_flops"], seconds)
            if taught:
                teachers += own
            else:
                students += own
            how = source[key]["context"].get("teacher", {"flops": compute["teacher_flops"]})
            teachers += Cost(flops=how["flops"])
            parents = self.plan.cells[key].parents
            return all(visit(k, taught or role == "teacher") for role, k in parents.items())

        whole = visit(self.plan.by_row[row, seed], False)
        return (students, teachers) if whole else None

    def mean_cost(self, row: str, published: bool = False) -> tuple[Cost, Cost] | None:
        """The mean of `cost` over seeds."""
        costs = [self.cost(row, seed, published) for seed in self.table.seeds]
        costs = [cost for cost in costs if cost is not None]
        if not costs:
            return None
        return tuple(
            Cost(*(sum(getattr(c[i], f) for c in costs) / len(costs) for f in Cost.__match_args__))
            for i in (0, 1)
        )

    def teacher_accuracy(self, row: str, published: bool = False) -> Estimate | None:
        """The test accuracy of the row's teacher; of one that is no row, as its students found."""
        teacher = self.table.rows[row].teacher
        if teacher in self.table.rows:
            return self.accuracy(teacher, published)
        found = [e["result"].get("teacher") for e in self.evidence(row, published).values()]
        values = {100 * entry["test_accuracy"] for entry in found if entry is not None}
        return estimate(sorted(values)) if values else None

    def frame(self, published: bool = False) -> pd.DataFrame:
        """The table as numbers: one line per row, accuracies in percent, gains in points."""
        lines = []
        for row in self.rows:
            accuracy, gain = self.accuracy(row, published), self.gain(row, published)
            found, cost = self.evidence(row, published), self.mean_cost(row, published)
            deployed = [e["result"]["deployed"] for e in found.values()]
            taught = self.teacher_accuracy(row, published)
            lines.append(
                {
                    "row": row,
                    "label": self.table.rows[row].label,
                    "accuracy": accuracy and accuracy.mean,
                    "accuracy_low": accuracy and accuracy.low,
                    "accuracy_high": accuracy and accuracy.high,
                    "n": accuracy.n if accuracy else 0,
                    "against": self.against(row),
                    "gain": gain and gain.mean,
                    "gain_low": gain and gain.low,
                    "gain_high": gain and gain.high,
                    "deployed_parameters": same([d["parameters"] for d in deployed]),
                    "deployed_flops": same([d["flops"] for d in deployed]),
                    "epochs": cost and cost[0].epochs,
                    "training_flops": cost and cost[0].flops,
                    "seconds": cost and cost[0].seconds,
                    "teacher_accuracy": taught and taught.mean,
                    "teacher_epochs": cost and cost[1].epochs,
                    "teacher_flops": cost and cost[1].flops,
                    "teacher_seconds": cost and cost[1].seconds,
                    "verdict": self.verdict(row),
                }
            )
        return pd.DataFrame(lines).set_index("row")

    def statements(self) -> dict[str, str]:
        """row -> what may be said of its gain, in our own words."""
        out = {}
        for row in self.rows:
            gain, other = self.gain(row, self.fallback), self.against(row)
            if gain is None:
                continue
            out[row] = statement(gain)
            ours, theirs = (self.table.total_epochs(name) for name in (row, other))
            if ours != theirs:
                out[row] += f"; not at equal compute: {ours} epochs against {theirs}"
        return out

    def history(self, published: bool = False) -> pd.DataFrame:
        """One line per row, seed and epoch, the epochs of the cells it starts from in front.

        Columns: those of a cell's history, and row, seed, total_epoch (from 1), own (False in
        the epochs of a parent).
        """
        source, frames = self.published if published else self.own, []
        for row in self.rows:
            for seed in self.table.seeds:
                chain, key = [], self.plan.by_row[row, seed]
                while key in source:
                    chain.insert(0, key)
                    key = self.plan.cells[key].cell.start
                for link in chain:
                    frame = pd.DataFrame(source[link]["result"]["history"])
                    frame["row"], frame["seed"], frame["own"] = row, seed, link == chain[-1]
                    frames.append(frame)
        if not frames:
            return pd.DataFrame()
        whole = pd.concat(frames, ignore_index=True)
        whole["total_epoch"] = whole.groupby(["row", "seed"]).cumcount() + 1
        return whole

    def restarts(self, published: bool = False) -> pd.DataFrame:
        """One line per row, seed and restart: how far the function jumped."""
        frames = []
        for row in self.rows:
            for seed, evidence in self.evidence(row, published).items():
                frame = pd.DataFrame(evidence["result"]["restarts"])
                frames.append(frame.assign(row=row, seed=seed))
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def papers_numbers(named: dict[str, Row] | dict[str, Counted]) -> dict[str, dict[str, float]]:
    """row or network -> quantity -> what its paper has. Raises: UserError in one line."""
    found = {}
    for name, one in named.items():
        try:
            found[name] = numbers(one.paper)
        except UserError as error:
            raise UserError(f"row {name}: {error}") from None
    return found


def nameless(cell: Cell) -> bytes:
    """Parameters without the keys of parents, which change with any version."""
    return canonical(cell.in_key | {"start": None, "teacher": None})


@cache
def about(path: Path, changed: int) -> tuple:
    """(key, nameless parameters, versions) of an evidence file, read once for all the pages of a
    process; of a damaged file, or one whose parameters there are no more, None."""
    evidence = read_evidence(path)
    try:
        result = evidence["result"]
        parameters = nameless(Cell.model_validate(result["parameters"]))
        return result["key"], parameters, result.get("versions")
    except (KeyError, TypeError, ValidationError):
        return None, None, None


def same(values: list) -> object:
    """The one value that all have; None where there is none or they differ."""
    return values[0] if values and all(value == values[0] for value in values) else None
