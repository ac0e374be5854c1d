"""The scales that a search for RepOptimizers finds, and how they begin: as figures.

After Ding et al., "Re-parameterizing Your Optimizers rather than Architectures", ICLR 2023, figures
4, 6 and 7.
"""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch
from IPython.display import HTML
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import nn

from replib.analysis.identity_share import identity_shares
from replib.experiments.store import home
from replib.methods.repoptimizers import file_name, means_in
from replib.models import build
from replib.report.cycle_figures import finished
from replib.report.figures import name, style
from replib.report.page import escape, table_html
from replib.report.results import Results

RELEASED = "data/RepOpt-VGG-B1-scales.pth"  # of the paper's repository; drawn where it is here
BRANCHES = {"conv": "3 × 3", "1x1": "1 × 1", "identity": "identity"}
SCALE = re.compile(r"(.+)\.scale_(conv|1x1|identity)\.weight")


def resnet_like(depths: tuple[int, ...], classes: int) -> nn.Module:
    """A ResNet of torchvision's with as many blocks in its four stages as RepOpt-VGG has layers."""
    from torchvision.models.resnet import BasicBlock, ResNet

    return ResNet(BasicBlock, list(depths), num_classes=classes)


def identity_share_figure(
    width: float, pixels: int, images: int, seed: int, stage: str = "3"
) -> Figure:
    """The part of the identity in the variance of a block's output, over the blocks of a stage, in
    three networks as they begin (figure 4 of the paper)."""
    torch.manual_seed(seed)
    x = torch.randn(images, 3, pixels, pixels)
    shape = {"classes": 10, "in_channels": 3, "width": width}
    ones = {"block_options": {"initial": 1.0}}
    networks = {
        "ResNet of as many blocks": resnet_like((4, 6, 16, 1), 10),
        "search, scales begin at 1": build("repopt_vgg_b1", "csla", **shape, **ones),
        "search, scales begin at √(2/l)": build("repopt_vgg_b1", "csla", **shape),
    }
    style()
    figure, axis = plt.subplots(figsize=(8, 3.6))
    for (label, network), marker in zip(networks.items(), "s^o", strict=True):
        shares = {p: v for p, v in identity_shares(network, x).items() if stage_of(p) == stage}
        blocks = [block_of(path) for path in shares]
        axis.plot(blocks, list(shares.values()), f"{marker}-", label=label, ms=5)
    axis.set(xlabel=f"block of stage {stage}", ylabel="variance: identity / sum", ylim=(0, 1))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(frameon=False, fontsize="small")
    axis.grid(axis="y", color="#e4e7eb")
    return finished(figure)


def stage_of(path: str) -> str:
    """The number of a stage in a path: stage3.5.block, layer3.5."""
    return re.match(r"(?:stage|layer)(\d)", path).group(1)


def block_of(path: str) -> int:
    """The place of a block in its stage, from 1."""
    return int(re.match(r"(?:stage|layer)\d\.(\d+)", path).group(1)) + 1


