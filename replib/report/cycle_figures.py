"""What every cycle of a table did: accuracy and function jump, cycle by cycle, as numbers, a table
and figures; all from evidence."""

from __future__ import annotations

from collections.abc import Callable

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from IPython.display import HTML
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from replib.analysis.statistics import Estimate, estimate, paired_gain
from replib.report.figures import INK, name, style
from replib.report.page import escape, interval, table_html
from replib.report.results import Results

FLOOR = 1e-8  # a jump of exactly 0 has no place on a logarithmic axis
MODES = ("eval", "train")
MARKERS = "osD^vPX*"


def by_cycle(results: Results, published: bool = False) -> pd.DataFrame:
    """One line per row, seed and cycle; cycle 0 is all that came before the first restart.

    last, selected: test accuracy in percent after the cycle's last epoch, and at the epoch that
    the protocol selects in this cycle: where the next one starts. epoch: how many there were in
    all. jump_eval, jump_train: of the restart that began the cycle, relative to the largest logit;
    change: of `selected`, over the cycle, in points. nan where there are none.
    A row without restarts (one long cosine) is cut where the cycles of its control end.
    """
    history = results.history(published)
    if history.empty:
        return pd.DataFrame()
    jumps = results.restarts(published)
    jumps = {} if jumps.empty else {key: part for key, part in jumps.groupby(["row", "seed"])}
    lines = []
    for (row, seed), part in history.groupby(["row", "seed"], sort=False):
        restarts = jumps.get((row, seed))
        if restarts is not None:
            cycles = np.where(part.own, part.phase + 1, 0)
        else:
            starts = first_epochs(history, results.against(row), jumps)
            cycles = np.searchsorted(starts, part.total_epoch, side="right")
        rule = results.evidence(row, published)[seed]["result"]["final"]["selected_by"]
        before = np.nan
        for cycle, epochs in part.groupby(cycles):
            chosen = 100 * epochs.test_accuracy[selected(epochs, rule)]
            line = {"row": row, "seed": seed, "cycle": int(cycle)}
            line |= {"epoch": int(epochs.total_epoch.max()), "change": chosen - before}
            line |= {"selected": chosen, "last": 100 * epochs.test_accuracy.iloc[-1]}
            began = cycle > 0 and restarts is not None
            for mode in MODES:
                column = f"jump_{mode}"
                line[column] = restarts[column].iloc[cycle - 1] if began else np.nan
            lines.append(line)
            before = chosen
    return pd.DataFrame(lines)


def first_epochs(history: pd.DataFrame, row: str, jumps: dict) -> list[int]:
    """The number, in all, of the first epoch of every cycle of a row: of any seed that was run."""
    there = [seed for name, seed in jumps if name == row]
    own = history[(history.row == row) & history.own & history.seed.isin(there[:1])]
    return own.groupby("phase").total_epoch.min().tolist()


def selected(epochs: pd.DataFrame, rule: str) -> int:
    """The index of the epoch that the loop goes on from: by validation accuracy the later of
    equals, by test accuracy the first (replib.training.loop)."""
    scores = epochs[f"{rule}_accuracy"]
    return (scores[::-1] if rule == "validation" else scores).idxmax()


def estimates(frame: pd.DataFrame, row: str, column: str) -> dict[int, Estimate]:
    """cycle -> mean and interval over the seeds."""
    part = frame[frame.row == row].dropna(subset=column)
    return {cycle: estimate(one[column].tolist()) for cycle, one in part.groupby("cycle")}


def cycle_gains(
    results: Results, frame: pd.DataFrame, row: str, column: str
) -> dict[int, Estimate]:
    """cycle -> the paired gain over the row's control at the same number of epochs."""

    def values(row: str) -> dict[int, dict[int, float]]:
        part = frame[frame.row == row].groupby("cycle")
        return {cycle: dict(zip(one.seed, one[column], strict=True)) for cycle, one in part}

    ours, theirs = values(row), values(results.against(row))
    gains = {c: paired_gain(ours[c], theirs[c]) for c in sorted(ours.keys() & theirs.keys()) if c}
    return {cycle: gain for cycle, gain in gains.items() if gain is not None}


