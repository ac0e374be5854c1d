"""Effective receptive fields of a table's networks: maps, curves, areas; all from evidence."""

from __future__ import annotations

from functools import cached_property
from textwrap import wrap

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import HTML
from matplotlib.figure import Figure

from replib.analysis.receptive_field import THRESHOLDS, area
from replib.analysis.statistics import Estimate, estimate
from replib.report.cycle_figures import finished, looks
from replib.report.figures import name, style
from replib.report.layer_figures import spread
from replib.report.page import NONE, escape, table_html
from replib.report.results import Results

MISSING = "<p>Nothing yet: no row of this table has been measured.</p>"
DARKEST = -4  # the power of ten of the largest contribution that is still drawn
WIDEST = 4  # maps in a row of the figure


class Fields:
    """The rows of a table whose receptive fields were measured (`receptive_field` of a cell)."""

    def __init__(self, results: Results):
        self.results = results

    @cached_property
    def measured(self) -> dict[str, dict[int, dict]]:
        """row -> seed -> what `replib.analysis.receptive_field.report` found."""
        found: dict[str, dict[int, dict]] = {}
        for (row, seed), field in self.results.reported("receptive_field").items():
            found.setdefault(row, {})[seed] = field
        return found

    def areas(self, row: str, threshold: float) -> Estimate:
        """Percent of the image that holds a share of the contributions, over seeds."""
        fields = self.measured[row].values()
        values = [area(field["shares"], threshold, field["pixels"]) for field in fields]
        return estimate([100 * value for value in values])

    def maps(self) -> Figure | None:
        """Every row's map, the mean over seeds, on a logarithmic scale."""
        if not self.measured:
            return None
        style()
        across = min(WIDEST, len(self.measured))
        down = -(-len(self.measured) // across)
        figure, axes = plt.subplots(
            down, across, figsize=(2.9 * across + 0.6, 3.2 * down), squeeze=False
        )
        for axis in axes.flat:
            axis.set_axis_off()
        for axis, (row, fields) in zip(axes.flat, self.measured.items(), strict=False):
            mean = np.mean([field["map"] for field in fields.values()], axis=0)
            drawn = np.log10(np.maximum(mean / mean.max(), 10.0**DARKEST))
            image = axis.imshow(drawn, cmap="magma", vmin=DARKEST, vmax=0)
            half = self.areas(row, 0.5).mean
            lines = [*wrap(name(self.results, row), 28), f"50 % within {half:.3g} % of it"]
            axis.set_title("\n".join(lines), fontsize="small")
        label = "over the largest, power of ten"
        figure.colorbar(image, ax=axes, label=label, shrink=0.8)
        plt.close(figure)
        return figure

    def curves(self) -> Figure | None:
        """Which share of the contributions lies in a central square, by its side."""
        if not self.measured:
            return None
        style()
        figure, axis = plt.subplots(figsize=(8, 3.6))
        for row, look in looks(list(self.measured)).items():
            fields = list(self.measured[row].values())
            parts = 100 * np.array([field["shares"] for field in fields])
            pixels = fields[0]["pixels"]
            side = np.minimum(100 * (2 * np.arange(parts.shape[1]) + 1) / pixels, 100)
            colour = look["color"]
            axis.plot(side, parts.mean(axis=0), color=colour, label=name(self.results, row))
            low, high = parts.min(axis=0), parts.max(axis=0)
            axis.fill_between(side, low, high, color=colour, alpha=0.12, lw=0)
        for threshold in THRESHOLDS:
            axis.axhline(100 * threshold, color="#e4e7eb", lw=1, zorder=0)
        axis.set_xlabel("side of a central square, % of the image's")
        axis.set_ylabel("contributions in it, %")
        axis.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
        return finished(figure)

    def table(self) -> HTML:
        """Per row: how much of the image holds 20, 30, 50 and 99 % of the contributions."""
        if not self.measured:
            return HTML(MISSING)
        header = ["", *(f"{100 * share:g} % of it within, % of the image" for share in THRESHOLDS)]
        header.append("accuracy, %")
        lines = []
        for row in self.measured:
            label = f"<b>{escape(self.results.table.rows[row].label)}</b>"
            line = [label, *(spread(self.areas(row, share)) for share in THRESHOLDS)]
            accuracy = self.results.accuracy(row, self.results.fallback)
            lines.append([*line, NONE if accuracy is None else f"{accuracy.mean:.2f}"])
        first = next(iter(next(iter(self.measured.values())).values()))
        note = (
            f"<p><small>Smallest central squares. {first['images']} test images of all classes, "
            f"enlarged to {first['pixels']} × {first['pixels']}; the deployed network, at the "
            "weights that the protocol selects. Mean over seeds ± standard deviation between "
            "seeds.</small></p>"
        )
        return HTML(table_html(header, lines, "numbers") + note)
