"""Scores of the layers of a table's trained networks: as a figure, a table, and where they are
from. Every number is of a measurement file (replib.experiments.layers)."""

from __future__ import annotations

from functools import cached_property

import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import HTML
from matplotlib.figure import Figure

from replib.analysis.statistics import Estimate, estimate
from replib.experiments import layers
from replib.report.cycle_figures import finished, looks
from replib.report.figures import name, style
from replib.report.page import NONE, escape, relative, table_html
from replib.report.results import Results

PARTS = {
    "main": "main branch",
    "side": "side branches",
    "share": "whole block, % of the network",
}


class Layers:
    """The measurement of a table's profile: of this machine's weights, else the published one."""

    def __init__(self, results: Results):
        self.results = results
        where = (results.id, results.profile, results.plan, results.rows, results.store)
        self.own = layers.own(*where)
        self.measurement = self.own or layers.published(*where)

    @cached_property
    def frame(self) -> pd.DataFrame:
        """One line per row, seed and block: main, side (sums of |g w|), share (% of the sum over
        the network's blocks), signed (|sum g w|, added up over its branches)."""
        if self.measurement is None:
            return pd.DataFrame()
        scores = pd.DataFrame(self.measurement["scores"])
        scores["signed"] = scores.synflow.abs()
        keys = ["row", "seed", "block"]
        parts = scores.pivot_table("snip", keys, "role", "sum", fill_value=0.0, sort=False)
        parts = parts.reindex(columns=["main", "side"], fill_value=0.0)
        whole = parts.sum(axis=1)
        parts["share"] = 100 * whole / whole.groupby(["row", "seed"]).transform("sum")
        parts["signed"] = scores.groupby(keys, sort=False).signed.sum()
        return parts.reset_index()

    @property
    def rows(self) -> list[str]:
        """The rows that were measured, in the table's order."""
        there = set(self.frame.row) if len(self.frame) else set()
        return [row for row in self.results.rows if row in there]

    def estimates(self, row: str, part: str) -> dict[str, Estimate]:
        """block -> mean and interval over seeds, in the order of the network."""
        found = self.frame[self.frame.row == row].groupby("block", sort=False)
        return {block: estimate(values[part].tolist()) for block, values in found}

    def figure(self) -> Figure | None:
        """Scores by block: means over seeds, bands from the smallest to the largest seed."""
        if not self.rows:
            return None
        style()
        figure, axes = plt.subplots(len(PARTS), 1, figsize=(11, 8), sharex=True)
        for (part, title), axis in zip(PARTS.items(), axes, strict=True):
            for row, look in looks(self.rows).items():
                found = self.estimates(row, part)
                if not any(one.mean for one in found.values()):  # it has no side branches
                    continue
                at = range(len(found))
                mean = [one.mean for one in found.values()]
                low = [min(one.points) for one in found.values()]
                high = [max(one.points) for one in found.values()]
                label = name(self.results, row)
                axis.plot(at, mean, "-", ms=5, lw=1.2, label=label, **look)
                axis.fill_between(at, low, high, color=look["color"], alpha=0.12, lw=0)
            axis.set_title(title, fontsize="medium", loc="left")
            axis.grid(axis="y", color="#e4e7eb")
            axis.set_ylabel("%" if part == "share" else "Σ |g w|")
            if part != "share":
                axis.set_yscale("log")
        blocks = list(self.estimates(self.rows[-1], "main"))
        axes[-1].set_xticks(range(len(blocks)), [short(block) for block in blocks], rotation=90)
        axes[-1].set_xlabel("block, from the image to the classifier")
        axes[0].legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
        return finished(figure)

    def networks(self) -> HTML:
        """Per row: the score of the whole network, its part in side branches, signed sums."""
        if not self.rows:
            return HTML(self.missing())
        header = [
            "",
            "Σ |g w|, whole network",
            "of it in side branches, %",
            "signed: largest Σ |Σ g w| / Σ |g w|",
        ]
        lines = []
        for row in self.rows:
            part = self.frame[self.frame.row == row]
            sums = part.groupby("seed")[["main", "side", "signed"]].sum()
            whole = sums.main + sums.side
            lines.append(
                [
                    f"<b>{escape(self.results.table.rows[row].label)}</b>",
                    spread(estimate(whole.tolist())),
                    spread(estimate((100 * sums.side / whole).tolist())),
                    f"{(sums.signed / whole).max():.1e}",
                ]
            )
        return HTML(table_html(header, lines, "numbers") + SPREAD)

    def table(self) -> HTML:
        """All scores: a line per block, main and side branches of every row."""
        if not self.rows:
            return HTML("")
        found = {(row, part): self.estimates(row, part) for row in self.rows for part in PARTS}
        shown = {
            key: values for key, values in found.items() if any(e.mean for e in values.values())
        }
        header = ["block"]
        for row, part in shown:
            label = escape(self.results.table.rows[row].label)
            header.append(f"{label}<br><small>{PARTS[part]}</small>")
        blocks = dict.fromkeys(block for values in shown.values() for block in values)
        lines = [
            [escape(block), *(spread(values.get(block)) for values in shown.values())]
            for block in blocks
        ]
        return HTML(
            "<details><summary>All scores by block</summary>"
            f"{table_html(header, lines, 'numbers')}</details>"
        )

    def provenance(self) -> HTML:
        """What was measured: the file, the images, and the evidence of every network."""
        if self.measurement is None:
            return HTML(self.missing())
        settings, context = self.measurement["settings"], self.measurement["context"]
        store, published = self.results.store, self.own is None
        path = layers.path_of(store, self.results.id, self.results.profile, published)
        whose = "Published measurement" if published else "Measured on this machine"
        lines = []
        for cell in self.measurement["cells"]:
            evidence = store.published_path if published else store.own_path
            link = f'<a href="{escape(relative(evidence(cell["key"])))}">evidence</a>'
            key, row = escape(cell["key"][:16]), escape(cell["row"])
            lines.append([f"<code>{key}</code>", row, str(cell["seed"]), link])
        return HTML(
            f'<p>{whose}, commit {escape(context["commit"])}: <a href="{escape(relative(path))}">'
            f"{escape(path.name)}</a>. Weights: {escape(settings['weights'])}. Images: "
            f"{escape(settings['of'])}, at most {settings['images']}. Loss: "
            f"{escape(settings['loss'])}.</p><details><summary>The {len(lines)} networks that were "
            f"measured</summary>{table_html(['cell', 'row', 'seed', ''], lines)}</details>"
        )

    def missing(self) -> str:
        """How to make what is not here."""
        command = f"make reproduce-{self.results.id} PROFILE={self.results.profile}"
        return (
            "<p>The trained weights are not on this machine, and no measurement of them is "
            f"published. <code>{escape(command)}</code> trains the networks and measures them.</p>"
        )


SPREAD = "<p><small>Mean over seeds ± standard deviation between seeds, n seeds.</small></p>"


def spread(value: Estimate | None) -> str:
    """mean ± deviation (n)."""
    if value is None:
        return NONE
    if value.n < 2:
        return f"{value.mean:.3g}"
    deviation = float(f"{value.deviation:.1g}")  # 10, not 1e+01
    rounding = abs(value.mean) < 1e-9 * value.deviation  # what is left of a sum of zero
    return f"{0.0 if rounding else value.mean:.3g} <small>± {deviation:g}, n = {value.n}</small>"


def short(block: str) -> str:
    """stages.2.1.block -> 2.1"""
    return block.removeprefix("stages.").removesuffix(".block")