def rows_with_cycles(results: Results, frame: pd.DataFrame) -> list[str]:
    """The rows that go on beyond cycle 0."""
    beyond = set(frame[frame.cycle > 0].row) if len(frame) else set()
    return [row for row in results.rows if row in beyond]


def looks(rows: list[str]) -> dict[str, dict]:
    """A colour and a marker for every row."""
    colours = sns.color_palette("colorblind", len(rows))
    return {
        row: {"color": colours[i], "marker": MARKERS[i % len(MARKERS)]}
        for i, row in enumerate(rows)
    }


def summary(results: Results) -> HTML:
    """Accuracy after every cycle, selected and last epoch, and the gain over the control."""
    frame = by_cycle(results, results.fallback)
    rows = rows_with_cycles(results, frame)
    if not rows:
        return HTML("<p>Nothing yet: no cycle of this table has been run.</p>")
    frame = frame[frame.row.isin(rows)]
    cycles = sorted(set(frame.cycle))
    epochs = frame.groupby("cycle").epoch.max()
    header = ["", *(f"cycle {c}<br><small>epoch {epochs[c]}</small>" for c in cycles)]
    said = {"selected": "at the selected epoch", "last": "after the last epoch"}
    parts = []
    for column, words in said.items():
        for title, take in (
            (f"Accuracy, %, {words}", lambda row, c=column: estimates(frame, row, c)),
            (f"Gain, points, {words}", lambda row, c=column: cycle_gains(results, frame, row, c)),
        ):
            lines, signed = [], title.startswith("Gain")
            for row in rows:
                found, label = take(row), f"<b>{escape(results.table.rows[row].label)}</b>"
                if (signed and results.against(row) == row) or not found:
                    continue
                if signed:
                    other = results.table.rows[results.against(row)].label
                    label += f"<br><small>over {escape(other)}</small>"
                lines.append([label, *(interval(found.get(c), signed) for c in cycles)])
            if lines:
                parts.append(f"<h3>{title}</h3>" + table_html(header, lines, "numbers"))
    note = (
        "<p><small>Test accuracy of the deployed network; mean, two-sided 95 % t-interval, n "
        "seeds; gains are paired by seed. Cycle 0 is the network that the cycles start from. A row "
        "without cycles is cut at the same numbers of epochs; its learning rate has come down only "
        "at the end. The intervals are not adjusted for the number of comparisons.</small></p>"
    )
    return HTML("".join(parts) + note)


def cycle_accuracy(results: Results) -> Figure | None:
    """Accuracy after every cycle and the gain over the control: means, 95 % intervals, seeds.

    Columns: at the epoch that is selected in the cycle, and after its last epoch.
    """
    frame = by_cycle(results, results.fallback)
    rows = rows_with_cycles(results, frame)
    if not rows:
        return None
    style()
    figure, axes = plt.subplots(2, 2, figsize=(11, 6.6), sharex=True, sharey="row")
    points = [0.0]
    for (upper, lower), column in zip(axes.T, ("selected", "last"), strict=True):
        for place, (row, look) in enumerate(looks(rows).items()):
            shift = 0.5 * ((place + 0.5) / len(rows) - 0.5)
            found = estimates(frame, row, column)
            draw_estimates(upper, found, shift, label=name(results, row), **look)
            if results.against(row) != row:
                gained = cycle_gains(results, frame, row, column)
                draw_estimates(lower, gained, shift, **look)
                points += [point for gain in gained.values() for point in gain.points]
        said = "at the selected epoch" if column == "selected" else "after the last epoch"
        upper.set_title(said, fontsize="medium")
        lower.axhline(0, color=INK, lw=1)
        lower.set_xlabel("cycle (0: what the cycles start from)")
        lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    in_view(axes[0, 0], frame[frame.row.isin(rows)][["selected", "last"]].to_numpy())
    in_view(axes[1, 0], np.array(points))
    axes[0, 0].set_ylabel("test accuracy, %")
    axes[1, 0].set_ylabel("paired gain over\nits control, points")
    beside(axes[0, 1])
    return finished(figure)


