"""What is counted of networks and blocks beside what papers say of them, and what a step costs.

Nothing is computed: networks are built without numbers, on the device "meta".
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import HTML
from torch import nn

from replib.analysis.cost import StepCost, layout, operations, step_cost
from replib.benchmark.subjects import unsqueezed
from replib.blocks import BLOCKS, RepBlock
from replib.errors import UserError
from replib.experiments.cells import forward_flops, training_parameters
from replib.experiments.params import Cell, Row, built, load_table
from replib.fusing import fuse
from replib.report import catalogue
from replib.report.cycle_figures import finished
from replib.report.figures import style
from replib.report.measured_figures import image
from replib.report.page import NONE, escape, filled, number, table_html
from replib.report.results import profile_path

UNITS = {"training_parameters": 1e6, "parameters": 1e6, "flops": 1e9, "multiplications": 1e9}
SAID = {
    "training_parameters": "training parameters, 10⁶",
    "parameters": "deployed, 10⁶",
    "flops": "multiply-adds, 10⁹",
    "multiplications": "products by Winograd, 10⁹",
}
GIB, MIB = 2**30, 2**20
CLASSES = 1000  # of ImageNet
ELSEWHERE, HERE = "branches on the images", "as trained here"


# -- the papers' networks --------------------------------------------------------------------------
@lru_cache
def counted(network: tuple, classes: int, side: int) -> dict[str, float]:
    """`UNITS` of `Cell.network` on images (3, side, side), and "training_flops": the multiply-adds
    of the training form's forward pass."""
    shape = (3, side, side)
    with torch.device("meta"):
        deployed = fuse(built(network, classes=classes, in_channels=3).eval())
        direct, winograd = operations(deployed, shape)
    found = {
        "training_parameters": training_parameters(network, classes, 3),
        "parameters": sum(p.numel() for p in deployed.parameters()),
        "flops": direct,
        "multiplications": winograd,
    }
    found = {name: value / UNITS[name] for name, value in found.items()}
    return found | {"training_flops": forward_flops(network, classes, shape) / 2e9}


def differs(ours: float, papers: float) -> bool:
    """Whether two numbers differ beyond the last digit that the paper prints, rounded or cut."""
    digits = len(f"{papers}".partition(".")[2])
    return abs(ours - papers) >= 10.0**-digits


def network_sizes(reference: str) -> HTML:
    """The networks of PAPER/ITEM, counted, beside the paper's numbers."""
    paper, _, name = reference.partition("/")
    item, lines = catalogue.work(paper).items[name], []
    for row, one in item.networks.items():
        found = counted(one.network, one.classes, one.image_size)
        cells, apart = [], []
        for name in UNITS:
            column = item.counts.get(name)
            papers = paper_number(f"{reference}/{row}", column) if column else None
            cells += [f"{found[name]:.2f}", NONE if papers is None else f"{papers}"]
            if papers is not None and differs(found[name], papers):
                percent = 100 * (found[name] / papers - 1)
                apart.append(f"{SAID[name].partition(',')[0]} {percent:+.1f} %")
        label = escape(item.rows[row].get("model", row))
        size = f"{one.image_size} × {one.image_size}"
        cells.insert(4, f"{found['training_flops']:.2f}")
        lines.append([f"<b>{label}</b>", size, *cells, "<br>".join(apart) or "no"])
    header = ["", "image"]
    for said in SAID.values():
        header += [said, "in the paper"]
    header.insert(6, "multiply-adds in training, forward, 10⁹")
    header.append("differs from the paper")
    shown = table_html(*filled(header, lines), "numbers")
    return HTML(f"<p>{escape(item.title)}.</p>{shown}")


def paper_number(reference: str, column: str) -> float | None:
    """What PAPER/ITEM/ROW has in a column, if that was read in its source."""
    try:
        return catalogue.number(reference, column)
    except UserError:
        return None


def stages() -> HTML:
    """RepVGG's networks, counted, against what its tables 2 and 3 say together: the stages in terms
    of a and b, and a and b of every network."""
    items, lines = catalogue.work("repvgg").items, []
    for row, one in items["table3"].networks.items():
        with torch.device("meta"):
            network = fuse(built(one.network, classes=CLASSES, in_channels=3).eval())
        found = layout(network, (3, one.image_size, one.image_size))
        factors = {name: catalogue.number(f"repvgg/table3/{row}", name) for name in ("a", "b")}
        model = items["table3"].rows[row]["model"]
        kind = "repvgg_a" if model.startswith("RepVGG-A") else "repvgg_b"
        wanted = [
            (*layers_and_width(stage[kind], factors), stage["output"])
            for stage in items["table2"].rows.values()
        ]
        shown = (" · ".join(f"{n} × {c}" for n, c, _ in one) for one in (found, wanted))
        same = "yes" if wanted == found else "<b>no</b>"
        lines.append([f"<b>{escape(model)}</b>", *map(str, factors.values()), *shown, same])
    header = ["", "a", "b", "layers × channels, built here", "by the paper", "the same"]
    return HTML(table_html(header, lines))


def layers_and_width(text: str, factors: dict[str, float]) -> tuple[int, int]:
    """With a = 0.75: of "2 x 64a" (2, 48), of "1 x min(64, 64a)" (1, 48)."""
    layers, most, base, factor = re.fullmatch(
        r"(\d+) x (?:min\((\d+), )?(\d+)([ab])\)?", text
    ).groups()
    width = int(int(base) * factors[factor])
    return int(layers), min(width, int(most)) if most else width


# -- what a step costs -----------------------------------------------------------------------------
def formed(model: nn.Module, form: str) -> nn.Module:
    """The network, or, in place, with every branch of every block on the images, as where branches
    are merged after training only."""
    return unsqueezed(model) if form == ELSEWHERE else model


