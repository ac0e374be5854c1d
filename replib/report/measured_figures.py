"""What the trained networks of a table say when they are measured (`measure:` of the table):
figures and tables, every number from a measurement file (replib.experiments.measurements)."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Iterator

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import HTML
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from replib.analysis.kernel_statistics import PARTS, PLACES, STEPS
from replib.analysis.similarity import MEASURES
from replib.analysis.statistics import estimate, paired_gain, statement
from replib.experiments import measurements
from replib.report import catalogue
from replib.report.cycle_figures import finished, looks
from replib.report.figures import name, style
from replib.report.layer_figures import SPREAD, short, spread
from replib.report.page import NONE, escape, filled, relative, table_html
from replib.report.results import Results

WIDEST = 8  # heat maps in a line
MOST = 16  # blocks of which heat maps are drawn, evenly spaced where there are more
MEASURED = {
    "kernels": "cosine of branch kernels",
    "outputs": "cosine of branch outputs",
    "cka": "linear CKA of branch outputs",
}
IN_PAPER = {"overall": "overall", "centre": "central", "surrounding": "surrounding"}  # columns
EIGHT_BITS = {
    "tensor": "one scale a kernel",
    "channel": "one scale an output channel",
    "histogram": "one scale a kernel, ranges of maps by histogram",
    "weights": "one scale a kernel, maps in float32",
}
IN_PAPER_AFTER = {"quantized": "quantized_top1", "ptq": "ptq_top1"}  # `measured` -> column
TRIED = 0.5  # of the paper's spread: with less, networks do not try what it says of it
Shown = Iterator[tuple[str, Figure] | str]  # (what the figure shows, in words; the figure), or HTML


def shown(results: Results) -> HTML:
    """All of it, with where it is from; nothing for a table that asks for no measurement."""
    if results.table.measure is None:
        return HTML("")
    if results.measurement is None:
        command = f"make reproduce-{results.id} PROFILE={results.profile}"
        return HTML(
            "<p>The trained weights are not on this machine, and no measurement of them is "
            f"published. <code>{escape(command)}</code> trains the networks and measures them.</p>"
        )
    style()
    parts = [
        part if isinstance(part, str) else image(*part)
        for part in DRAWN[results.table.measure](results, by_row(results))
    ]
    return HTML("".join(["<h2>What was measured</h2>", *parts, provenance(results)]))


def by_row(results: Results) -> dict[str, list]:
    """row -> what was found, seed by seed; in the table's order."""
    found: dict[str, list] = {}
    for cell, one in zip(results.measurement["cells"], results.measurement["found"], strict=True):
        found.setdefault(cell["row"], []).append(one)
    return {row: found[row] for row in results.rows if row in found}


def image(said: str, figure: Figure) -> str:
    """A figure as HTML, with words for who cannot see it."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110, bbox_inches="tight")
    plt.close(figure)
    data = base64.b64encode(out.getvalue()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{escape(said)}">'


def bold(results: Results, row: str) -> str:
    """The row's label as it stands in a table."""
    return f"<b>{escape(results.table.rows[row].label)}</b>"


def papers(results: Results, row: str, what: str, columns: Iterable[str]) -> list[float] | None:
    """What the paper has in these columns for what is measured of a row, or None.

    Raises: UserError for a number that was not read in its source.
    """
    reference = results.table.rows[row].measured.get(what)
    return reference and [catalogue.number(reference, column) for column in columns]


def line(axis: plt.Axes, at: object, values: list[list[float]], **look) -> None:
    """Means over seeds, a band from the smallest to the largest."""
    values = np.array(values, dtype=float)
    axis.plot(at, values.mean(axis=0), "-", ms=5, lw=1.2, **look)
    axis.fill_between(
        at, values.min(axis=0), values.max(axis=0), color=look["color"], alpha=0.12, lw=0
    )


def brief(block: str) -> str:
    """stage3.0.residual.conv1 -> 3.0.conv1"""
    return short(block).replace(".residual", "").removeprefix("stage")


def beside(axis: plt.Axes) -> None:
    """A legend to the right of a panel, where there is something to name."""
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))


