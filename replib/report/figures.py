"""Figures of a table, drawn from its results: one function each, Results in, Figure out."""

from __future__ import annotations

import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.figure import Figure

from replib.report.results import Results

INK, MUTED = "#1f2933", "#8492a0"
DASHES = ("-", "--", ":", "-.")


def style() -> None:
    """The look of every figure."""
    sns.set_theme(context="notebook", style="ticks", palette="colorblind", font_scale=0.9)
    plt.rcParams.update({"axes.spines.right": False, "axes.spines.top": False})


def lines(count: int) -> list[dict]:
    """A colour and a dash for each of so many lines: colours that the colour-blind tell apart, of
    which there are ten, and other dashes beyond them."""
    colours = sns.color_palette("colorblind")
    return [
        {"color": colours[i % len(colours)], "ls": DASHES[i // len(colours) % len(DASHES)]}
        for i in range(count)
    ]


def groups(results: Results) -> dict[str, list[str]]:
    """Rows by the row that they are compared with, itself first."""
    out: dict[str, list[str]] = {}
    for row in results.rows:
        out.setdefault(results.against(row), []).append(row)
    return {
        control: [control] * (control in rows) + [row for row in rows if row != control]
        for control, rows in out.items()
    }


def name(results: Results, row: str) -> str:
    """The row's label, in which a dollar sign starts no formula."""
    return results.table.rows[row].label.replace("$", r"\$")


def curves(results: Results) -> Figure | None:
    """Test accuracy per epoch, parents in front; mean over seeds, merge points dashed."""
    history = results.history(results.fallback)
    if history.empty:
        return None
    style()
    panels = groups(results)
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(11, 3 * len(panels)), sharex=True, squeeze=False
    )
    for axis, (control, rows) in zip(axes[:, 0], panels.items(), strict=True):
        low = []
        for row, look in zip(rows, lines(len(rows)), strict=True):
            metric = f"test_{results.table.metric(row)}"
            part = history[history.row == row].reindex(columns=["total_epoch", "seed", metric])
            if part[metric].isna().all():
                continue  # not run; tables of detection and segmentation have a metric for each
            table = 100 * part.pivot_table(metric, "total_epoch", "seed")
            mean, spread = table.mean(axis=1), table.sem(axis=1).fillna(0)
            label = name(results, row)
            axis.plot(mean.index, mean, lw=1.6, label=label, **look)
            band = {"color": look["color"], "alpha": 0.15, "lw": 0}
            axis.fill_between(mean.index, mean - spread, mean + spread, **band)
            low.append(mean.iloc[len(mean) // 4 :].quantile(0.1))
        starts = history[(history.row == control) & history.own & (history.epoch == 0)]
        for epoch in sorted(set(starts.total_epoch)):
            axis.axvline(epoch - 0.5, color=MUTED, ls="--", lw=1)
        if low:
            axis.set_ylim(max(0, min(low) - 3), None)
            axis.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
        axis.set_ylabel(f"test {results.table.metric(control)}, %")
    axes[-1, 0].set_xlabel(
        "epoch (dashed: merge, redraw, restore, or the control's restart; band: standard error)"
    )
    figure.tight_layout()
    plt.close(figure)
    return figure


def jumps(results: Results) -> Figure | None:
    """How far the eval-mode function jumps at every restart, relative to its largest logit."""
    frame = results.restarts(results.fallback)
    if frame.empty:
        return None
    style()
    order = [row for row in results.rows if row in set(frame.row)]
    floor = 1e-8  # a jump of exactly 0 has no place on a logarithmic axis
    figure, axis = plt.subplots(figsize=(9, 0.42 * len(order) + 1.4))
    for mode, marker, colour in (("jump_eval", "o", "C0"), ("jump_train", "|", "C1")):
        for height, row in enumerate(reversed(order)):
            values = frame[frame.row == row][mode].clip(lower=floor)
            shift = 0.13 if mode == "jump_eval" else -0.13
            axis.plot(
                values,
                [height + shift] * len(values),
                marker,
                color=colour,
                alpha=0.6,
                ms=6,
                label=mode.removeprefix("jump_") + " mode" if height == 0 else None,
            )
    axis.set_xscale("log")
    axis.set_xlim(floor / 2, None)
    axis.set_yticks(range(len(order)), [name(results, row) for row in reversed(order)])
    axis.set_xlabel("max |change of logits| / max |logits| at a restart (left edge: exactly 0)")
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    axis.grid(axis="x", color="#e4e7eb")
    figure.tight_layout()
    plt.close(figure)
    return figure


def gains(results: Results, published: bool | None = None) -> Figure | None:
    """Paired gains over the control: every seed, mean and 95 % interval; own and published."""
    rows = [row for row in results.rows if results.against(row) != row]
    wanted = [False, True] if published is None else [published]
    found = {(row, source): results.gain(row, source) for row in rows for source in wanted}
    sources = [source for source in wanted if any(found[row, source] for row in rows)]
    if not sources:
        return None
    style()
    figure, axis = plt.subplots(figsize=(9, 0.5 * len(rows) + 1.4))
    looks = {False: ("C0", "this machine", 0.14), True: ("C1", "published", -0.14)}
    for source in sources:
        colour, label, shift = looks[source]
        shift = shift if len(sources) > 1 else 0
        for height, row in enumerate(reversed(rows)):
            gain = found[row, source]
            if gain is None:
                continue
            y = height + shift
            axis.plot(gain.points, [y] * gain.n, ".", color=colour, alpha=0.35, ms=6)
            if gain.n > 1:
                axis.plot([gain.low, gain.high], [y, y], color=colour, lw=2)
            axis.plot(gain.mean, y, "o", color=colour, ms=6, mec="white", label=label)
            label = None
    axis.axvline(0, color=INK, lw=1)
    names = [
        name(results, row) + ("" if results.against(row) == results.control(row) else " *")
        for row in reversed(rows)
    ]
    axis.set_yticks(range(len(rows)), names)
    axis.set_xlabel(
        f"paired gain over the control, points of test {' or '.join(results.metrics)} "
        "(* over the control of its own kind)"
    )
    axis.grid(axis="x", color="#e4e7eb")
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    plt.close(figure)
    return figure
