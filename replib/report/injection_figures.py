"""What convolutions add to the dense maps of a table's RepMLP networks: kernels before and after
they are merged, and how local they are. Of the weights on this machine, or as initialised."""

from __future__ import annotations

from functools import cached_property

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import HTML
from matplotlib.figure import Figure
from torch import Tensor

from replib.blocks.repmlp import RepMLP
from replib.errors import UserError
from replib.experiments.cells import Planned, new_model, trained_model
from replib.report.cycle_figures import finished, looks
from replib.report.figures import name, style
from replib.report.page import escape
from replib.report.results import Results

NAMES = {"dense": "fully connected"}


def maps(block: RepMLP) -> dict[str, Tensor]:
    """What the dense map and every convolution contribute: (S, outputs, inputs), positions in the
    order of rows; they add up to what is deployed."""
    pixels = block.h * block.w
    return {
        part: kernel.weight.detach().view(block.sets, pixels, pixels)
        for part, kernel in block.parts().items()
    }


def profile(weight: Tensor, h: int, w: int) -> Tensor:
    """How large weights (S, outputs, inputs) are by distance, relative to all of them.

    Element d: the mean |weight| of pairs of positions that are d steps apart, diagonal steps
    included, over the mean of all pairs; (max(h, w),).
    """
    rows = torch.arange(h).repeat_interleave(w)
    columns = torch.arange(w).repeat(h)
    apart = torch.maximum((rows[:, None] - rows).abs(), (columns[:, None] - columns).abs())
    size = weight.abs().mean(0)
    sums, pairs = (
        torch.zeros(max(h, w), dtype=size.dtype).index_add_(0, apart.flatten(), values.flatten())
        for values in (size, torch.ones_like(size))
    )
    return sums / pairs / size.mean()


class Injection:
    """The RepMLP blocks of a table's networks: the first one of each."""

    def __init__(self, results: Results):
        self.results = results

    @cached_property
    def blocks(self) -> dict[str, dict[int, RepMLP]]:
        """row -> seed -> the first block of the trained network, of rows whose weights are here."""
        found: dict[str, dict[int, RepMLP]] = {}
        for (row, seed), key in self.results.plan.by_row.items():
            if row in self.results.rows:
                try:
                    model = trained_model(self.results.plan.cells[key], self.results.store)
                except UserError:  # not trained here
                    continue
                if block := first_block(model):
                    found.setdefault(row, {})[seed] = block
        return found

    def example(self) -> tuple[str, RepMLP]:
        """The block with the most convolutions: of a trained network, else as initialised."""
        trained = [(row, seeds) for row, seeds in self.blocks.items()]
        if trained:
            row, seeds = max(trained, key=lambda item: len(next(iter(item[1].values())).local))
            seed, block = next(iter(seeds.items()))
            return f"{self.results.table.rows[row].label}, seed {seed}, the selected weights", block
        planned: dict[str, Planned] = {}
        for one in self.results.plan.cells.values():
            planned.setdefault(one.rows[0], one)
        made = {row: first_block(new_model(one.cell).eval()) for row, one in planned.items()}
        row = max(made, key=lambda row: len(made[row].local) if made[row] else -1)
        return f"{self.results.table.rows[row].label}, as initialised", made[row]

    def kernels(self) -> Figure:
        """Rows of the dense map, each as an image of its inputs: the parts, and what is deployed.

        For an output at the corner, at the middle of an edge and in the middle; the first set.
        """
        style()
        said, block = self.example()
        parts = maps(block)
        merged = sum(parts.values())
        shown = {NAMES.get(part, part): weight[0] for part, weight in parts.items()}
        shown["deployed: their sum"] = merged[0]
        h, w = block.h, block.w
        places = {"corner": 0, "edge": w // 2, "middle": (h // 2) * w + w // 2}
        limit = float(merged[0].abs().max())
        figure, axes = plt.subplots(
            len(places), len(shown), figsize=(2.3 * len(shown) + 0.8, 2.3 * len(places)),
            squeeze=False,
        )  # fmt: skip
        for line, (place, at) in zip(axes, places.items(), strict=True):
            for axis, (title, weight) in zip(line, shown.items(), strict=True):
                image = axis.imshow(
                    weight[at].view(h, w).numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit
                )
                axis.plot(at % w, at // w, "s", mfc="none", mec="black", ms=9)
                axis.set_xticks([])
                axis.set_yticks([])
                if axis in axes[0]:
                    axis.set_title(title, fontsize="small")
            line[0].set_ylabel(f"output at the {place}", fontsize="small")
        figure.suptitle(f"Set 1 of the first block of {said}".replace("$", r"\$"), fontsize="small")
        figure.colorbar(image, ax=axes, shrink=0.8, label="weight")
        plt.close(figure)
        return figure

    def locality(self) -> Figure | None:
        """Mean |weight| by the distance of output and input: as deployed, and before (dashed)."""
        if not self.blocks:
            return None
        style()
        figure, axis = plt.subplots(figsize=(8, 3.8))
        for row, look in looks(list(self.blocks)).items():
            curves: dict[str, list] = {"before": [], "deployed": []}
            for block in self.blocks[row].values():
                parts = maps(block)
                for form, weight in (("before", parts["dense"]), ("deployed", sum(parts.values()))):
                    curves[form].append(profile(weight, block.h, block.w).numpy())
            deployed = np.array(curves["deployed"])
            distances, colour = range(deployed.shape[1]), look["color"]
            label = name(self.results, row)
            axis.plot(distances, deployed.mean(axis=0), "-", label=label, **look)
            axis.fill_between(
                distances,
                deployed.min(axis=0),
                deployed.max(axis=0),
                color=colour,
                alpha=0.12,
                lw=0,
            )
            if any(len(block.local) for block in self.blocks[row].values()):
                axis.plot(distances, np.mean(curves["before"], axis=0), "--", lw=1, color=colour)
        axis.axhline(1, color="#c4cad0", lw=1, zorder=0)
        axis.set_yscale("log")
        axis.set_xlabel("distance of output and input, positions")
        axis.set_ylabel("mean |weight|, over that of all")
        axis.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
        return finished(figure)

    def said(self) -> HTML:
        """Which weights the figures are of."""
        if self.blocks:
            count = sum(len(seeds) for seeds in self.blocks.values())
            return HTML(
                f"<p><small>Weights of {count} networks trained on this machine.</small></p>"
            )
        command = f"make reproduce-{self.results.id} PROFILE={self.results.profile}"
        return HTML(
            "<p><small>The trained weights are not on this machine: the kernels above are as "
            f"initialised. <code>{escape(command)}</code> trains them.</small></p>"
        )


def first_block(model: torch.nn.Module) -> RepMLP | None:
    """The first RepMLP of a network."""
    return next((module for module in model.modules() if isinstance(module, RepMLP)), None)
