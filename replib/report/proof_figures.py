"""What the notebook on precision shows: measurements in, figures and lists out."""

from __future__ import annotations

from html import escape

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import HTML
from matplotlib.figure import Figure

from replib.analysis import precision
from replib.experiments.store import home
from replib.report.figures import INK, style

LOOKS = {  # way -> colour of the colour-blind palette, line, marker
    "branches": (0, "-", "o"),
    "merged": (1, "-", "s"),
    "merged on the device": (2, ":", "^"),
    "merged in its precision": (3, "--", "D"),
    "nudged input": (7, ":", ""),
}


def published_precision() -> dict[str, dict]:
    """The published measurements of precision by their device's name."""
    paths = sorted((home() / "reports" / "measurements").glob("precision-*.json"))
    return {device_name(m): m for m in map(precision.read, paths)}


def device_name(measurement: dict) -> str:
    """The GPU's name, or the processor's."""
    context = measurement["context"]
    return context["processor"] if context["device"] == "cpu" else context["device"]


def said(measurement: dict) -> HTML:
    """The statements of a measurement, as a list."""
    items = "".join(f"<li>{escape(text)}</li>" for text in precision.statements(measurement))
    return HTML(f"<ul>{items}</ul>")


def published() -> HTML:
    """The statements of every published measurement, with its device and commit."""
    parts = []
    for name, measurement in published_precision().items():
        commit = measurement["context"]["commit"]
        parts.append(f"<p><b>{escape(name)}</b>, commit {escape(commit)}:</p>")
        parts.append(said(measurement).data)
    return HTML("".join(parts) or "<p>None.</p>")


def columns(measurements: list[dict]) -> list[str]:
    """The precisions that were measured, in their order."""
    seen = {row["precision"] for m in measurements for row in m["rows"]}
    return [name for name in precision.PRECISIONS if name in seen]


def lines(measurement: dict, name: str, way: str) -> np.ndarray:
    """Errors in units of the roundoff, (networks, depths); nan where the range was left."""
    found = [
        row["error"] for row in measurement["rows"] if (row["precision"], row["way"]) == (name, way)
    ]
    return np.array(found, dtype=float) / precision.PRECISIONS[name][1]


def precision_by_depth(measurements: dict[str, dict]) -> Figure:
    """Error against depth: a row per device, a column per precision, a line per way.

    Lines are medians over all networks, bands hold their middle half.
    """
    style()
    names = columns(list(measurements.values()))
    figure, axes = plt.subplots(
        len(measurements),
        len(names),
        figsize=(2.7 * len(names), 2.9 * len(measurements) + 0.9),
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    for row, (device, measurement) in zip(axes, measurements.items(), strict=True):
        depths = measurement["rows"][0]["depth"]
        for axis, name in zip(row, names, strict=True):
            for way, (colour, dash, marker) in LOOKS.items():
                found = lines(measurement, name, way)
                if not found.size or not found.any():  # not measured, or the reference itself
                    continue
                low, middle, high = np.nanquantile(found, (0.25, 0.5, 0.75), axis=0)
                axis.plot(depths, middle, dash, marker=marker, color=f"C{colour}", ms=4, label=way)
                axis.fill_between(depths, low, high, color=f"C{colour}", alpha=0.15, lw=0)
            axis.axhline(1, color=INK, lw=0.8)
            axis.set_yscale("log")
            # Linear in depth: growth by a constant factor per block is a straight line.
            spread = [d if d == 1 or 4 * d >= depths[-1] else "" for d in depths]
            axis.set_xticks(depths, spread)
            axis.grid(axis="y", color="#e4e7eb")
        row[0].set_ylabel(f"{device}\nerror, in units of u")
    for axis, name in zip(axes[0], names, strict=True):
        axis.set_title(f"{name}\nu = {precision.PRECISIONS[name][1]:.1e}", fontsize="medium")
    for axis in axes[-1]:
        axis.set_xlabel("blocks")
    labelled = {
        label: handle
        for axis in axes.flat
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    shown = [way for way in LOOKS if way in labelled]
    figure.legend(
        [labelled[way] for way in shown],
        shown,
        frameon=False,
        loc="lower center",
        ncols=len(shown),
        fontsize="small",
    )
    figure.tight_layout(rect=(0, 0.25 / figure.get_figheight(), 1, 1))
    plt.close(figure)
    return figure


def precision_by_family(measurement: dict) -> Figure:
    """The error of one block (of the smallest depth) by family: a panel per precision.

    A dot is the median over the family's networks, a line their range.
    """
    style()
    names = columns([measurement])
    sizes = {row["family"]: row["kernel_size"] for row in measurement["rows"]}
    families = sorted(sizes, reverse=True)
    figure, axes = plt.subplots(
        1,
        len(names),
        figsize=(2.2 * len(names) + 1.8, 0.33 * len(families) + 1.7),
        sharey=True,
        squeeze=False,
    )
    ways = [way for way in LOOKS if way != "nudged input"]
    for axis, name in zip(axes[0], names, strict=True):
        for place, way in enumerate(ways):
            colour, _, marker = LOOKS[way]
            shift = 0.18 * (1.5 - place)
            for height, family in enumerate(families):
                part = {"rows": [r for r in measurement["rows"] if r["family"] == family]}
                found = lines(part, name, way)
                if not found.size or not found.any():
                    continue
                first = found[:, 0]
                axis.plot([first.min(), first.max()], [height + shift] * 2, color=f"C{colour}")
                label = way if height == 0 else None
                axis.plot(
                    np.median(first), height + shift, marker, color=f"C{colour}", ms=5, label=label
                )
        axis.axvline(1, color=INK, lw=0.8)
        axis.set_xlim(0, None)
        axis.set_title(name, fontsize="medium")
        axis.set_xlabel("error, in units of u")
        axis.set_yticks(range(len(families)), [f"{f}, {sizes[f]}×{sizes[f]}" for f in families])
        for height in range(len(families) - 1):
            axis.axhline(height + 0.5, color="#e4e7eb", lw=0.8)
        axis.tick_params(axis="y", length=0)
    handles, labels = axes[0, -1].get_legend_handles_labels()
    figure.legend(
        handles, labels, frameon=False, loc="lower center", ncols=len(labels), fontsize="small"
    )
    figure.tight_layout(rect=(0, 0.25 / figure.get_figheight(), 1, 1))
    plt.close(figure)
    return figure
