"""What grew and what was cut over the training of a table's networks (DyRep): as figures and
tables; every number is of the rows' evidence, or of the networks that it names."""

from __future__ import annotations

import re
from functools import cached_property
from itertools import combinations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch.nn.functional as F
from IPython.display import HTML
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from replib.analysis.growth_scores import signed_sums
from replib.analysis.layer_scores import SCORES
from replib.blocks import BLOCKS
from replib.errors import UserError
from replib.experiments import layers
from replib.experiments.cells import new_model, trained_model
from replib.report.cycle_figures import finished, looks
from replib.report.diagram import before_after
from replib.report.figures import INK, name, style
from replib.report.page import NONE, escape, number, table_html
from replib.report.results import Results

MISSING = "<p>Nothing yet: no row of this table has grown anything.</p>"
NAMED = {
    "synflow": "Σ g w (default)",
    "snip": "Σ |g w| (SNIP)",
    "grad_norm": "|g|",
    "random": "random",
}


def layer(path: str) -> str:
    """The layer of the network at first that a path is in: what stands before its branches."""
    return re.sub(r"(\.block)?\.branches\..*", "", path)


def place(path: str) -> str:
    """A path in few words: the layer, and where in its blocks."""
    inside = re.findall(r"branches\.(kxk|1x1_kxk)\.", path)
    return " > ".join([layer(path), *inside])


def live(structure: dict[str, list[str]]) -> dict[str, int]:
    """Layer -> how many branches it has; a block inside of a branch counts with its own."""
    counts: dict[str, int] = {}
    for path, names in structure.items():
        counts[layer(path)] = counts.get(layer(path), 1) + len(names) - 1
    return counts