def blocks(images: int, channels: int, side: int) -> HTML:
    """Every family of blocks: what a step of one block costs over one of a convolution with norm.

    On maps (images, channels, side, side), whose gradient is computed too.
    """
    shape, lines = (channels, side, side), []
    for name, family in BLOCKS.items():
        found: dict[str, StepCost] = {}
        with torch.device("meta"):
            block, plain = (make(family, channels) for make in (of_family, plain_like))
            deployed = sum(p.numel() for p in block.deploy().parameters())
            over = step_cost(plain, images, shape, input_gradient=True)
            for form in (HERE, ELSEWHERE):
                found[form] = step_cost(formed(block, form), images, shape, input_gradient=True)
        g = block.geometry
        size = f"{g.kernel_size[0]} × {g.kernel_size[1]}" + (", depthwise" if g.groups > 1 else "")
        ratios = [
            f"{getattr(found[form], what) / getattr(over, what):.2f}"
            for what in ("step", "saved")
            for form in (ELSEWHERE, HERE)
        ]
        sizes = (len(block.branches), found[HERE].parameters, deployed)
        lines.append([f"<b>{name}</b>", size, *map(number, sizes), *ratios])
    header = ["", "kernel", "branches", "training parameters", "deployed parameters"]
    header += [f"operations, {form}" for form in (ELSEWHERE, HERE)]
    header += [f"memory, {form}" for form in (ELSEWHERE, HERE)]
    return HTML(table_html(header, lines, "numbers"))


def of_family(family: type[RepBlock], channels: int) -> RepBlock:
    """A block in train mode; large kernels are depthwise, as in RepLKNet."""
    groups = channels if family.default_kernel_size > 7 else 1
    return family(channels, channels, groups=groups)


def plain_like(family: type[RepBlock], channels: int) -> RepBlock:
    """A convolution of the same kernel with its norm."""
    g = of_family(family, channels).geometry
    return BLOCKS["convbn"](channels, channels, g.kernel_size, groups=g.groups)


@lru_cache
def cost(network: tuple, images: int, side: int, form: str) -> StepCost:
    """Of a step of `Cell.network` on so many images (3, side, side)."""
    with torch.device("meta"):
        model = formed(built(network, classes=CLASSES, in_channels=3), form)
        return step_cost(model, images, (3, side, side))


def of_rows(
    table: str, profile: str, images: int, variants: Sequence[str] = ()
) -> Iterator[tuple[Row, StepCost, StepCost]]:
    """(row, cost where branches are merged after training, cost as trained here) of a profile's
    rows at their full size; of these variants, or of all where none is named."""
    loaded = load_table(profile_path(table, profile), networks=False, cells=False)
    if unknown := sorted({*variants} - {*(loaded.variants or ())}):
        known = ", ".join(loaded.variants or ()) or "none"
        raise UserError(f"{table} {profile} has no variant {unknown[0]!r}; it has {known}.")
    labels = {loaded.variants[name].label for name in variants}
    for name, row in loaded.rows.items():
        if not row.hidden and (row.variant in labels or not variants):
            cell = Cell.model_validate(loaded.cell_of(name, loaded.seeds[0]))
            where = cell.network, images, cell.resized_crop or cell.image_size
            yield row, cost(*where, ELSEWHERE), cost(*where, HERE)


def steps(
    table: str,
    profile: str,
    images: int,
    variants: Sequence[str] = (),
    papers: dict[str, str] | None = None,
) -> HTML:
    """What a step of every row of a profile costs, and the paper's columns: column -> heading."""
    lines = []
    for row, apart, here in of_rows(table, profile, images, variants):
        read = [paper_number(row.paper.row, c) if row.paper else None for c in papers or ()]
        lines.append(
            [
                f"<b>{escape(row.label)}</b>",
                f"{here.parameters / 1e6:.2f}",
                f"{(here.parameters + here.statistics) / 1e6:.2f}",
                f"{apart.step / 1e9:.1f}",
                f"{here.step / 1e9:.1f}",
                number(apart.saved / MIB),
                number(here.saved / MIB),
                f"{here.memory / GIB:.2f}",
                *(NONE if value is None else f"{value}" for value in read),
            ]
        )
    header = ["", "training parameters, 10⁶", "with running statistics, 10⁶"]
    header += [f"FLOPs of an image, 10⁹, {form}" for form in (ELSEWHERE, HERE)]
    header += [f"saved, MiB, {form}" for form in (ELSEWHERE, HERE)]
    header += ["memory at least, GiB", *(papers or {}).values()]
    return HTML(table_html(*filled(header, lines), "numbers"))


def bars(table: str, profile: str, images: int, variants: Sequence[str] = ()) -> HTML:
    """Operations and memory of a step, a bar for each row and form."""
    style()
    rows = [*of_rows(table, profile, images, variants)]
    at, height = np.arange(len(rows))[::-1], 0.38
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.55 * len(rows) + 1.4), sharey=True)
    drawn = (
        ("operations of an image, 10⁹", lambda cost: cost.step / 1e9),
        (f"memory of {images} images at least, GiB", lambda cost: cost.memory / GIB),
    )
    for axis, (said, of) in zip(axes, drawn, strict=True):
        for i, form in enumerate((ELSEWHERE, HERE)):
            values = [of(pair[i]) for _, *pair in rows]
            axis.barh(at + (0.5 - i) * height, values, height, label=form, color=f"C{i}")
        axis.set_xlabel(said)
    axes[0].set_yticks(at, [row.label for row, *_ in rows])
    axes[1].legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    said = "Operations and memory of a training step as parts are added, by where branches merge."
    return HTML(image(said, finished(figure)))
