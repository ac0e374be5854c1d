"""The page of speed and memory: measurements in, tables and figures out, nothing else known.

A number is shown as <data value="...">, its value as it is in the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from IPython.display import HTML, Markdown
from matplotlib.figure import Figure

from replib.benchmark import running
from replib.benchmark.cases import CASES
from replib.benchmark.subjects import BRANCHES, Way
from replib.benchmark.targets import MET, MISSED, TARGETS, Verdict, judged, line_of
from replib.blocks import BLOCKS
from replib.experiments.store import home
from replib.report.figures import style
from replib.report.page import NONE, escape, table_html

BUSY = 0.2  # processor cores at work elsewhere, from which a measurement is not a quiet one
SERIES = {BRANCHES: ("--", 0.6), "shared": ("-", 1.0)}  # line, opacity


def measurements(folder: Path | None = None, stem: str = "bench") -> dict[str, dict]:
    """All measurements of speed in a folder, by device; by default the published ones."""
    folder = folder or home() / "reports" / "measurements"
    found = map(running.read, sorted(folder.glob(f"{stem}-*.json")))
    return {device_name(measurement): measurement for measurement in found}


def device_name(measurement: dict) -> str:
    """The GPU, or the processor with its cores; and the tier, where it is not the device's."""
    context, settings = measurement["context"], measurement["settings"]
    name = context["device"]
    if name == "cpu":
        name = f"{context['processor']}, threads: {settings['threads']}"
    return name if settings["tier"] != "quick" else f"{name} (quick tier)"


# -- numbers --------------------------------------------------------------------------------------
def shown(value: float | None) -> str:
    """Three significant digits, or all before the point; a dash for None."""
    if value is None:
        return NONE
    text = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f'<data value="{value!r}">{text}</data>'


def with_spread(line: dict | None) -> str:
    """median, and the quartiles where there are any."""
    if line is None or "median" not in line:
        return NONE
    text = shown(line["median"])
    if line.get("low") is None:
        return text
    quartiles = f"{shown(line['low'])} to {shown(line['high'])}"
    return f'{text} <small class="whole">{quartiles}</small>'


def agrees(row: dict | None) -> str:
    """The largest error of a way, and whether it is rounding."""
    if row is None:
        return NONE
    parts = ", ".join(f"{part} {shown(error)}" for part, error in row["errors"].items())
    return f"<small>{'' if row['equal'] else 'NOT EQUAL: '}{parts}</small>"


# -- parts of the page ----------------------------------------------------------------------------
class Measured:
    """The parts of a page of measurements that every such page has.

    stem: how the names of the files begin; command: what makes them.
    """

    stem: str
    command: str

    def __init__(self, folder: Path | None = None):
        self.measurements = measurements(folder, self.stem)

    def per_measurement(self, part: Callable[[dict], str]) -> HTML:
        """A part of the page for every measurement that has it."""
        found = {name: part(m) for name, m in self.measurements.items()}
        pieces = [f"<h3>{escape(name)}</h3>{text}" for name, text in found.items() if text]
        return HTML("".join(pieces) or f"<p>Not measured: <code>{self.command}</code>.</p>")

    def provenance(self) -> HTML:
        """Where the numbers come from, and what may be wrong with them."""
        return self.per_measurement(provenance)


class Bench(Measured):
    """The parts of the page, for a notebook: `Bench()`."""

    stem, command = "bench", "make bench"

    def targets(self) -> HTML:
        """Every target: met, missed, or why there is no verdict."""
        lines = []
        for target in TARGETS:
            here = {n: m for n, m in self.measurements.items() if m["settings"]["tier"] != "quick"}
            here = {n: m for n, m in here.items() if m["settings"]["tier"] == target.device} or here
            here = here or {"": {"cases": {}, "settings": {"tier": "cpu"}}}
            verdicts = {name: judged(target, m) for name, m in here.items()}
            found = {name: v for name, v in verdicts.items() if v.found} or verdicts
            lines += [target_line(v, name if v.found else "") for name, v in found.items()]
        header = ["target", "wanted", "found", "verdict", "measured on"]
        return HTML(table_html(header, lines, "numbers"))

    def profiles(self) -> HTML:
        """Where the time goes in the cases of missed targets."""
        return self.per_measurement(missed_profiles)

    def families(self, body: str) -> HTML:
        """All families of blocks on one body ("a1" or "resnet18"): shared and branch by branch."""
        return self.per_measurement(lambda m: family_table(m, body))

    def cases(self, *names: str) -> HTML:
        """Tables of cases; NAME/ stands for all below it."""
        return self.per_measurement(lambda m: case_tables(m, names))

    def growth(self) -> list[Figure]:
        """Time and memory over width, depth, branches, batch, for every measurement."""
        return figures(self.measurements, "growth/")

    def slopes(self) -> HTML:
        """The slopes of these lines."""
        return self.per_measurement(slope_table)

    def crossover(self) -> list[Figure]:
        """OREPA against DBB over batches."""
        return figures(self.measurements, "crossover")

    def rest(self) -> HTML:
        """What failed, was left out or did not fit into the time."""
        return self.per_measurement(unfinished)

    def notes(self) -> Markdown:
        """What was tried."""
        path = home() / "benchmarks" / "NOTES.md"
        text = path.read_text(encoding="utf-8") if path.is_file() else "There are none here."
        return Markdown(text.replace("\n# ", "\n## ").removeprefix("# Notes\n"))


