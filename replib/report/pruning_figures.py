"""What a table's networks lost to pruning, and when (ResRep, figures 2 to 4): all from evidence."""

from __future__ import annotations

from functools import cached_property

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from replib.report.cycle_figures import finished, looks
from replib.report.figures import INK, MUTED, name, style
from replib.report.results import Results


class Pruning:
    """The rows of a table whose networks are pruned, and those that they are compared with."""

    def __init__(self, results: Results):
        self.results = results

    @cached_property
    def reports(self) -> dict[tuple[str, int], dict]:
        """(row, seed) -> what `replib.experiments.cells.pruned` reports of it."""
        return self.results.reported("pruning")

    @property
    def rows(self) -> list[str]:
        """The rows that are pruned in training, in the table's order."""
        return list(dict.fromkeys(row for row, _ in self.reports))

    def looks(self, rows: list[str]) -> dict[str, dict]:
        """row -> its colour and line, which are the same in all figures."""
        every = looks(self.results.rows)
        return {row: every[row] for row in rows}

    def seeds(self, row: str) -> list[int]:
        return [seed for other, seed in self.reports if other == row]

    @cached_property
    def history(self) -> pd.DataFrame:
        """One line per row, seed and own epoch (from 1): those of the base network are left out."""
        whole = self.results.history(self.results.fallback)
        if whole.empty:
            return whole
        whole = whole[whole.own].copy()
        whole["own_epoch"] = whole.groupby(["row", "seed"]).cumcount() + 1
        return whole

    def mean(self, row: str, column: str) -> pd.Series:
        """own epoch -> mean over seeds, where it was measured."""
        part = self.history[self.history.row == row]
        table = part.pivot_table(column, "own_epoch", "seed") if column in part else None
        return pd.Series(dtype=float) if table is None else table.mean(axis=1).dropna()

    def pruned_share(self, row: str) -> float | None:
        """Percent of the FLOPs of the control's deployed network that a row's lacks, over seeds."""
        source = self.results.fallback
        whole = [
            e["result"]["deployed"]["flops"]
            for e in self.results.evidence(self.results.control(row), source).values()
        ]
        left = [
            e["result"]["deployed"]["flops"] for e in self.results.evidence(row, source).values()
        ]
        return 100 * (1 - np.mean(left) / np.mean(whole)) if whole and left else None

    # -- figure 2 ----------------------------------------------------------------------------------
    def course(self, rows: list[str] | None = None) -> Figure | None:
        """Training loss and test accuracy over the epochs after the base network.

        rows: by default those with a base network, which is the dashed line.
        """
        if not self.rows:
            return None
        style()
        starts = self.results.table.rows
        rows = rows or [row for row in self.results.rows if starts[row].start in starts]
        shown = {"train_loss": "training loss", "test_accuracy": "test accuracy, %"}
        figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), sharex=True)
        for axis, (column, title) in zip(axes, shown.items(), strict=True):
            factor = 100 if column == "test_accuracy" else 1
            for row, look in self.looks(rows).items():
                values = factor * self.mean(row, column)
                label = name(self.results, row) if len(values) else None
                axis.plot(values.index, values, color=look["color"], lw=1.5, label=label)
            axis.set_title(title, fontsize="medium", loc="left")
            axis.set_xlabel("epoch after the base network (mean of seeds)")
            axis.grid(axis="y", color="#e4e7eb")
        base = self.results.accuracy(self.results.table.control, self.results.fallback)
        if base is not None:
            axes[1].axhline(base.mean, color=MUTED, ls="--", lw=1)
        axes[0].set_yscale("log")
        axes[1].legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
        return finished(figure)

    # -- figure 3 ----------------------------------------------------------------------------------
    def widths(self) -> Figure | None:
        """Channels that are left in every layer; the first seed of each row that is pruned."""
        if not self.rows:
            return None
        style()
        figure, axes = plt.subplots(
            len(self.rows), 1, figsize=(11, 1.5 * len(self.rows) + 2.4), squeeze=False
        )
        for axis, row in zip(axes[:, 0], self.rows, strict=True):
            seed = self.seeds(row)[0]
            found = self.reports[row, seed]["widths"]
            before, after = zip(*found.values(), strict=True)
            places = range(len(found))
            axis.bar(places, before, color="#e4e7eb", width=0.8, label="before")
            axis.bar(places, after, color="C0", width=0.8, label="left")
            axis.set_title(f"{name(self.results, row)}, seed {seed}", fontsize="medium", loc="left")
            axis.set_ylabel("channels")
            axis.set_xticks(list(places), ["" for _ in found])
        axes[-1, 0].set_xticklabels(list(found), rotation=90, fontsize="x-small")
        axes[0, 0].legend(frameon=False, fontsize="small", loc="upper left")
        return finished(figure)

    # -- figure 4 ----------------------------------------------------------------------------------
    def arms(self) -> Figure | None:
        """FLOPs pruned against accuracy; and over the epochs, accuracy as trained, and of the
        network as it would be if it were pruned to its target then."""
        if not self.rows:
            return None
        style()
        figure, axes = plt.subplots(1, 3, figsize=(12, 4.2))
        for row, look in self.looks(self.results.rows).items():
            accuracy = self.results.accuracy(row, self.results.fallback)
            share, colour = self.pruned_share(row), look["color"]
            if accuracy is not None and share is not None:
                label = name(self.results, row)
                axes[0].plot(share, accuracy.mean, "o", color=colour, mec=INK, ms=8, label=label)
                every = [share] * accuracy.n
                axes[0].plot(every, accuracy.points, ".", color=colour, alpha=0.5, ms=5)
            if row in self.rows:
                for axis, column in zip(
                    axes[1:], ("test_accuracy", "pruned_accuracy"), strict=True
                ):
                    values = 100 * self.mean(row, column)
                    axis.plot(values.index, values, color=colour, lw=1.5)
        axes[0].set_xlabel("FLOPs pruned, %")
        for axis, title in zip(
            axes, ("deployed", "as trained", "pruned to the target then"), strict=True
        ):
            axis.set_title(title, fontsize="medium", loc="left")
            axis.grid(axis="y", color="#e4e7eb")
        axes[0].set_ylabel("test accuracy, %")
        axes[2].sharey(axes[1])
        for axis in axes[1:]:
            axis.set_xlabel("epoch after the base network")
        figure.legend(frameon=False, fontsize="small", loc="upper center", ncols=3)
        figure.tight_layout(rect=(0, 0, 1, 0.84))
        plt.close(figure)
        return figure

    def share_left(self) -> Figure | None:
        """Shares of the FLOPs over the epochs: of what is not masked, and of what is not zero."""
        if not self.rows:
            return None
        style()
        figure, axis = plt.subplots(figsize=(11, 3.6))
        for row, look in self.looks(self.rows).items():
            for column, line in (("unmasked_flops", "--"), ("nonzero_flops", "-")):
                values = 100 * self.mean(row, column)
                label = name(self.results, row) if line == "-" else None
                axis.plot(values.index, values, line, color=look["color"], lw=1.5, label=label)
        axis.set_ylabel("FLOPs, %")
        axis.set_xlabel("epoch after the base network (dashed: not masked; solid: not zero)")
        axis.grid(axis="y", color="#e4e7eb")
        axis.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
        return finished(figure)