def in_view(axis: Axes, values: np.ndarray) -> None:
    """An axis for the points; intervals of few seeds may leave it."""
    low, high = np.nanmin(values), np.nanmax(values)
    margin = 0.15 * (high - low) + 0.5
    axis.set_ylim(low - margin, high + margin)


def draw_estimates(
    axis: Axes, found: dict[int, Estimate], shift: float, *, color, marker: str, label: str = ""
) -> None:
    """A line through the means, intervals, and every seed's point."""
    at = np.array(list(found), dtype=float) + shift
    axis.plot(at, [e.mean for e in found.values()], "-", marker=marker, color=color, ms=5,
              lw=1.2, label=label or None)  # fmt: skip
    for x, one in zip(at, found.values(), strict=True):
        axis.plot([x] * one.n, one.points, ".", color=color, alpha=0.35, ms=4)
        if one.n > 1:
            axis.plot([x, x], [one.low, one.high], color=color, lw=1, alpha=0.7)


def cycle_jumps(results: Results) -> Figure | None:
    """How far the function jumps at every restart, in eval and in train mode: medians, seeds."""
    frame = by_cycle(results, results.fallback)
    rows = rows_with_cycles(results, frame)
    frame = frame.dropna(subset="jump_eval") if rows else frame[:0]
    if frame.empty:
        return None

    def draw(axis: Axes, column: str, part: pd.DataFrame, look: dict, label: str) -> None:
        heights = part[column].clip(lower=FLOOR)
        middle = heights.groupby(part.cycle).median()
        axis.plot(middle.index, middle, "-", ms=5, lw=1.2, label=label, **look)
        axis.plot(part.cycle, heights, ".", color=look["color"], alpha=0.35, ms=4)

    figure, axes = both_modes(results, frame, rows, draw)
    for axis in axes:
        axis.set_yscale("log")
        axis.set_xlabel("restart that begins cycle")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set_ylabel("max |change of logits| / max |logits|\n(lowest: exactly 0)")
    return finished(figure)


def change_against_jump(results: Results) -> Figure | None:
    """What a cycle did to the selected accuracy, over how far the function had jumped before."""
    frame = by_cycle(results, results.fallback)
    rows = rows_with_cycles(results, frame)
    frame = frame.dropna(subset=["jump_eval", "change"]) if rows else frame[:0]
    if frame.empty:
        return None

    def draw(axis: Axes, column: str, part: pd.DataFrame, look: dict, label: str) -> None:
        jump = part[column].clip(lower=FLOOR)
        axis.plot(jump, part.change, look["marker"], color=look["color"], alpha=0.6, ms=5,
                  label=label)  # fmt: skip

    figure, axes = both_modes(results, frame, rows, draw)
    for axis in axes:
        axis.set_xscale("log")
        axis.axhline(0, color=INK, lw=1)
        axis.set_xlabel("jump at the start of the cycle (left edge: exactly 0)")
    axes[0].set_ylabel("change of selected accuracy\nover the cycle, points")
    return finished(figure)


def both_modes(
    results: Results, frame: pd.DataFrame, rows: list[str], draw: Callable[..., None]
) -> tuple[Figure, np.ndarray]:
    """Two panels, eval and train mode, in which `draw` draws every row."""
    style()
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.7), sharex=True, sharey=True)
    for axis, mode in zip(axes, MODES, strict=True):
        for row, look in looks(rows).items():
            if len(part := frame[frame.row == row]):
                draw(axis, f"jump_{mode}", part, look, name(results, row))
        axis.set_title(f"{mode} mode", fontsize="medium")
        axis.grid(color="#e4e7eb")
    beside(axes[1])
    return figure, axes


def beside(axis: Axes) -> None:
    """The legend at the right of an axis."""
    axis.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))


def finished(figure: Figure) -> Figure:
    """Laid out, and shown once only."""
    figure.tight_layout()
    plt.close(figure)
    return figure