def target_line(verdict: Verdict, name: str) -> list[str]:
    target, found = verdict.target, verdict.found
    wanted = f"{'at least' if target.sign == '>=' else 'at most'} {target.bound:.3g} {target.unit}"
    number = NONE
    if found is not None:
        line = {"median": found.value, "low": found.low, "high": found.high}
        number = f"{with_spread(line)}<br><small>{escape(found.by)}</small>"
    text = escape(verdict.text)
    if verdict.text in (MET, MISSED):
        inside = found.low is not None and found.low <= target.bound <= found.high
        text = f"<b>{text}</b>" + (", within the spread" if inside else "")
    return [escape(target.text), escape(wanted), number, text, escape(name)]


def entries(measurement: dict, *names: str) -> Iterable[tuple[str, dict]]:
    """(id, entry) of finished cases, in the order of the declaration."""
    for case in CASES:
        entry = measurement["cases"].get(case)
        if entry and entry["status"] == running.DONE:
            if not names or any(running.matches(case, name) for name in names):
                yield case, entry


def provenance(measurement: dict) -> str:
    """Device, software, commits; warnings about how it was measured."""
    context, cases = measurement["context"], measurement["cases"]
    commits = ", ".join(sorted({entry["commit"] for entry in cases.values()}))
    software = ", ".join(f"{k} {v}" for k, v in context["libraries"].items())
    finished = max((entry["finished"] for entry in cases.values()), default=NONE)
    seconds = sum(entry.get("seconds") or 0 for entry in cases.values())
    lines = [
        ["commit", escape(commits)],
        ["software", escape(f"{software}, Python {context['python']}, {context['system']}")],
        ["processor", f"{escape(context['processor'])}, cores: {shown(context['cores'])}"],
        ["float32 convolutions", escape(context.get("float32 convolutions", NONE))],
        ["threads of a case", shown(measurement["settings"]["threads"])],
        ["last case finished", escape(finished)],
        ["minutes, all cases", f'<data value="{seconds!r}">{seconds / 60:.1f}</data>'],
    ]
    text = table_html(["", ""], lines)
    busy = [e["elsewhere"] for e in cases.values() if (e.get("elsewhere") or 0) > BUSY]
    if busy:
        text += (
            f'<p class="warning">The machine was not quiet: during {len(busy)} of {len(cases)} '
            f"cases other work kept up to {shown(max(busy))} cores busy.</p>"
        )
    if len({entry["code"] for entry in cases.values()}) > 1:
        text += '<p class="warning">The cases were measured with several versions of the code.</p>'
    if measurement["settings"]["tier"] == "quick":
        text += (
            '<p class="warning">The quick tier: tiny networks, which show that everything '
            "runs and say nothing about speed.</p>"
        )
    return text


def case_tables(measurement: dict, names: Sequence[str]) -> str:
    """A table for each of these cases."""
    return "".join(
        f"<p><b>{escape(CASES[case].title)}</b></p>{case_table(entry['result'])}"
        for case, entry in entries(measurement, *names)
    )