def blocks_of(axis: plt.Axes, blocks: list[str]) -> None:
    """Names of blocks under a panel."""
    axis.set_xticks(range(len(blocks)), [brief(block) for block in blocks], rotation=90)
    axis.set_xlabel("block, from the image to the classifier")


def provenance(results: Results) -> str:
    """Which file the numbers are from, and which networks were measured."""
    measurement, store = results.measurement, results.store
    paths = [measurements.path_of(store, results.id, results.profile, p) for p in (False, True)]
    published = measurements.read(paths[0]) != measurement
    whose = "Published measurement" if published else "Measured on this machine"
    settings = {k: v for k, v in measurement["settings"].items() if k not in ("of", "version")}
    said = "".join(f"; {escape(key)}: {escape(value)}" for key, value in settings.items())
    evidence = store.published_path if published else store.own_path
    lines = [
        [
            f"<code>{escape(cell['key'][:16])}</code>",
            escape(cell["row"]),
            str(cell["seed"]),
            f'<a href="{escape(relative(evidence(cell["key"])))}">evidence</a>',
        ]
        for cell in measurement["cells"]
    ]
    path = paths[published]
    return (
        f"<p><small>{whose}, commit {escape(measurement['context']['commit'])}: "
        f'<a href="{escape(relative(path))}">{escape(path.name)}</a>; '
        f"{escape(measurement['settings']['of'])}{said}; the weights that the protocol selects."
        f"</small></p><details><summary>The {len(lines)} networks that were measured</summary>"
        f"{table_html(['cell', 'row', 'seed', ''], lines)}</details>"
    )


# -- similarity of branches ------------------------------------------------------------------------
def matrices(seeds: list[dict], block: str, measure: str) -> np.ndarray:
    """|similarity| of a block's branches, (seeds, B, B); nan where a branch is zero."""
    return np.abs(np.array([found[block][measure] for found in seeds], dtype=float))