class Searches:
    """The rows of a table that search, and the scales that they have found."""

    def __init__(self, results: Results):
        self.results = results

    @cached_property
    def frame(self) -> pd.DataFrame:
        """One line per row, seed, epoch (from 1), layer (from 1) and branch: the mean of |scale|
        over channels."""
        lines = []
        for row in self.results.rows:
            for seed, evidence in self.results.evidence(row, self.results.fallback).items():
                epochs = evidence["result"]["history"].get("scales", [])
                for epoch, scales in enumerate(epochs, start=1):
                    named = {file_name(key): value for key, value in scales.items()}
                    lines += [(row, seed, epoch, *line) for line in by_layer(named)]
        return pd.DataFrame(lines, columns=["row", "seed", "epoch", "layer", "branch", "mean"])

    @cached_property
    def released(self) -> pd.DataFrame:
        """The same of the released scales, where their file is here: layer, branch, mean."""
        path = Path(home()) / RELEASED
        named = means_in(path) if path.exists() else {}
        return pd.DataFrame(by_layer(named), columns=["layer", "branch", "mean"])

    def rows(self) -> list[str]:
        return list(dict.fromkeys(self.frame.row))

    def over_epochs(self) -> Figure | None:
        """Mean |scale| of the last block with an identity, epoch by epoch (figure 6)."""
        frame = self.frame
        if frame.empty:
            return None
        last = frame[frame.branch == "identity"].layer.max()
        style()
        figure, axes = self.panels(len(self.rows()))
        for axis, row in zip(axes, self.rows(), strict=True):
            part = frame[(frame.row == row) & (frame.layer == last)]
            self.lines(axis, part, "epoch")
            axis.set_title(name(self.results, row), fontsize="medium")
            axis.set_xlabel("epoch (mean of seeds, smallest to largest)")
        axes[0].set_ylabel(f"mean |scale|, layer {last}")
        axes[-1].legend(frameon=False, fontsize="small")
        return finished(figure)

    def by_block(self) -> Figure | None:
        """Mean |scale| of every layer at the end of the search; of the released one, too (figure
        7)."""
        frame, released = self.frame, self.released
        if frame.empty and released.empty:
            return None
        style()
        final = frame[frame.epoch == frame.groupby(["row", "seed"]).epoch.transform("max")]
        panels = {name(self.results, row): final[final.row == row] for row in self.rows()}
        if not released.empty:
            panels["released (RepOpt-VGG-B1, CIFAR-100)"] = released.assign(seed=0)
        figure, axes = self.panels(len(panels))
        for axis, (title, part) in zip(axes, panels.items(), strict=True):
            self.lines(axis, part, "layer", "o")
            axis.set_title(title, fontsize="medium")
            axis.set_xlabel("layer")
        axes[0].set_ylabel("mean |scale|")
        axes[-1].legend(frameon=False, fontsize="small")
        return finished(figure)

    @staticmethod
    def panels(number: int):
        figure, axes = plt.subplots(
            1, number, figsize=(5.2 * number, 3.6), sharey=True, squeeze=False
        )
        return figure, axes[0]

    @staticmethod
    def lines(axis, part: pd.DataFrame, over: str, marker: str = "") -> None:
        """Mean over seeds by branch, and the range."""
        for i, (branch, label) in enumerate(BRANCHES.items()):
            table = part[part.branch == branch].pivot_table("mean", over, "seed")
            if table.empty:
                continue
            axis.plot(table.index, table.mean(axis=1), marker + "-", color=f"C{i}", label=label)
            low, high = table.min(axis=1), table.max(axis=1)
            axis.fill_between(table.index, low, high, color=f"C{i}", alpha=0.15, lw=0)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(axis="y", color="#e4e7eb")

    def likeness(self) -> HTML:
        """How alike the searches are: the correlation of mean |scale| over layers, by branch."""
        frame = self.frame
        rows = self.rows()
        if len(rows) < 2:
            return HTML("")
        final = frame[frame.epoch == frame.groupby(["row", "seed"]).epoch.transform("max")]
        table = final.pivot_table("mean", ["branch", "layer"], "row")
        lines = []
        for row in rows[1:]:
            for branch, label in BRANCHES.items():
                if branch in table.index.get_level_values(0):
                    both = table.loc[branch][[rows[0], row]].dropna()
                    value = both.corr(method="spearman").iloc[0, 1]
                    labels = [escape(self.results.table.rows[r].label) for r in (rows[0], row)]
                    lines.append([*labels, label, f"{value:.2f}"])
        header = ["search", "and", "branch", "rank correlation over layers"]
        return HTML(table_html(header, lines, "numbers"))


def by_layer(scales: dict[str, float]) -> list[tuple[int, str, float]]:
    """(layer from 1, branch, value) of scales by their names in a file, in the network's order."""
    found = [(match, value) for key, value in scales.items() if (match := SCALE.fullmatch(key))]
    paths = list(dict.fromkeys(match.group(1) for match, _ in found))
    return [(paths.index(match.group(1)) + 1, match.group(2), value) for match, value in found]