def case_table(result: dict) -> str:
    """Ways, ratios, numbers and what was left out, of any case."""
    parts, checks = [], {row["way"]: row for row in result.get("agreement", [])}
    ways = result.get("ways", [])
    columns = {
        "milliseconds": lambda w: with_spread(w.get("milliseconds")),
        "saved, MiB": lambda w: shown(w.get("saved_mib")),
        "peak, MiB": lambda w: shown(w.get("peak_mib")),
        "moved at least, MiB": lambda w: shown(w.get("least_mib")),
        "GFLOP": lambda w: shown(w.get("gflop")),
        "first step, s": lambda w: shown(w.get("first_step_seconds")),
        "differs from the float64 reference by": lambda w: agrees(checks.pop(w["way"], None)),
    }
    if ways:
        names = [escape(w["way"]) + f"<br><small>{escape(w.get('note', ''))}</small>" for w in ways]
        lines = [
            [name, *(column(w) for column in columns.values())]
            for name, w in zip(names, ways, strict=True)
        ]
        keep = [0] + [i for i in range(1, len(lines[0])) if any(li[i] != NONE for li in lines)]
        header = ["", *columns]
        parts.append(
            table_html(
                [header[i] for i in keep], [[li[i] for i in keep] for li in lines], "numbers"
            )
        )
    parts.append(ratio_table(result))
    if numbers := result.get("numbers"):
        lines = [[escape(name), with_spread(line)] for name, line in numbers.items()]
        parts.append(table_html(["", "median, quartiles"], lines, "numbers"))
    rest = [[escape(name), agrees(row)] for name, row in checks.items()]
    if rest:
        inner = table_html(["", "differs from its reference by"], rest, "numbers")
        parts.append(f"<details><summary>Agreement: {len(rest)} checks</summary>{inner}</details>")
    for name, reason in result.get("left_out", {}).items():
        parts.append(f"<p><small>Left out: {escape(name)}: {escape(reason)}.</small></p>")
    return "".join(parts)


def ratio_table(result: dict) -> str:
    """Time, memory and throughput of pairs of ways."""
    pairs: dict[tuple[str, str], dict[str, dict]] = {}
    for line in result.get("ratios", []):
        pairs.setdefault((line["of"], line["over"]), {})[line["what"]] = line
    if not pairs:
        return ""
    kinds = [k for k in ("time", "saved", "throughput") if any(k in p for p in pairs.values())]
    lines = []
    for (of, over), found in pairs.items():
        cells = [with_spread(found.get(k)) for k in kinds]
        refused = [line["refused"] for line in found.values() if "refused" in line]
        if refused:
            cells = [f"refused: {escape('; '.join(refused))}", *[""] * (len(kinds) - 1)]
        lines.append([f"{escape(of)}<br><small>over {escape(over)}</small>", *cells])
    names = {"time": "times the time", "saved": "times the saved memory"}
    return table_html(["", *(names.get(k, f"times the {k}") for k in kinds)], lines, "numbers")


def family_table(measurement: dict, body: str) -> str:
    """One line per family: branch by branch and shared, channels last."""
    lines = []
    for case, entry in entries(measurement, f"{body}/"):
        result, name = entry["result"], case.split("/")[1]
        if name not in BLOCKS:
            continue
        before, after = Way(name, BRANCHES).name, Way(name).name
        ways = {way["way"]: way for way in result["ways"]}
        checks = {row["way"]: row for row in result["agreement"]}
        refused = [r["refused"] for r in result["ratios"] if "refused" in r]
        cells = [with_spread(ways.get(w, {}).get("milliseconds")) for w in (before, after)]
        cells.append(with_spread(line_of(result, before, after, "time")))
        cells += [shown(ways.get(w, {}).get("saved_mib")) for w in (before, after)]
        cells.append(with_spread(line_of(result, before, after, "saved")))
        if body == "resnet18":
            plain = "plain, channels last"
            cells.append(with_spread(line_of(result, after, plain, "time")))
        cells.append(escape("; ".join(refused)) if refused else agrees(checks[after]))
        lines.append([f"<b>{escape(name)}</b>", *cells])
    header = ["", "branch by branch, ms", "shared, ms", "times faster", "saved, MiB"]
    header += ["shared, MiB", "times less"] + ["over plain, time"] * (body == "resnet18")
    header.append("shared differs by")
    return table_html(header, lines, "numbers") if lines else ""


def slope_table(measurement: dict) -> str:
    """Slopes on logarithmic axes: 1 is proportional, 0 constant."""
    lines = []
    for case, entry in entries(measurement, "growth/", "crossover"):
        for line in entry["result"]["slopes"]:
            if line["what"] == "time":
                same = (
                    s
                    for s in entry["result"]["slopes"]
                    if s["series"] == line["series"] and s["what"] == "saved"
                )
                cells = [with_spread(line), with_spread(next(same, None))]
                lines.append([escape(CASES[case].title), escape(line["series"]), *cells])
    header = ["", "", "slope of the time", "slope of the saved memory"]
    return table_html(header, lines, "numbers") if lines else ""