class Growth:
    """The rows of a table whose networks grow, and what their evidence says of it."""

    def __init__(self, results: Results):
        self.results = results

    @cached_property
    def adjustments(self) -> dict[tuple[str, int], list[dict]]:
        """(row, seed) -> its adjustments, as `replib.methods.dyrep.DyRep.adjust` describes them."""
        return {
            at: [
                dict(zip(columns, line, strict=True))
                for line in zip(*columns.values(), strict=True)
            ]
            for at, columns in self.results.reported("adjustments").items()
            if columns
        }

    @property
    def rows(self) -> list[str]:
        """The rows that have grown something, in the table's order."""
        return list(dict.fromkeys(row for row, _ in self.adjustments))

    def seeds(self, row: str) -> list[int]:
        return [seed for other, seed in self.adjustments if other == row]

    def branches(self, row: str, seed: int) -> pd.DataFrame:
        """How many branches every layer has in every epoch: a line per layer, from the image on,
        a column per epoch from 1."""
        entries = self.adjustments[row, seed]
        names = list(dict.fromkeys(map(layer, entries[0]["layers"])))
        source = self.results.evidence(row, self.results.fallback)[seed]
        epochs = range(1, len(source["result"]["history"]["epoch"]) + 1)
        frame = pd.DataFrame(1, index=names, columns=epochs)
        for entry in entries:
            counts = live(entry["structure"])
            for epoch in [e for e in epochs if e > entry["epoch"] + 1]:
                frame[epoch] = [counts.get(one, 1) for one in names]
        return frame

    def block(self) -> HTML:
        """The block that grows, as it is trained and as it is deployed."""
        return HTML(before_after(BLOCKS["dyrep"](16, 16)))

    # -- the structure -----------------------------------------------------------------------------
    def structure(self) -> Figure | None:
        """Branches per layer and epoch, the first seed of each row; what grew, what was cut."""
        if not self.rows:
            return None
        style()
        frames = {row: self.branches(row, self.seeds(row)[0]) for row in self.rows}
        heights = [0.17 * len(frame) + 0.9 for frame in frames.values()]
        figure, axes = plt.subplots(
            len(frames), 1, figsize=(11, sum(heights)), height_ratios=heights, squeeze=False
        )
        most = max(int(frame.to_numpy().max()) for frame in frames.values())
        for axis, (row, frame) in zip(axes[:, 0], frames.items(), strict=True):
            seed = self.seeds(row)[0]
            image = axis.imshow(
                frame, aspect="auto", cmap="YlGnBu", vmin=0, vmax=most,
                extent=(0.5, frame.shape[1] + 0.5, len(frame) - 0.5, -0.5),
            )  # fmt: skip
            self.mark(axis, self.adjustments[row, seed], list(frame.index))
            axis.set_yticks(range(len(frame)), frame.index, fontsize="x-small")
            axis.set_title(f"{name(self.results, row)}, seed {seed}", fontsize="medium", loc="left")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            figure.colorbar(image, ax=axis, label="branches", pad=0.01)
        axes[-1, 0].set_xlabel("epoch (▲ grew after it, × branches were cut after it)")
        return finished(figure)

    @staticmethod
    def mark(axis: Axes, entries: list[dict], names: list[str]) -> None:
        """What grew and what was cut."""
        for entry in entries:
            at = entry["epoch"] + 1.5
            if entry["grown"] is not None:
                axis.plot(at, names.index(layer(entry["grown"])), "^", color="white", mec=INK, ms=6)
            for path in entry["cut"]:
                axis.plot(at, names.index(layer(path)), "x", color="C3", ms=6, mew=2)

    def costs(self) -> Figure | None:
        """FLOPs of a training step and parameters over the epochs, relative to the first one."""
        history = self.results.history(self.results.fallback)
        if not self.rows:
            return None
        style()
        shown = {"training_flops": "FLOPs of a step", "training_parameters": "parameters"}
        figure, axes = plt.subplots(1, 2, figsize=(11, 3.4), sharex=True)
        for axis, (column, title) in zip(axes, shown.items(), strict=True):
            for row, look in looks(self.rows).items():
                table = history[history.row == row].pivot_table(column, "total_epoch", "seed")
                table = table / table.iloc[0]
                mean, low, high = table.mean(axis=1), table.min(axis=1), table.max(axis=1)
                colour = look["color"]
                label = name(self.results, row)
                axis.step(mean.index, mean, where="mid", color=colour, label=label)
                axis.fill_between(mean.index, low, high, color=colour, alpha=0.12, lw=0, step="mid")
            axis.set_title(f"{title}, over those of the plain network", fontsize="medium")
            axis.set_xlabel("epoch (mean of seeds, smallest to largest)")
            axis.grid(axis="y", color="#e4e7eb")
        axes[1].legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
        return finished(figure)

    def averages(self) -> HTML:
        """Per row: what an average epoch costs, and the network that training ended with."""
        if not self.rows:
            return HTML(MISSING)
        header = ["", "FLOPs of a step: mean / first", "last / first", "parameters: mean / first"]
        header += ["grown", "of them inside blocks", "branches cut", "branches in the end"]
        header += ["largest jump, eval mode"]
        history, jumps = (
            table(self.results.fallback) for table in (self.results.history, self.results.restarts)
        )
        lines = []
        for row in self.rows:
            part, ratios = history[history.row == row], []
            for _, run in part.groupby("seed"):
                flops, size = run.training_flops, run.training_parameters
                first = flops.iloc[0], size.iloc[0]
                means = flops.mean() / first[0], flops.iloc[-1] / first[0], size.mean() / first[1]
                ratios.append(means)
            runs = [self.adjustments[row, seed] for seed in self.seeds(row)]
            grown = [[e["grown"] for e in run if e["grown"] is not None] for run in runs]
            inner = [sum(" > " in place(path) for path in run) for run in grown]
            cut = [sum(len(n) for e in run for n in e["cut"].values()) for run in runs]
            left = [sum(live(run[-1]["structure"]).values()) for run in runs]
            counts = [np.mean([len(run) for run in grown]), *map(np.mean, (inner, cut, left))]
            lines.append(
                [
                    f"<b>{escape(self.results.table.rows[row].label)}</b>",
                    *(f"{value:.2f}" for value in np.mean(ratios, axis=0)),
                    *(f"{value:.1f}" for value in counts),
                    f"{jumps[jumps.row == row].jump_eval.max():.1g}",
                ]
            )
        note = (
            "<p><small>Means over seeds. FLOPs: forward and backward. Branches in the end: of the "
            "layers that have grown. A jump: max |change of logits| / max |logits| of training "
            "images at an adjustment, the largest of all.</small></p>"
        )
        return HTML(table_html(header, lines, "numbers") + note)

    def events(self) -> HTML:
        """Every adjustment of every run."""
        if not self.rows:
            return HTML(MISSING)
        lines = []
        for (row, seed), entries in self.adjustments.items():
            for entry in entries:
                cut = [f"{place(path)}: {', '.join(n)}" for path, n in entry["cut"].items()]
                lines.append(
                    [
                        escape(self.results.table.rows[row].label),
                        str(seed),
                        str(entry["epoch"] + 1),
                        NONE if entry["grown"] is None else escape(place(entry["grown"])),
                        escape("; ".join(cut)) or NONE,
                    ]
                )
        header = ["", "seed", "after epoch", "grew in", "branches cut"]
        summary = f"<summary>All {len(lines)} adjustments</summary>"
        return HTML(f"<details>{summary}{table_html(header, lines)}</details>")

    # -- the scores --------------------------------------------------------------------------------
    def scores(self, row: str | None = None) -> Figure | None:
        """The three scores by layer at every adjustment of a row's first seed; the highest marked.

        row: by default the first one.
        """
        if not self.rows:
            return None
        style()
        row = row or self.rows[0]
        seed = self.seeds(row)[0]
        entries = self.adjustments[row, seed]
        names = list(dict.fromkeys(map(layer, entries[0]["layers"])))
        figure, axes = plt.subplots(len(SCORES), 1, figsize=(11, 7.5), sharex=True)
        colours = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(entries)))
        for axis, score in zip(axes, ("synflow", "snip", "grad_norm"), strict=True):
            smallest = []
            for entry, colour in zip(entries, colours, strict=True):
                values = np.array(entry["scores"][score], dtype=float)
                at = positions(entry["layers"], names)
                order = np.argsort(at, kind="stable")
                axis.plot(at[order], values[order], "-", color=colour, lw=1)
                best = int(np.nanargmax(values))
                label = f"after epoch {entry['epoch'] + 1}" if score == "synflow" else None
                axis.plot(at[best], values[best], "o", color=colour, mec=INK, ms=8, label=label)
                smallest.append(np.nanmin(np.abs(values)[values != 0], initial=np.inf))
            axis.set_yscale("symlog", linthresh=max(min(smallest), 1e-12))
            axis.set_title(NAMED[score], fontsize="medium", loc="left")
            axis.grid(axis="y", color="#e4e7eb")
        axes[0].legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
        axes[-1].set_xticks(range(len(names)), names, rotation=90, fontsize="small")
        axes[-1].set_xlabel(
            f"layer, from the image to the classifier; {name(self.results, row)}, seed {seed} "
            "(between two layers: what is inside of blocks)"
        )
        return finished(figure)

    def agreement(self) -> HTML:
        """How alike the scores rank the convolutions, and what the signed one is beside the
        absolute one; over all adjustments of all rows."""
        from scipy.stats import spearmanr  # a second to import

        if not self.rows:
            return HTML(MISSING)
        pairs = list(combinations(("synflow", "snip", "grad_norm"), 2))
        header = ["", "Σ g w below 0, %", "largest |Σ g w| / Σ |g w|"]
        for a, b in pairs:
            header += [f"rank correlation<br>{NAMED[a]}, {NAMED[b]}", "same choice, %"]
        header.append("chosen under the row's own score: different layers")
        lines = []
        for row in self.rows:
            entries = [e for seed in self.seeds(row) for e in self.adjustments[row, seed]]
            found = [{k: np.array(v, dtype=float) for k, v in e["scores"].items()} for e in entries]
            negative = np.mean([(scores["synflow"] < 0).mean() for scores in found])
            share = max((np.abs(s["synflow"]) / s["snip"]).max() for s in found)
            line = [f"<b>{escape(self.results.table.rows[row].label)}</b>"]
            line += [f"{100 * negative:.0f}", f"{share:.1g}"]
            for a, b in pairs:
                ranks = [spearmanr(s[a], s[b]).statistic for s in found if len(s[a]) > 2]
                alike = [s[a].argmax() == s[b].argmax() for s in found]
                line += [f"{np.mean(ranks):.2f}" if ranks else NONE, f"{100 * np.mean(alike):.0f}"]
            different = [
                len({layer(e["grown"]) for e in self.adjustments[row, seed] if e["grown"]})
                for seed in self.seeds(row)
            ]
            lines.append([*line, f"{np.mean(different):.1f}"])
        note = (
            "<p><small>Spearman's rank correlation over the convolutions that could grow, mean "
            "over adjustments and seeds. Different layers: mean over seeds.</small></p>"
        )
        return HTML(table_html(header, lines, "numbers") + note)

    def shares(self) -> HTML:
        """The signed sum of one batch, and what eps leaves of it, for a network of the table."""
        results = self.results
        planned = results.plan.cells[
            results.plan.by_row[results.table.control, results.table.seeds[0]]
        ]
        try:
            model, state = trained_model(planned, results.store), "the selected weights"
        except UserError:  # not trained here
            model, state = new_model(planned.cell), "as initialised"
        x, y = next(layers.batches(planned.cell, "cpu"))
        lines = [
            [
                escape(place(row["convolution"])),
                f"{row['snip']:.3g}",
                *(f"{row[key]:+.3e}" for key in ("single", "double", "predicted")),
            ]
            for row in signed_sums(model, x, y, F.cross_entropy)
        ]
        header = ["", "Σ |g w|", "Σ g w, float32", "Σ g w, float64", "Σ ε/(v + ε) γ ∂L/∂γ"]
        label = escape(results.table.rows[results.table.control].label)
        note = (
            f"<p><small>{label}, seed {planned.cell.seed}, {state}; one batch of "
            f"{number(len(x))} training images, not augmented.</small></p>"
        )
        return HTML(table_html(header, lines, "numbers") + note)


def positions(paths: list[str], names: list[str]) -> np.ndarray:
    """Where convolutions stand on the axis of layers; those inside of blocks between two."""
    seen: dict[str, int] = {}
    at = []
    for path in paths:
        seen[layer(path)] = count = seen.get(layer(path), -1) + 1
        at.append(names.index(layer(path)) + min(0.2 * count, 0.8))
    return np.array(at)
