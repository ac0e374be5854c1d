"""Cells per day and cost on several GPUs, from times of evidence and of the queue."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
from IPython.display import HTML

from replib.analysis.scaling import Work, enough, finished, longest_line
from replib.errors import UserError
from replib.experiments import queue
from replib.experiments.params import load_table
from replib.experiments.store import home
from replib.report import cycle_figures
from replib.report.figures import style
from replib.report.measured_figures import image
from replib.report.page import escape, number, table_html
from replib.report.results import Results, profile_path

HOUR, DAY = 3600, 86400


class Scaling:
    """Tables with measured times, and the queue with those that its file says.

    devices: how many GPUs to compute with. start: seconds that a job takes to begin, and price: of
    an hour of a GPU; both are assumed.
    """

    def __init__(
        self, tables: Sequence[str], devices: Sequence[int], start: float = 0, price: float = 0
    ):
        self.devices, self.start, self.price = list(devices), start, price
        self.work: dict[str, dict[str, Work]] = {}
        self.where: dict[str, Counter] = {}  # table -> device -> cells
        self.without: list[str] = []
        for name in tables:
            table, _, profile = name.partition("/")
            found = measured(Results(table, profile or "quick"))
            if found is None:
                self.without.append(name)
            else:
                self.work[name], self.where[name] = found

    def started(self, work: Mapping[str, Work]) -> dict[str, Work]:
        """The same with the start of a job in front of every cell."""
        return {name: Work(one.seconds + self.start, one.after) for name, one in work.items()}

    def line(self, name: str, work: Mapping[str, Work], devices: int) -> list[str]:
        """One line of a table."""
        begun = self.started(work)
        whole = finished(begun, devices)
        hours = sum(one.seconds for one in begun.values()) / HOUR
        busy = hours / (devices * whole / HOUR)
        cells = [name, number(devices), f"{whole / HOUR:.3g}"]
        cells += [number(len(work) / whole * DAY), f"{100 * busy:.0f}", f"{hours:.3g}"]
        if self.price:
            cells += [number(self.price * hours, 2)]
            cells += [number(self.price * devices * whole / HOUR, 2)]
        return cells

    def shown(self, work: Mapping[str, Mapping[str, Work]]) -> HTML:
        header = ["", "devices", "hours to the end", "cells a day", "busy, %", "device hours"]
        if self.price:
            header += ["cost, given back when idle", "cost, all held to the end"]
        lines = []
        for name, pieces in work.items():
            lines += [self.line(escape(name), pieces, count) for count in self.devices]
        return HTML(table_html(header, lines))

    def table(self) -> HTML:
        """What tables take whose cells all have evidence."""
        without = ", ".join(map(escape, self.without))
        said = f"<p>Without evidence of every cell: {without}.</p>" if without else ""
        return HTML(self.shown(self.work).data + self.limits(self.work) + self.origin() + said)

    def origin(self) -> str:
        """On what the times were measured."""
        items = []
        for name, devices in self.where.items():
            said = ", ".join(f"{n} cells on {escape(device)}" for device, n in devices.items())
            items.append(f"<li>{escape(name)}: {said}</li>")
        return f"<ul>{''.join(items)}</ul>" if items else ""

    def limits(self, work: Mapping[str, Mapping[str, Work]]) -> str:
        """Where more devices stop to help."""
        items = []
        for name, pieces in work.items():
            begun = self.started(pieces)
            items.append(
                f"<li>{escape(name)}: {len(pieces)} cells; never below "
                f"{longest_line(begun) / HOUR:.3g} hours, the longest line of cells that "
                f"start from each other; beyond {enough(begun)} devices, twice as many save less "
                "than a hundredth</li>"
            )
        return f"<ul>{''.join(items)}</ul>"

    def queue(self, name: str) -> HTML:
        """The whole queue, and its measured part, by the minutes that its file says."""
        entries = queue.read(home() / "params" / name).entries
        work: dict[str, Work] = {}
        for entry in entries:
            work |= {k: w for k, w in of_entry(entry).items() if k not in work}
        known = sum(entry.measured is not None for entry in entries)
        said = (
            f"<p>The minutes of {known} of {len(entries)} entries were measured, the others are "
            "estimates. Those of an entry are dealt out to its cells by their epochs.</p>"
        )
        return HTML(self.shown({name: work}).data + self.limits({name: work}) + said)

    def figure(self) -> HTML:
        """How many times faster than one device, over the number of devices."""
        style()
        figure, axis = plt.subplots(figsize=(7, 4.5))
        counts = [2**i for i in range(max(self.devices).bit_length() + 1)]
        axis.plot(counts, counts, color="#cccccc", lw=1, label="as many times as devices")
        for name, pieces in self.work.items():
            begun = self.started(pieces)
            alone = finished(begun, 1)
            times = [alone / finished(begun, count) for count in counts]
            axis.plot(counts, times, marker=".", label=name)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set_xlabel("devices")
        axis.set_ylabel("times faster than one")
        axis.legend(frameon=False, fontsize="small")
        said = "How many times faster tables are finished, over the number of devices."
        return HTML(image(said, cycle_figures.finished(figure)))


def measured(results: Results) -> tuple[dict[str, Work], Counter] | None:
    """(work, device -> cells) of a table, by its evidence; None where a cell has none."""
    work, where = {}, Counter()
    for key, planned in results.plan.cells.items():
        evidence = results.own.get(key) or results.published.get(key)
        if evidence is None:
            return None
        context = evidence["context"]
        work[key] = Work(context["wall_seconds"], tuple(planned.parents.values()))
        device = context["device"]
        where["a core of a processor" if device == "cpu" else device] += 1
    return (work, where) if work else None


def of_entry(entry: queue.Entry) -> dict[str, Work]:
    """The cells of an entry of the queue, by its rows and seeds alone: no data is read. Each has
    its share of the entry's minutes, by epochs."""
    path = profile_path(entry.table, entry.profile)
    table = load_table(path, [f"seeds={entry.seeds}", *entry.set], networks=False)
    rows = entry.rows or list(table.rows)
    if unknown := [row for row in rows if row not in table.rows]:
        raise UserError(f"rows (={unknown[0]}): no such row; there are {', '.join(table.rows)}.")
    needed = list(dict.fromkeys(one for row in rows for one in (*table.ancestors(row), row)))
    place = f"{entry.table}/{entry.profile} {' '.join(entry.set)}"
    epochs, after = {}, {}
    for seed in table.seeds:
        for row in needed:
            values, spec = table.cell_of(row, seed), table.rows[row]
            name = f"{place} {row} {seed}"
            epochs[name] = values["epochs"] * values.get("phases", 1)
            parents = (p for p in (spec.start, spec.teacher, spec.scales) if p in table.rows)
            after[name] = tuple(f"{place} {parent} {seed}" for parent in parents)
    each = 60 * entry.minutes / sum(epochs.values())
    return {name: Work(each * count, after[name]) for name, count in epochs.items()}