def mean_of(values: np.ndarray, axis: int | None = None) -> np.ndarray:
    """The mean of what is a number; nan where nothing is."""
    known = ~np.isnan(values)
    count = known.sum(axis=axis)
    total = np.where(known, values, 0).sum(axis=axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def off_diagonal(seeds: list[dict], measure: str) -> list[list[float]]:
    """The mean over pairs of different branches: by seed, by block."""
    return [
        [float(mean_of(pairs(matrices([found], block, measure)[0]))) for block in found]
        for found in seeds
    ]


def pairs(matrix: np.ndarray) -> np.ndarray:
    """What stands beside the diagonal."""
    return matrix[~np.eye(len(matrix), dtype=bool)]


def draw_similarity(results: Results, found: dict[str, list]) -> Shown:
    header = ["", *(f"{said}, mean over pairs" for said in MEASURED.values())]
    means = {
        row: [[float(mean_of(np.array(s))) for s in off_diagonal(seeds, m)] for m in MEASURES]
        for row, seeds in found.items()
    }
    lines = [
        [bold(results, row), *(spread(estimate(values)) for values in of_row)]
        for row, of_row in means.items()
    ]
    yield table_html(header, lines, "numbers") + SPREAD
    figure, axes = plt.subplots(len(MEASURES), 1, figsize=(10, 8), sharex=True)
    for measure, axis in zip(MEASURES, axes, strict=True):
        for row, look in looks(list(found)).items():
            values = off_diagonal(found[row], measure)
            line(axis, range(len(values[0])), values, label=name(results, row), **look)
        axis.set_title(MEASURED[measure] + ", mean over pairs", fontsize="medium", loc="left")
        axis.set_ylim(0, None)
    blocks_of(axes[-1], list(next(iter(found.values()))[0]))
    beside(axes[0])
    yield "Similarity of branches by block, a line for each row of the table.", finished(figure)
    for measure, said in MEASURED.items():
        yield f"Heat maps: {said}, every pair, block by block.", heat_maps(results, found, measure)


def heat_maps(results: Results, found: dict[str, list], measure: str) -> Figure:
    """Every pair of branches: a panel for each block, some lines of panels for each row."""
    names = list(next(iter(found.values()))[0])
    picked = np.unique(np.linspace(0, len(names) - 1, min(MOST, len(names))).round().astype(int))
    chunks = [picked[i : i + WIDEST] for i in range(0, len(picked), WIDEST)]
    down, across = len(chunks) * len(found), min(WIDEST, len(picked))
    figure, axes = plt.subplots(
        down, across, figsize=(1.35 * across + 2.2, 1.6 * down), squeeze=False
    )
    for axis in axes.flat:
        axis.set_axis_off()
    for i, (row, seeds) in enumerate(found.items()):
        for j, chunk in enumerate(chunks):
            for k, index in enumerate(chunk):
                axis, block = axes[i * len(chunks) + j, k], list(seeds[0])[index]
                drawn = mean_of(matrices(seeds, block, measure), axis=0)
                picture = axis.imshow(drawn, cmap="viridis", vmin=0, vmax=1)
                axis.set_axis_on()
                axis.set_title(brief(block), fontsize=7)
                branches = seeds[0][block]["branches"]
                axis.set_xticks([])
                axis.set_yticks(range(len(branches)), branches if k == 0 else [], fontsize=6)
        axes[i * len(chunks), 0].text(
            0, 1.35, name(results, row), transform=axes[i * len(chunks), 0].transAxes, fontsize=9
        )
    figure.subplots_adjust(hspace=0.65, wspace=0.12)
    figure.colorbar(picture, ax=axes, label=f"|{MEASURED[measure]}|", shrink=0.7)
    plt.close(figure)
    return figure


# -- slopes of norms -------------------------------------------------------------------------------
def draw_norm_slopes(results: Results, found: dict[str, list]) -> Shown:
    lines = []
    for row, seeds in found.items():
        blocks = list(seeds[0])
        strides = [seeds[0][block]["stride"] for block in blocks]
        branches = list(dict.fromkeys(one for b in blocks for one in seeds[0][b]["slopes"]))
        at = examples(strides)
        figure, axes = plt.subplots(
            1, 1 + len(at), figsize=(12, 3.8), width_ratios=[2] + [1] * len(at)
        )
        for branch, look in looks(branches).items():
            there = [i for i, block in enumerate(blocks) if branch in seeds[0][block]["slopes"]]
            curves = [[one[blocks[i]]["slopes"][branch] for i in there] for one in seeds]
            means = [[np.mean(values) for values in one] for one in curves]
            line(axes[0], there, means, label=branch, **look)
            for axis, index in zip(axes[1:], at, strict=True):
                if index in there:
                    of_block = [one[there.index(index)] for one in curves]
                    at_channels = range(1, len(of_block[0]) + 1)
                    line(axis, at_channels, of_block, color=look["color"], label=branch)
            cells = [means_where(means, [strides[i] > 1 for i in there], kept) for kept in (0, 1)]
            lines.append([bold(results, row), escape(branch), *cells])
        blocks_of(axes[0], blocks)
        axes[0].set_ylabel("mean |slope| of the last norm")
        beside(axes[-1])
        for axis, index in zip(axes[1:], at, strict=True):
            title = f"{brief(blocks[index])}, stride {strides[index]}"
            axis.set_title(title, fontsize="medium", loc="left")
            axis.set_xlabel("channel, by |slope|")
            axis.set_ylim(0, None)
        figure.suptitle(name(results, row), fontsize="medium")
        said = "Mean slopes of the norms by block and branch; sorted slopes of two blocks."
        yield said, finished(figure)
    header = ["", "branch", "mean |slope|, blocks of stride 1", "blocks of larger stride"]
    yield table_html(header, lines, "numbers") + SPREAD


def means_where(means: list[list[float]], strided: list[bool], wanted: bool) -> str:
    """The mean over the blocks of a kind, by seed, as a cell of a table; a dash for none."""
    picked = [[m for m, s in zip(one, strided, strict=True) if s == wanted] for one in means]
    return spread(estimate([float(np.mean(one)) for one in picked])) if picked[0] else NONE


def examples(strides: list[int]) -> list[int]:
    """The middle one of the blocks of larger stride, and the block after it, as in the paper's
    figure (the 9th and the 10th of ResNet-18); without any, the block in the middle."""
    large = [i for i, stride in enumerate(strides) if stride > 1] or [len(strides) // 2]
    first = large[len(large) // 2]
    return [i for i in (first, first + 1) if i < len(strides)]


# -- positions of a kernel -------------------------------------------------------------------------
def draw_magnitudes(results: Results, found: dict[str, list]) -> Shown:
    grids = {row: np.array([one["magnitudes"] for one in seeds]) for row, seeds in found.items()}
    columns = [f"r{i}c{j}" for i in (1, 2, 3) for j in (1, 2, 3)]
    known = {row: papers(results, row, "magnitudes", columns) for row in found}
    theirs = {row: np.reshape(numbers, (3, 3)) for row, numbers in known.items() if numbers}
    down = 1 + bool(theirs)
    figure, axes = plt.subplots(
        down, len(found), figsize=(2.9 * len(found) + 0.8, 2.9 * down + 0.3), squeeze=False
    )
    for axis in axes.flat:
        axis.set_axis_off()
    lines = []
    for i, (row, seeds) in enumerate(grids.items()):
        picture = grid(axes[0, i], seeds.mean(axis=0), name(results, row))
        values = (spread(estimate(column.tolist())) for column in by_place(seeds))
        lines.append([bold(results, row), *values])
        if row in theirs:
            grid(axes[1, i], theirs[row], f"{name(results, row)}: in the paper")
            values = (f"{column[0]:.3g}" for column in by_place(theirs[row][None]))
            lines.append([f"{bold(results, row)}, in the paper", *values])
    figure.colorbar(picture, ax=axes, label="Σ |w|, over the layer's largest", shrink=0.8)
    plt.close(figure)
    yield "Mean magnitude of 3 × 3 kernels by position, a grid for each row of the table.", figure
    header = ["", "centre", "skeleton, mean", "corners, mean", "skeleton over corners"]
    yield table_html(header, lines, "numbers") + SPREAD


def grid(axis: plt.Axes, values: np.ndarray, title: str) -> AxesImage:
    """A kernel's positions as squares, with their numbers."""
    picture = axis.imshow(values, cmap="viridis", vmin=0, vmax=1)
    for (h, w), value in np.ndenumerate(values):
        colour = "black" if value > 0.6 else "white"
        axis.text(w, h, f"{value:.3f}", ha="center", va="center", color=colour)
    axis.set_title(title, fontsize="medium")
    return picture


def by_place(grids: np.ndarray) -> tuple[np.ndarray, ...]:
    """Of grids (n, 3, 3): the centre, the means of the skeleton (which has the centre) and of the
    corners, and the ratio of these means; each (n,)."""
    corners = grids[:, ::2, ::2].mean(axis=(1, 2))
    skeleton = (grids.sum(axis=(1, 2)) - 4 * corners) / 5
    return grids[:, 1, 1], skeleton, corners, skeleton / corners


# -- weights set to zero ---------------------------------------------------------------------------
def draw_sparsity(results: Results, found: dict[str, list]) -> Shown:
    figure, axes = plt.subplots(
        1, len(found), figsize=(3.6 * len(found) + 1.2, 3.4), sharey=True, squeeze=False
    )
    lines = []
    for axis, (row, seeds) in zip(axes[0], found.items(), strict=True):
        cells = []
        for place, look in looks(list(PLACES)).items():
            shares = 100 * np.array([float(share) for share in seeds[0][place]])
            values = 100 * np.array([[np.mean(a) for a in one[place].values()] for one in seeds])
            line(axis, shares, values, label=place, **look)
            cells.append(spread(estimate((values[:, 0] - values[:, 1]).tolist())))
        axis.set_title(name(results, row), fontsize="medium", loc="left")
        axis.set_xlabel("weights set to zero, %")
        lines.append([bold(results, row), spread(estimate(values[:, 0].tolist())), *cells])
    axes[0, 0].set_ylabel("test accuracy, %")
    beside(axes[0, -1])
    yield (
        "Accuracy by the share of weights set to zero, for three places in the kernels.",
        (finished(figure)),
    )
    first = f"{shares[1]:g} %"
    header = [
        "",
        "accuracy, %",
        *(f"lost with {first} at zero, {place}, points" for place in PLACES),
    ]
    yield table_html(header, lines, "numbers") + SPREAD


# -- kernels through a conversion ------------------------------------------------------------------
def draw_conversion(results: Results, found: dict[str, list]) -> Shown:
    figure, axes = plt.subplots(
        len(found), len(PARTS), figsize=(11, 2.5 * len(found)), squeeze=False, sharex="row"
    )
    lines = []
    for line_of, (row, seeds) in zip(axes, found.items(), strict=True):
        example = seeds[0]["example"]
        for axis, part in zip(line_of, PARTS, strict=True):
            for step, look in looks(list(STEPS)).items():
                if step in example["histograms"]:
                    drawn = example["histograms"][step]
                    counts = np.array(drawn["counts"][part], dtype=float)
                    edges = np.linspace(-drawn["limit"], drawn["limit"], len(counts) + 1)
                    density = counts / counts.sum() / np.diff(edges)
                    axis.stairs(density, edges, color=look["color"], label=STEPS[step])
            axis.set_yscale("log")
            axis.set_title(f"{name(results, row)}: {part}", fontsize="small", loc="left")
        line_of[0].set_ylabel("density")
        for step in STEPS:
            spreads = [one["blocks"][example["block"]].get(step) for one in seeds]
            if all(spreads):
                theirs = papers(results, row, step, IN_PAPER.values()) or [None] * len(PARTS)
                values = [spread(estimate([s[part] for s in spreads])) for part in PARTS]
                read = (NONE if value is None else f"{value:g}" for value in theirs)
                pairs_of = (cell for pair in zip(values, read, strict=True) for cell in pair)
                lines.append([bold(results, row), STEPS[step], *pairs_of])
    for axis in axes[-1]:
        axis.set_xlabel("weight")
    beside(axes[0, -1])
    block = escape(brief(example["block"]))
    header = ["", "kernel"]
    for part in PARTS:
        header += [f"deviation, {part}", "in the paper"]
    shown = table_html(*filled(header, lines), "numbers")
    yield f"<p>The kernel of block {block}.</p>{shown}{SPREAD}"
    yield "Histograms of one kernel: all weights, the central ones, those around.", finished(figure)
    figure, axis = plt.subplots(figsize=(9, 3.4))
    for row, look in looks(list(found)).items():
        ratios = [
            [steps["deployed"]["centre"] / steps["deployed"]["surrounding"] for steps in blocks]
            for blocks in (list(one["blocks"].values()) for one in found[row])
        ]
        line(axis, range(len(ratios[0])), ratios, label=name(results, row), **look)
    blocks_of(axis, list(found[row][0]["blocks"]))
    axis.axhline(1, color="#c4cad0", lw=1, zorder=0)
    axis.set_ylabel("deviation in the centre,\nover that around it")
    beside(axis)
    yield "How much more central weights vary than those around them, by block.", finished(figure)


# -- in 8 bits -------------------------------------------------------------------------------------
def draw_quantization(results: Results, found: dict[str, list]) -> Shown:
    seeds: dict[str, list[int]] = {}
    for cell in results.measurement["cells"]:
        seeds.setdefault(cell["row"], []).append(cell["seed"])
    whole = {
        row: dict(zip(seeds[row], of_row, strict=True))
        for row, of_row in found.items()
        if "float" in of_row[0]
    }
    yield accuracies_in_eight_bits(results, whole)
    yield losses_compared(results, whole)
    trained = {row: of_row for row, of_row in found.items() if row not in whole}
    if trained:
        yield trained_for_eight_bits(results, whole, trained, seeds)
    if not whole:
        return
    yield from spreads(results, {row: list(of_row.values()) for row, of_row in whole.items()})


def lost(one: dict, scheme: str) -> float:
    """Points of accuracy that a network loses in 8 bits."""
    return 100 * (one["float"] - one["eight_bits"][scheme])


def accuracies_in_eight_bits(results: Results, whole: dict[str, dict[int, dict]]) -> str:
    """Accuracy before and after, row by row; what the paper has."""
    header, lines = ["", "float32, %", "8 bits, %", "in the paper, %"], []
    header += [f"lost, points: {said}" for said in EIGHT_BITS.values()]
    header += ["images whose class changes, %"]
    for row, of_row in whole.items():
        ones = list(of_row.values())
        values = [[100 * one["float"] for one in ones]]
        values.append([100 * one["eight_bits"]["tensor"] for one in ones])
        cells = [spread(estimate(v)) for v in values]
        known = [
            papers(results, row, what, [column])
            for what, column in IN_PAPER_AFTER.items()
            if what in results.table.rows[row].measured
        ]
        cells.append(f"{known[0][0]:g}" if known else NONE)
        cells += [spread(estimate([lost(one, s) for one in ones])) for s in EIGHT_BITS]
        changed = [100 * (1 - one["same_class"]["tensor"]) for one in ones]
        lines.append([bold(results, row), *cells, spread(estimate(changed))])
    said = "<h3>Quantized after training</h3>"
    return said + table_html(*filled(header, lines), "numbers") + SPREAD


def losses_compared(results: Results, whole: dict[str, dict[int, dict]]) -> str:
    """Whether rows lose less than the one that they are compared with, seed by seed."""
    lines = []
    for row, of_row in whole.items():
        other = results.against(row)
        if other == row or other not in whole:
            continue
        for scheme, said in EIGHT_BITS.items():
            theirs = {seed: lost(one, scheme) for seed, one in whole[other].items()}
            gain = paired_gain(theirs, {seed: lost(one, scheme) for seed, one in of_row.items()})
            if gain is not None:
                told = statement(gain)
                lines.append([bold(results, row), name(results, other), said, told])
    if not lines:
        return ""
    header = ["", "over", "8 bits", "how much less it loses, points"]
    return table_html(header, lines)


def trained_for_eight_bits(
    results: Results,
    whole: dict[str, dict[int, dict]],
    trained: dict[str, list],
    seeds: dict[str, list[int]],
) -> str:
    """Accuracy of networks that went on to train in 8 bits, and of what they began as."""
    header, lines = ["", "8 bits, %", "in the paper, %", "lost by the float32 network, points"], []
    for row, of_row in trained.items():
        values = [100 * one["eight_bits"][measurements.TRAINED] for one in of_row]
        known = papers(results, row, "qat", ["qat_top1"])
        start = whole.get(results.table.rows[row].start, {})
        gaps = [
            100 * start[seed]["float"] - value
            for seed, value in zip(seeds[row], values, strict=True)
            if seed in start
        ]
        cells = [spread(estimate(values)), f"{known[0]:g}" if known else NONE]
        lines.append([bold(results, row), *cells, spread(estimate(gaps)) if gaps else NONE])
    said = "<h3>Trained for 8 bits</h3>"
    return said + table_html(*filled(header, lines), "numbers") + SPREAD


def deviations(one: dict, step: str = "deployed") -> list[float]:
    """Of every kernel: the deviation in its centre, over that around it."""
    blocks = one["conversion"]["blocks"].values()
    return [steps[step]["centre"] / steps[step]["surrounding"] for steps in blocks]


def spreads(results: Results, found: dict[str, list]) -> Shown:
    """How even kernels and maps are, which is what 8 bits ask for; by row, and by layer."""
    columns = {"weight_peak": "largest |weight| over the deviation"}
    columns |= {"output_peak": "largest |output| over the deviation"}
    header = ["", "deviation of one kernel", "in the paper", "centre over around, median"]
    header += [f"{said}, {which}" for said in columns.values() for which in ("median", "largest")]
    lines = []
    for row, ones in found.items():
        block = ones[0]["conversion"]["example"]["block"]
        one_kernel = [one["conversion"]["blocks"][block]["deployed"]["overall"] for one in ones]
        theirs = papers(results, row, "spread", ["param_std"])
        cells = [spread(estimate(one_kernel)), f"{theirs[0]:g}" if theirs else NONE]
        cells.append(spread(estimate([float(np.median(deviations(one))) for one in ones])))
        for column in columns:
            by_seed = [[layer[column] for layer in one["after"]] for one in ones]
            for of in (np.median, np.max):
                cells.append(spread(estimate([float(of(values)) for values in by_seed])))
        lines.append([bold(results, row), *cells])
    yield "<h3>How even they are</h3>" + table_html(*filled(header, lines), "numbers") + SPREAD
    yield tried(results, found)
    figure, axes = plt.subplots(2, 1, figsize=(9, 5.6), sharex=True)
    for axis, (column, said) in zip(axes, columns.items(), strict=True):
        for row, look in looks(list(found)).items():
            values = [[layer[column] for layer in one["after"]] for one in found[row]]
            line(axis, range(len(values[0])), values, label=name(results, row), **look)
        axis.set_title(f"{said}, deployed", fontsize="medium", loc="left")
        axis.set_ylim(0, None)
    blocks_of(axes[-1], [layer["layer"] for layer in next(iter(found.values()))[0]["after"]])
    beside(axes[0])
    yield (
        "How far the largest weight and the largest output stand out, layer by layer.",
        finished(figure),
    )
    yield (
        "Largest weight of every branch and of their sum, layer by layer.",
        branches_drawn(results, found),
    )


def tried(results: Results, found: dict[str, list]) -> str:
    """Whether kernels that were added up deviate more here than those that never were, as in the
    paper; by rule. Of rows that name what the paper has of their spread."""
    control, rows = results.table.control, results.table.rows
    others = [row for row in found if "spread" in rows[row].measured and row != control]
    if control not in found or not others:
        return ""

    def paper(row: str) -> float:
        return papers(results, row, "spread", ["param_std"])[0]

    def ours(row: str) -> np.ndarray:
        kernels = [
            [steps["deployed"]["overall"] for steps in one["conversion"]["blocks"].values()]
            for one in found[row]
        ]
        return np.mean(kernels, axis=0)

    told = []
    for row in others:
        theirs = paper(control) / paper(row)
        here = float(np.median(ours(control) / ours(row)))
        one, other = name(results, control), name(results, row)
        said = (
            f"In the paper the weights of one kernel of {one} deviate {theirs:.3g} times as much "
            f"as those of {other}; here {here:.3g} times (median over kernels, mean over seeds). "
        )
        if here < TRIED * theirs:
            said += f"That is less than {TRIED:g} of the paper's: its claim is not tried here."
        else:
            said += "That is a spread as the paper speaks of: its claim is tried here."
        told.append(f"<p>{escape(said)}</p>")
    return "".join(told)


def branches_drawn(results: Results, found: dict[str, list]) -> Figure:
    """The largest |weight| of every part of a block before fusing, and of the deployed kernel."""
    shown = [row for row, ones in found.items() if parts_of(ones[0]["before"])] or list(found)
    figure, axes = plt.subplots(len(shown), 1, figsize=(9, 2.3 * len(shown)), squeeze=False)
    for axis, row in zip(axes[:, 0], shown, strict=True):
        before = found[row][0]["before"]
        layers = list(dict.fromkeys(one["layer"] for one in before))
        for part, look in looks(["", *parts_of(before), "sum"]).items():
            there = [one for one in before if one["part"] == part]
            at = [layers.index(one["layer"]) for one in there]
            values = [[max(-one["weight_min"], one["weight_max"]) for one in there]]
            if there:
                line(axis, at, values, label=part or "no block", **look)
        axis.set_yscale("log")
        axis.set_title(f"{name(results, row)}: largest |weight|", fontsize="small", loc="left")
        beside(axis)
    blocks_of(axes[-1, 0], layers)
    return finished(figure)


def parts_of(before: list[dict]) -> list[str]:
    """The names of branches in blocks that have several."""
    names: dict[str, list[str]] = {}
    for one in before:
        if one["part"] not in ("", "sum"):
            names.setdefault(one["layer"], []).append(one["part"])
    return list(dict.fromkeys(n for parts in names.values() if len(parts) > 1 for n in parts))


DRAWN: dict[str, Callable[[Results, dict], Shown]] = {
    "similarity": draw_similarity,
    "norm_slopes": draw_norm_slopes,
    "magnitudes": draw_magnitudes,
    "sparsity": draw_sparsity,
    "conversion": draw_conversion,
    "quantization": draw_quantization,
}
