"""The page of latency and size: measurements in, tables and figures out, nothing else known.

A number is shown as <data value="...">, its value as it is in the file.
"""

from __future__ import annotations

from collections.abc import Iterator

import matplotlib.pyplot as plt
from IPython.display import HTML
from matplotlib.figure import Figure

from replib.benchmark import running
from replib.benchmark.latency import LATENCY, TRAINING
from replib.report.bench import Measured, agrees, shown, with_spread
from replib.report.figures import style
from replib.report.page import NONE, escape, table_html

SIZES = {  # key of `replib.benchmark.latency.size` -> (heading, unit)
    "kernels": ("convolutions", 1),
    "norms": ("norms", 1),
    "parameters": ("parameters, 10⁶", 1e6),
    "statistics": ("statistics of norms, 10³", 1e3),
    "flops": ("operations of one image, 10⁹", 1e9),
    "bytes": ("numbers, MiB", 2**20),
}


class Latency(Measured):
    """The parts of the page, for a notebook: `Latency()`."""

    stem, command = "latency", "make latency"

    def times(self) -> HTML:
        """Milliseconds of every form, network by network."""
        return self.per_measurement(
            lambda m: "".join(time_table(case, result) for case, result in results(m))
        )

    def sizes(self) -> HTML:
        """What is counted: of each network once, whatever it was measured on."""
        found = {(case, shape(r)): r for m in self.measurements.values() for case, r in results(m)}
        return HTML("".join(size_table(case, result) for (case, _), result in found.items()))

    def figures(self) -> list[Figure]:
        """How much faster than the training form each form is, a figure for each measurement."""
        found = {name: list(results(m)) for name, m in self.measurements.items()}
        return [figure(name, cases) for name, cases in found.items() if cases]

    def rest(self) -> HTML:
        """What failed, was left out or did not fit into the time."""
        return self.per_measurement(unfinished)


def results(measurement: dict) -> Iterator[tuple[str, dict]]:
    """(id, result) of finished cases, in the order of the declaration."""
    for case in LATENCY:
        entry = measurement["cases"].get(case)
        if entry and entry["status"] == running.DONE:
            yield case, entry["result"]


def shape(result: dict) -> tuple:
    """What tells the same network at another size of images from this one."""
    return tuple(result["sizes"][TRAINING].values())


def time_table(case: str, result: dict) -> str:
    """A line for every form: at every batch milliseconds, and over the training form."""
    ways = {(way["form"], way["batch"]): way for way in result["ways"]}
    over = {line["over"]: line for line in result["ratios"]}
    checks = {row["way"]: row for row in result["agreement"]}
    batches = sorted({batch for _, batch in ways})
    lines = []
    for form in dict.fromkeys(form for form, _ in ways):
        cells = [escape(form)]
        for batch in batches:
            way = ways[form, batch]
            cells += [with_spread(way["milliseconds"]), with_spread(over.get(way["way"]))]
        last = ways[form, batches[-1]]
        seconds = last["milliseconds"]["median"] / 1000
        cells.append(shown(batches[-1] / seconds))
        size = last["file_bytes"]
        cells.append(NONE if size is None else shown(size / 2**20))
        cells += [shown(last["first_call_seconds"]), agrees(checks[last["way"]])]
        lines.append(cells)
    header = [""]
    for batch in batches:
        images = "1 image" if batch == 1 else f"{batch} images"
        header += [f"{images}, ms", "times faster"]
    header += ["images a second", "file, MiB", "first call, s", "differs from float64 by"]
    left = "".join(
        f"<p><small>Left out: {escape(form)}: {escape(reason)}.</small></p>"
        for form, reason in result["left_out"].items()
    )
    return f"<p><b>{escape(title(case))}</b></p>{table_html(header, lines, 'numbers')}{left}"


def size_table(case: str, result: dict) -> str:
    """Both states of a network, and the one over the other."""
    before, after = result["sizes"][TRAINING], result["sizes"]["fused"]
    lines = [
        [escape(form), *(shown(sizes[key] / unit) for key, (_, unit) in SIZES.items())]
        for form, sizes in result["sizes"].items()
    ]
    ratios = [shown(before[key] / after[key]) if after[key] else NONE for key in SIZES]
    lines.append(["times less", *ratios])
    header = ["", *(heading for heading, _ in SIZES.values())]
    return f"<p><b>{escape(title(case))}</b></p>{table_html(header, lines, 'numbers')}"


def title(case: str) -> str:
    return LATENCY[case].title


def figure(name: str, cases: list[tuple[str, dict]]) -> Figure:
    """Times faster than the training form: a row of dots for each network and form."""
    style()
    rows = {}
    for case, result in cases:
        batches = {way["way"]: (way["form"], way["batch"]) for way in result["ways"]}
        for line in result["ratios"]:
            form, batch = batches[line["over"]]
            rows.setdefault(f"{title(case)}\n{form}", {})[batch] = line
    made, axis = plt.subplots(figsize=(7, 0.6 + 0.5 * len(rows)))
    for place, found in enumerate(rows.values()):
        for i, (batch, line) in enumerate(sorted(found.items())):
            label = ("1 image" if batch == 1 else f"{batch} images") if place == 0 else None
            y = place + 0.2 * (i - 0.5)
            axis.plot([line["low"], line["high"]], [y, y], color=f"C{i}", lw=2)
            axis.plot(line["median"], y, "o", color=f"C{i}", ms=5, label=label)
    axis.axvline(1, color="#7b8794", lw=1)
    axis.set_xscale("log")
    axis.set_yticks(range(len(rows)), rows, fontsize="x-small")
    axis.invert_yaxis()
    axis.set_xlabel("times faster than the training form (median and quartiles)")
    axis.legend(frameon=False, fontsize="x-small")
    axis.set_title(name, fontsize="small")
    made.tight_layout()
    plt.close(made)
    return made


def unfinished(measurement: dict) -> str:
    """Cases without a result, with the reason."""
    tier, lines = measurement["settings"]["tier"], []
    for name, case in LATENCY.items():
        entry = measurement["cases"].get(name)
        if tier in case.seconds and (entry is None or entry["status"] != running.DONE):
            said = ("not run", "") if entry is None else (entry["status"], entry["reason"])
            lines.append([escape(case.title), *map(escape, said)])
    return table_html(["", "", "reason"], lines) if lines else ""