def missed_profiles(measurement: dict) -> str:
    """The operators of the cases in which a target was missed."""
    cases: dict[str, None] = {}
    for target in TARGETS:
        verdict = judged(target, measurement)
        if verdict.text == MISSED:
            own = [case for case in target.cases if case.endswith(f"/{verdict.found.by}")]
            cases |= dict.fromkeys(own or target.cases)
    parts = []
    for case in cases:
        result = measurement["cases"][case]["result"]
        for way, rows in result.get("profiles", {}).items():
            lines = [
                [escape(r["operator"]), *(shown(r[k]) for k in ("calls", "milliseconds", "share"))]
                for r in rows
            ]
            header = ["operator", "calls", "milliseconds", "share of the time"]
            table = table_html(header, lines, "numbers")
            said = f"<p>{limit(result, way)}</p>"
            parts.append(f"<details open><summary>{escape(way)}</summary>{said}{table}</details>")
    return "".join(parts)


def limit(result: dict, way: str) -> str:
    """In words, as HTML: how much faster than the first way this one could be."""
    found = result.get("limits", {}).get(way)
    if found is None:
        return ""
    milliseconds, times = shown(found["products_ms"]), shown(found["times"])
    return (
        f"Convolutions and matrix products take {milliseconds} ms of it. Were all else free, it "
        f"would be {times} times as fast as {escape(found['over'])}: the limit without faster "
        "convolutions."
    )


def unfinished(measurement: dict) -> str:
    """Cases without a result, with the reason."""
    tier, lines = measurement["settings"]["tier"], []
    for name, case in CASES.items():
        entry = measurement["cases"].get(name)
        if tier in case.seconds and (entry is None or entry["status"] != running.DONE):
            said = ("not run", "") if entry is None else (entry["status"], entry["reason"])
            lines.append([f"<code>{escape(name)}</code>", escape(case.title), *map(escape, said)])
    return table_html(["case", "", "", "reason"], lines) if lines else ""


# -- figures --------------------------------------------------------------------------------------
def figures(measurements: dict[str, dict], case: str) -> list[Figure]:
    """A figure for every measurement that has such cases."""
    made = []
    for name, measurement in measurements.items():
        results = [entry["result"] for _, entry in entries(measurement, case)]
        if results:
            made.append(growth_figure(name, results))
    return made


def growth_figure(name: str, results: Sequence[dict]) -> Figure:
    """Time above, saved memory below, a column per axis; dashed: branch by branch."""
    style()
    figure, axes = plt.subplots(
        2, len(results), figsize=(max(3.1 * len(results), 6), 6), sharex="col", squeeze=False
    )
    for column, result in zip(axes.T, results, strict=True):
        networks = dict.fromkeys(point["series"].split(", ")[0] for point in result["points"])
        colours = {network: f"C{i}" for i, network in enumerate(networks)}
        for series in dict.fromkeys(point["series"] for point in result["points"]):
            network, _, form = series.partition(", ")
            dash, opacity = SERIES.get(form, ("-", 1.0))
            points = [point for point in result["points"] if point["series"] == series]
            xs = [point["x"] for point in points]
            look = {"color": colours[network], "alpha": opacity, "marker": "o", "ms": 4}
            times = [point["milliseconds"] for point in points]
            column[0].plot(xs, [t["median"] for t in times], dash, label=series, **look)
            column[0].fill_between(
                xs, [t["low"] for t in times], [t["high"] for t in times],
                color=colours[network], alpha=0.15, lw=0,
            )  # fmt: skip
            column[1].plot(xs, [point["saved_mib"] for point in points], dash, **look)
        for axis in column:
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.grid(axis="y", color="#e4e7eb")
        column[1].set_xlabel(result["axis"])
        ticks = sorted({point["x"] for point in result["points"]})
        column[1].set_xticks(ticks, ticks)
        column[0].legend(frameon=False, fontsize="x-small")
    axes[0, 0].set_ylabel("step, milliseconds")
    axes[1, 0].set_ylabel("saved, MiB")
    figure.suptitle(name, fontsize="small")
    figure.tight_layout()
    plt.close(figure)
    return figure
