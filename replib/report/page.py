"""What a notebook shows: the parts of a page, as HTML in which every value is escaped."""

from __future__ import annotations

import html
import math
import os
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import UnionType

import pandas as pd
import torch
from IPython.display import HTML, Markdown
from torch import nn

from replib.analysis.statistics import Estimate, estimate
from replib.blocks import RepBlock
from replib.blocks.repmlp import RepMLP
from replib.errors import UserError
from replib.experiments import repeat
from replib.experiments.cells import (
    counts,
    dataset,
    new_model,
    trained_model,
    training_parameters,
)
from replib.experiments.params import Cell, built, in_parts
from replib.experiments.store import home
from replib.report.diagram import before_after
from replib.report.kernel_picture import kernel_picture
from replib.report.results import Cost, Results
from replib.report.standing import Evidence, Recorded

NONE = "–"
NO_BLOCK = "<p>No network of this table is made of such blocks.</p>"


def escape(value: object) -> str:
    """Text that no browser takes for markup."""
    return html.escape(str(value))


def table_html(header: Sequence[str], lines: Sequence[Sequence[str]], css: str = "") -> str:
    """A table; cells are HTML already."""
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in line) + "</tr>" for line in lines)
    return (
        f'<div class="wide"><table class="{css}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def filled(header: list[str], lines: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """A table without the columns of which no line says anything."""
    kept = [i for i in range(len(header)) if any(line[i] != NONE for line in lines)]
    return [header[i] for i in kept], [[line[i] for i in kept] for line in lines]


def number(value: float | None, digits: int = 0) -> str:
    """A number with thin thousands, or a dash."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return NONE
    return f"{value:,.{digits}f}".replace(",", "\u202f")


def engineering(value: float | None) -> str:
    """FLOPs with a prefix."""
    if not value:
        return NONE
    for factor, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= factor:
            return f"{value / factor:.3g}\u202f{prefix}"
    return number(value)


def interval(value: Estimate | None, signed: bool = False) -> str:
    """mean [low, high] n."""
    if value is None:
        return NONE
    sign = "+" if signed else ""
    mean = f"{value.mean:{sign}.2f}"
    if value.n < 2:
        return f'{mean} <small class="whole">n = 1</small>'
    bounds = f"[{value.low:{sign}.2f}, {value.high:{sign}.2f}]"
    return f'{mean} <small class="whole">{bounds}<br>n = {value.n}</small>'


def only_rendered() -> bool:
    """Whether pages are to be made of what there is: `make reports` trains nothing."""
    return os.environ.get("REPLIB_TRAIN") == "0"


class Page:
    """The parts of one report, for a notebook: `Page("table2", "quick")`.

    Where nothing is to be trained and the data are not here, what is published is shown.
    """

    def __init__(self, table: str, profile: str, settings: list[str] = ()):
        self.absent = ""  # why there are no data
        try:
            self.results = Results(table, profile, list(settings))
        except UserError as error:
            if settings or not only_rendered():
                raise
            self.results, self.absent = Recorded(table, profile, Evidence()), str(error)
            if not self.results.published:
                raise
        self.table = self.results.table

    def intro(self) -> HTML:
        """What this page is, what was claimed, and what its numbers cannot say."""
        table, parts = self.table, []
        if table.proxy:
            data = dict.fromkeys(one.cell.data for one in self.results.plan.cells.values())
            said = f"Data: {', '.join(data)}. {table.proxy}"
            parts.append(f'<p class="warning">{escape(said)}</p>')
        if self.absent:
            said = f"Published evidence, shown without its data, which are not here: {self.absent}"
            parts.append(f'<p class="warning">{escape(said)}</p>')
        if self.results.settings:
            changed = ", ".join(self.results.settings)
            parts.append(
                f'<p class="warning">Changed from the profile: {escape(changed)}. What is said '
                "about the profile below may not hold.</p>"
            )
        parts.append(f"<h1>{escape(table.title)}</h1>")
        parts.append(
            f"<p>Profile <b>{escape(self.results.profile)}</b>. <b>Question.</b> "
            f"{escape(table.question)}</p>"
        )
        claims = "".join(
            f"<li>{escape(c.text)} <small>{escape(c.source)}</small></li>"
            for c in table.claims
            if c.confidence == "read"  # what is only recalled is not printed as the paper's
        )
        if claims:
            parts.append(f"<p><b>What was claimed.</b></p><ul>{claims}</ul>")
        return HTML("".join(parts))

    def method(self) -> Markdown:
        """What the table compares, in the words of its profile; markup in them is shown as text."""
        text = self.table.method.replace("&", "&amp;").replace("<", "&lt;")
        return Markdown(text)

    def block(self) -> HTML:
        """The blocks of this table, as they are trained and as they are deployed."""
        found = [self.example(family, RepBlock | RepMLP, False) for family in self.families]
        found.append(self.example("convbn", RepMLP, False))  # of networks that are made of these
        return HTML("".join(before_after(pair[1]) for pair in found if pair) or NO_BLOCK)

    def kernels(self) -> HTML:
        """The kernels that a block of this table merges: trained ones, where they are here."""
        parts = []
        for family in self.families:
            found = self.example(family, RepBlock, True) or self.example(family, RepBlock, False)
            if found:
                said, block = found
                parts.append(f"{kernel_picture(block)}<p><small>{escape(said)}</small></p>")
        return HTML("".join(parts) or NO_BLOCK)

    @property
    def families(self) -> list[str]:
        """The families of blocks that rows of this table are made of, plain ones apart."""
        cells = (planned.cell for planned in self.results.plan.cells.values() if planned.rows)
        return [name for name in dict.fromkeys(c.block for c in cells) if name != "convbn"]

    def example(
        self, family: str, kind: UnionType | type, trained: bool
    ) -> tuple[str, nn.Module] | None:
        """A block of a family in a network of this table, and in words which one; or None.

        The one with the most branches, in the first row and seed that has any: with the weights
        that are on this machine, or as initialised.
        """
        cells, bodies = self.results.plan.cells.values(), set()
        for planned in cells:
            cell = planned.cell
            if cell.block != family or (cell.body in bodies and not trained):
                continue
            bodies.add(cell.body)
            try:
                model = trained_model(planned, self.results.store) if trained else self.fresh(cell)
            except UserError:  # not trained here, or by an older version
                continue
            blocks = [(n, m) for n, m in model.named_modules() if isinstance(m, kind)]
            if blocks:
                name, block = max(blocks, key=lambda item: branch_count(item[1]))
                row = self.table.rows[planned.rows[0]].label if planned.rows else "the start"
                state = "the selected weights" if trained else "as initialised: norms are fresh"
                return f"{name} of {row}, seed {cell.seed}, {state}.", block
        return None

    def fresh(self, cell: Cell) -> nn.Module:
        """The network of a cell as initialised; without its data, one of any number of classes."""
        if not self.absent:
            return new_model(cell)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cell.seed)
            return built(cell.network, classes=10, in_channels=3)

    def train(self, **options) -> None:
        """Train the missing cells here, with progress; options of `run_plan`."""
        workers = os.environ.get("REPLIB_WORKERS")
        budget = os.environ.get("REPLIB_BUDGET_SECONDS")
        if only_rendered():
            return
        options.setdefault("workers", int(workers) if workers else None)
        options.setdefault("budget_seconds", float(budget) if budget else None)
        options.setdefault("compile", os.environ.get("REPLIB_COMPILE") or "auto")
        options.setdefault("executor", os.environ.get("REPLIB_EXECUTOR") or "local")
        options.setdefault("slurm", in_parts(os.environ.get("REPLIB_SLURM", "")))
        done = self.results.train(**options)
        left = f", {done.out_of_time} not finished in the time given" if done.out_of_time else ""
        print(f"{done.trained} cells trained, {done.present} were there{left}", flush=True)

    def summary(self) -> HTML:
        """The table: own results beside the published ones."""
        results = self.results
        both = bool(results.published)
        of_paper = {row: results.paper[row].get("accuracy") for row in results.rows}
        paper = ["in the paper, %"] if any(v is not None for v in of_paper.values()) else []
        metrics, published = results.metrics, ["published"] if both else []
        header = ["", *paper, f"{' or '.join(metrics)}, %", *published, "gain, points", *published]
        header += ["over", "verdict"]
        lines = []
        for row in results.rows:
            spec, other = self.table.rows[row], results.against(row)
            taught = results.teacher_accuracy(row, results.fallback)
            label = f"<b>{escape(spec.label)}</b>"
            if len(metrics) > 1:
                label += f"<br><small>{self.table.metric(row)}</small>"
            if taught is not None:
                label += f"<br><small>its teacher: {interval(taught)}</small>"
            line = [label, *([number(of_paper[row], 2)] if paper else [])]
            line.append(interval(results.accuracy(row)))
            line += [interval(results.accuracy(row, True))] if both else []
            line += [interval(results.gain(row), True)]
            line += [interval(results.gain(row, True), True)] if both else []
            over = NONE if other == row else escape(self.table.rows[other].label)
            lines.append([*line, f"<small>{over}</small>", escape(results.verdict(row))])
        note = (
            f"<p><small>Test {' or '.join(metrics)} of the deployed network at the checkpoint that "
            "the protocol selects; mean, two-sided 95 % t-interval, n seeds. Gains are paired by "
            "seed. The intervals are not adjusted for the number of comparisons. The verdict is "
            "about the paper's gain and follows a rule.</small></p>"
        )
        stale = len(results.stale)
        if stale:
            note += (
                f'<p class="warning">{stale} published results of this table were made by an '
                "older version of the code; they are not counted.</p>"
            )
        return HTML(table_html(header, lines, "numbers") + note)

    def further(self) -> HTML:
        """What is scored beside the metric, where something is."""
        results = self.results
        found = {row: results.further(row, results.fallback) for row in results.rows}
        names = list(dict.fromkeys(name for scores in found.values() for name in scores))
        if not names:
            return HTML("")
        lines = [
            [f"<b>{escape(self.table.rows[row].label)}</b>"]
            + [interval(scores.get(name)) for name in names]
            for row, scores in found.items()
        ]
        header = ["", *(escape(f"{name.replace('_', ' ')}, %") for name in names)]
        return HTML(f"<h2>Further scores</h2>{table_html(header, lines, 'numbers')}")

    def views(self) -> HTML:
        """Accuracy on turned and flipped test images, where the table asks for it."""
        results, lines = self.results, []
        for row in results.rows:
            if (cell := self.cell(row)) is None or not cell.views:
                continue
            spec = self.table.rows[row]
            line = [f"<b>{escape(spec.label)}</b>"]
            for view in results.views:
                line.append(interval(results.view_accuracy(row, view, results.fallback)))
                line.append(number(results.paper[row].get(view), 2))
            lines.append(line)
        if not lines:
            return HTML("")
        header = [
            [escape(view.replace("_", " ")) + ", %", "in the paper"] for view in results.views
        ]
        shown = table_html(["", *(cell for pair in header for cell in pair)], lines, "numbers")
        return HTML(f"<h2>The same networks on other views of the test images</h2>{shown}")

    def counts(self) -> HTML:
        """The paper's networks in their full size, counted on what is built here."""
        lines = []
        for name, one in self.table.networks.items():
            shape = (3, one.image_size, one.image_size)
            found = counts(one.network, one.classes, shape)
            paper = self.results.paper_networks[name]
            lines.append(
                [
                    f"<b>{escape(one.label)}</b>",
                    f"{one.image_size} × {one.image_size}",
                    f"{found['training_parameters'] / 1e6:.2f}",
                    number(paper.get("training_parameters"), 1),
                    f"{found['parameters'] / 1e6:.2f}",
                    number(paper.get("parameters"), 1),
                    f"{found['flops'] / 2e9:.2f}",
                    number(paper.get("flops"), 2),
                    number(paper.get("accuracy"), 2),
                ]
            )
        if not lines:
            return HTML("")
        header = ["", "image", "training parameters, 10⁶", "in the paper"]
        header += ["deployed, 10⁶", "in the paper", "multiply-adds, 10⁹", "in the paper"]
        header += ["accuracy in the paper, %"]
        shown = table_html(*filled(header, lines), "numbers")
        note = (
            "<p><small>Counted on the networks as they are built here, deployed, on one image; "
            "convolutions and matrix products.</small></p>"
        )
        return HTML(f"<h2>The paper's networks, counted</h2>{shown}{note}")

    def pruning(self) -> HTML:
        """Accuracy before and after pruning, and what is left, where networks lose channels."""
        results, source, lines, widths = self.results, self.results.fallback, [], []
        for row in results.rows:
            cell, found = self.cell(row), results.evidence(row, source)
            if not found or cell is None or (cell.resrep or cell.narrow) is None:
                continue
            control = results.evidence(results.control(row), source).values()
            whole = [e["result"]["deployed"]["flops"] for e in control]
            left = [e["result"]["deployed"]["flops"] for e in found.values()]
            reports = {s: e["result"]["pruning"] for s, e in found.items() if cell.resrep}
            before = [100 * report["accuracy_before"] for report in reports.values()]
            moved = [report["logits_moved"] for report in reports.values()]
            share = 100 * (1 - sum(left) / len(left) / whole[0]) if whole else None
            lines.append(
                [
                    f"<b>{escape(self.table.rows[row].label)}</b>",
                    interval(estimate(before) if before else None),
                    interval(results.accuracy(row, source)),
                    number(100 * (1 - (cell.resrep or cell.narrow).target), 2),
                    number(share, 2),
                    f"{max(moved):.1g}" if moved else NONE,
                ]
            )
            for seed, report in reports.items():
                said = ", ".join(f"{n}: {b} → {a}" for n, (b, a) in report["widths"].items())
                label = escape(self.table.rows[row].label)
                widths.append([f"<b>{label}</b>", str(seed), f"<small>{escape(said)}</small>"])
        if not lines:
            return HTML("")
        header = ["", "before pruning, %", "after, %", "FLOPs to prune, %", "pruned, %"]
        shown = table_html([*header, "logits moved"], lines, "numbers")
        note = (
            "<p><small>Test accuracy; FLOPs of the deployed network, counted, over those of the "
            "control's; mean over seeds. Logits moved by the pruning itself: max |change| / max "
            "|logit| of test images, the largest of all seeds.</small></p>"
        )
        details = table_html(["", "seed", "channels of every layer, before → after"], widths)
        details = f"<details><summary>What is left of every layer</summary>{details}</details>"
        return HTML(f"<h2>Before and after pruning</h2>{shown}{note}{details if widths else ''}")

    def costs(self) -> HTML:
        """What each row costs to train, parents included, and what is deployed."""
        results = self.results
        source = results.fallback
        frame = results.frame(source)
        header = [
            "",
            "network",
            "training parameters",
            "deployed parameters",
            "deployed FLOPs",
            "epochs",
            "training FLOPs",
            "time, s",
        ]
        header += ["teacher's epochs", "teacher's FLOPs", "teacher's time, s"]
        lines = []
        for row in results.rows:
            values = frame.loc[row]
            cost = results.mean_cost(row, source) or (Cost(), Cost())
            lines.append(
                [
                    f"<b>{escape(values['label'])}</b>",
                    f"<small>{escape(self.network(row))}</small>",
                    self.training_parameters(row),
                    number(none_if_nan(values["deployed_parameters"])),
                    number(none_if_nan(values["deployed_flops"])),
                    number(cost[0].epochs or None),
                    engineering(cost[0].flops),
                    number(cost[0].seconds or None, 1),
                    number(cost[1].epochs or None),
                    engineering(cost[1].flops),
                    number(cost[1].seconds or None, 1),
                ]
            )
        alike = frame["deployed_parameters"].nunique() == frame["deployed_flops"].nunique() == 1
        said = (
            "Every row deploys the same network: parameters and FLOPs, counted on the fused "
            "models, are equal."
            if alike
            else "The rows deploy different networks, or some have not been run."
        )
        boxes = (
            "Deployed FLOPs of a detector: of the whole of it on the first test image, with as "
            "many boxes as Faster R-CNN may look into. "
            if "mAP" in results.metrics
            else ""
        )
        note = (
            f"<p><small>{said} Mean over seeds; the cells that a row starts from are counted in. "
            "FLOPs: convolutions and matrix products by torch's counter, two per multiply-add, "
            f"forward and backward. {boxes}Time: one thread per cell, on the machine named below; "
            "a distilled row's own time contains the forward passes of its teacher."
            "</small></p>"
        )
        return HTML(table_html(header, lines, "numbers") + note)

    def cell(self, row: str) -> Cell | None:
        """The parameters of a row at its first seed; None where they are not known without data."""
        plan = self.results.plan
        keys = [plan.by_row[row, seed] for seed in self.table.seeds]
        return next((plan.cells[key].cell for key in keys if key in plan.cells), None)

    def training_parameters(self, row: str) -> str:
        """How many numbers are trained, counted on the network that is trained; of one that grew,
        the fewest and the most in any epoch and seed."""
        cell, results = self.cell(row), self.results
        known = results.evidence(row, results.fallback).values()
        found = [n for e in known for n in e["result"]["history"].get("training_parameters", [])]
        if not found and (self.absent or cell.transfer is not None):
            return NONE
        if not found:
            data = dataset(cell)
            found = [training_parameters(cell.network, len(data.classes), data.in_channels)]
        return " to ".join(number(size) for size in sorted({min(found), max(found)}))

    def network(self, row: str) -> str:
        """The body, its width, its blocks and their options, as the parameters name them."""
        cell = self.cell(row)
        if cell is None:
            return NONE
        width = "" if cell.width == 1 else f", width × {cell.width:g}"
        given = (cell.block_options or {}) | (cell.body_options or {})
        options = [f"{name} = {value}" for name, value in given.items()]
        head = "" if cell.transfer is None else f"{cell.transfer.head} on "
        fused = ", fused" if cell.transfer is not None and cell.transfer.fused else ""
        options = "".join(f", {option}" for option in options)
        return f"{head}{cell.body}{width}, {cell.block}{options}{fused}"

    def said(self) -> HTML:
        """What may be said: our own statement for every row, and the rule of the verdict."""
        items = []
        for row, text in self.results.statements().items():
            other = self.table.rows[self.results.against(row)].label
            label = escape(self.table.rows[row].label)
            items.append(f"<li><b>{label}</b> over <i>{escape(other)}</i>: {escape(text)}.</li>")
        ran = self.results.own or self.results.published
        if not items and not ran:
            return HTML("<p>Nothing yet: no row of this table has been run on this machine.</p>")
        if not items:
            items.append("<li>No gain: no row has been run beside the one that it is over.</li>")
        if self.results.fallback:
            items.insert(0, "<li>Published results; nothing was run on this machine.</li>")
        notes = [*self.table.notes, *self.kept, *self.diverged]
        notes = "".join(f"<li>{escape(note)}</li>" for note in notes)
        return HTML(f"<ul>{''.join(items)}</ul><p><b>Notes.</b></p><ul>{notes}</ul>")

    @property
    def kept(self) -> list[str]:
        """In words: which blocks the cycles left as they are, and why, counted."""
        results, counts = self.results, Counter()
        for row in results.rows:
            for evidence in list(results.evidence(row, results.fallback).values())[:1]:
                for reason in evidence["result"]["kept_blocks"].values():
                    counts[self.table.rows[row].label, reason] += 1
        said: dict[tuple[str, int], list[str]] = {}
        for (label, reason), count in counts.items():
            said.setdefault((reason, count), []).append(label)
        return [
            f"Blocks that the cycle leaves as they are: {count} ({reason}), in {', '.join(labels)}."
            for (reason, count), labels in said.items()
        ]

    @property
    def diverged(self) -> list[str]:
        """In words: which runs ended without a training loss, and when."""
        results, said = self.results, []
        for row in results.rows:
            found = results.diverged(row, results.fallback).items()
            if found:
                when = ", ".join(f"seed {seed} in epoch {epoch}" for seed, epoch in found)
                label = self.table.rows[row].label
                said.append(f"{label}: diverged, the training loss is no number ({when}).")
        return said

    def provenance(self) -> HTML:
        """Where every number comes from, and the command to repeat it."""
        results = self.results
        command = f"make reproduce-{results.id} PROFILE={results.profile}"
        if results.settings:
            command = f"python -m replib reproduce {results.id} --profile {results.profile}"
            command += "".join(f" --set {shlex.quote(setting)}" for setting in results.settings)
        lines = []
        for name, source in (("this machine", results.own), ("published", results.published)):
            if source:
                contexts = [evidence["context"] for evidence in source.values()]

                def seen(key: str, contexts=contexts) -> str:
                    return ", ".join(sorted({str(context[key]) for context in contexts}))

                torch = ", ".join(sorted({c["libraries"]["torch"] for c in contexts}))
                lines.append(
                    [
                        escape(name),
                        number(len(source)),
                        escape(seen("commit")),
                        escape(f"{seen('device')}: {seen('processor')}"),
                        escape(f"torch {torch}, Python {seen('python')}"),
                        number(sum(c["wall_seconds"] for c in contexts), 0),
                    ]
                )
        header = ["evidence", "cells", "commit", "device", "software", "seconds, all cells"]
        files = []
        for planned in results.plan.cells.values():
            links = []
            for name, source, path in (
                ("own", results.own, results.store.own_path(planned.key)),
                ("published", results.published, results.store.published_path(planned.key)),
            ):
                if planned.key in source:
                    target = escape(relative(path))
                    links.append(f'<a href="{target}">{name}</a>')
            rows = escape(", ".join(planned.rows))
            key = escape(planned.key[:16])
            files.append([f"<code>{key}</code>", rows, str(planned.cell.seed), " ".join(links)])
        cells = table_html(["cell", "rows", "seed", "evidence file"], files)
        return HTML(
            f"<p>To repeat: <code>{escape(command)}</code></p>"
            + table_html(header, lines)
            + self.repeated()
            + f"<details><summary>All {len(files)} cells and their evidence files</summary>"
            + f"{cells}</details>"
        )

    def repeated(self) -> str:
        """What came out where cells were trained a second time (`replib repeat`)."""
        results = self.results
        command = f"python -m replib repeat {results.id} --profile {results.profile}"
        where = results.store, results.id, results.profile, results.own | results.published
        parts = []
        for device, cells in repeat.standing(*where).items():
            named = {f"{', '.join(cell['rows'])} (seed {cell['seed']})" for cell in cells}
            said = "".join(f"<li>{escape(line)}</li>" for line in repeat.sentences(cells))
            parts.append(
                f"<p>Trained a second time, {device}: {escape('; '.join(sorted(named)))}.</p>"
                f"<ul>{said}</ul>"
            )
        none = f"<p>No cell was trained a second time: <code>{escape(command)}</code>.</p>"
        return "".join(parts) or none

    def parameters(self) -> HTML:
        """The resolved parameters of this profile."""
        shown = self.table.model_dump(include={"seeds", "cell", "recipes"})
        text = "\n".join(flat(shown))
        return HTML(
            "<details><summary>All parameters of this profile</summary>"
            f"<pre>{escape(text)}</pre></details>"
        )


def branch_count(block: RepBlock | RepMLP) -> int:
    """How many branches a block has."""
    return len(block.branches) if isinstance(block, RepBlock) else 1 + len(block.local)


def relative(path: Path) -> str:
    """A link from a page in reports/."""
    return Path(os.path.relpath(path, home() / "reports")).as_posix()


def none_if_nan(value: object) -> object:
    """pandas stores a missing number as nan."""
    return None if pd.isna(value) else value


def flat(values: dict, prefix: str = "") -> list[str]:
    """Nested parameters as dotted lines, as `--set` takes them."""
    lines = []
    for key, value in values.items():
        if isinstance(value, dict):
            lines += flat(value, f"{prefix}{key}.")
        else:
            lines.append(f"{prefix}{key} = {value}")
    return lines
