"""Figures of the notebook on why it may work: what was watched in, Figure out."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from torch import Tensor

from replib.analysis import toy_blocks
from replib.analysis.annealing import History
from replib.analysis.scale_invariance import against_theory
from replib.report.figures import INK, MUTED, style

ROLES = {"main": (0, "o"), "side": (1, "s")}


def equilibrium(histories: dict[tuple[float, float], History]) -> Figure:
    """Lengths and angles per step over epochs; a column per (learning rate, weight decay).

    Dashed: what the balance of gradient and weight decay predicts.
    """
    style()
    figure, axes = plt.subplots(
        2, len(histories), figsize=(3.1 * len(histories), 5.2), sharex=True, sharey="row"
    )
    for column, ((rate, decay), history) in zip(axes.T, histories.items(), strict=True):
        frame = pd.DataFrame(history.filters)
        theory = against_theory(history.filters, rate, decay) if decay else []
        predicted = {row["convolution"]: row["predicted_length"] for row in theory}
        for i, (name, part) in enumerate(frame.groupby("convolution")):
            column[0].plot(part.epoch, part.length, color=f"C{i}", label=f"layer {i + 1}")
            column[1].plot(part.epoch, part.angle, color=f"C{i}")
            if name in predicted:
                column[0].axhline(predicted[name], color=f"C{i}", ls="--", lw=1)
        for row in theory[:1]:  # the angle is the same for all
            column[1].axhline(row["predicted_angle"], color=INK, ls="--", lw=1)
        column[0].set_title(f"lr {rate:g}, wd {decay:g}", fontsize="medium")
        column[1].set_xlabel("epoch")
    axes[0, 0].set_ylabel("length |w| of a filter")
    axes[1, 0].set_ylabel("angle per step, radians")
    axes[1, 0].set_ylim(0, None)
    axes[0, 0].legend(frameon=False, fontsize="small")
    return finished(figure)


def toy_branches(paths: dict[str, toy_blocks.Path]) -> Figure:
    """Three toy blocks: how far each is from the first one, how their branches' gradients differ,
    how alike the branches are; over steps. The first one has a single kernel."""
    style()
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6))
    first = next(iter(paths.values()))
    for i, (name, path) in enumerate(paths.items()):
        parts = toy_blocks.distances(first, path), path.gradients_apart, path.kernels_alike
        for axis, values in zip(axes, parts, strict=True):
            if path is not first:
                values = np.maximum(values, 1e-17) if axis is not axes[2] else values
                axis.plot(values, color=f"C{i}", ls=("-", "-", "--")[i % 3], label=name)
    axes[0].set_ylabel("|merged kernel - single's| / its way")
    axes[1].set_ylabel("gradients: |a - b| / (|a| + |b|)")
    axes[2].set_ylabel("cosine of two branches' kernels")
    for axis in axes:
        axis.set_xlabel("step")
    for axis in axes[:2]:
        axis.set_yscale("log")
    axes[0].legend(frameon=False, fontsize="small")
    return finished(figure)


def cycles(histories: dict[str, History]) -> Figure:
    """Loss, schedules and angle per step over cycles; a column per variant."""
    style()
    figure, axes = plt.subplots(
        3, len(histories), figsize=(3.7 * len(histories), 7.6), sharex=True, sharey="row"
    )
    for column, (name, history) in zip(axes.T, histories.items(), strict=True):
        epochs, restarts = pd.DataFrame(history.epochs), pd.DataFrame(history.restarts)
        column[0].plot(epochs.epoch + 0.5, epochs.loss, color=INK, lw=1.2, label="training, mean")
        for i, mode in enumerate(("eval", "train")):
            part = restarts[restarts["mode"] == mode]
            column[0].plot(
                part.epoch, part.after, "ov"[i], color=f"C{i}", label=f"after restart, {mode} mode"
            )
        column[1].step(epochs.epoch, epochs.rate, where="post", color="C2", label="λ")
        top = epochs.learning_rate.max()
        column[1].plot(
            epochs.epoch,
            epochs.learning_rate / top,
            color="C4",
            label="learning rate, of its start",
        )
        frame = pd.DataFrame(history.filters)
        for role, part in frame.groupby("role"):
            middle = part.groupby("epoch").angle.median()
            column[2].plot(
                middle.index + 0.5, middle, color=f"C{ROLES[role][0]}", label=f"{role} branch"
            )
        for epoch in sorted(set(restarts.epoch)):
            for axis in column:
                axis.axvline(epoch, color=MUTED, ls="--", lw=0.8)
        column[0].set_title(name, fontsize="medium")
        column[2].set_xlabel("epoch")
    axes[0, 0].set_yscale("log")
    axes[2, 0].set_yscale("log")
    axes[0, 0].set_ylabel("cross-entropy")
    axes[1, 0].set_ylabel("schedules")
    axes[2, 0].set_ylabel("angle per step, radians\n(median over layers)")
    for axis in axes[:, -1]:
        axis.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return finished(figure)


def restores(changes: dict[str, list[dict]]) -> Figure:
    """By what a restore multiplies effective learning rates and next angles, per convolution."""
    style()
    frames = {norm: pd.DataFrame(rows) for norm, rows in changes.items()}
    first = next(iter(frames.values()))
    names = zip(first.block, first.convolution, strict=True)
    labels = [f"{block.removesuffix('.block')}  {name}" for block, name in names]
    figure, axes = plt.subplots(
        2, len(frames), figsize=(3.6 * len(frames) + 1.4, 6.4), sharey=True, sharex="row"
    )
    for column, (norm, frame) in zip(axes.T, frames.items(), strict=True):
        heights = np.arange(len(frame))[::-1]
        for role, (colour, marker) in ROLES.items():
            chosen = (frame.role == role).to_numpy()
            part, at = frame[chosen], heights[chosen]
            column[0].hlines(at, 1, part.factor, color=f"C{colour}", lw=1)
            column[0].plot(part.factor, at, marker, color=f"C{colour}", label=f"{role} branch")
            column[1].hlines(at, part.angle_before, part.angle_after, color=f"C{colour}", lw=1)
            column[1].plot(part.angle_before, at, "|", color=f"C{colour}", ms=9, label="before")
            column[1].plot(part.angle_after, at, marker, color=f"C{colour}", label="after")
        column[0].axvline(1, color=INK, lw=0.8)
        column[0].set_title(f"norm = {norm!r}", fontsize="medium")
        column[0].set_yticks(heights, labels)
        for axis in column:
            axis.set_xscale("log")
            axis.grid(axis="x", color="#e4e7eb")
        column[0].set_xlabel("lr / |w|², after / before")
        column[1].set_xlabel("angle of the next step, radians")
    for axis in axes[:, -1]:
        axis.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return finished(figure)


def taps(maps: dict[str, Tensor]) -> Figure:
    """How fast every tap of a kernel learns, relative to the slowest one: maps (k, k) by name."""
    style()
    figure, axes = plt.subplots(1, len(maps), figsize=(2.1 * len(maps), 2.6), squeeze=False)
    for axis, (name, values) in zip(axes[0], maps.items(), strict=True):
        values = (values / values.min()).numpy()
        sns.heatmap(
            values, ax=axis, annot=True, fmt=".2f", cbar=False, square=True, cmap="cividis",
            vmin=1, vmax=max(float(v.max() / v.min()) for v in maps.values()),
            xticklabels=False, yticklabels=False,
        )  # fmt: skip
        axis.set_title(name, fontsize="small")
    return finished(figure)


def finished(figure: Figure) -> Figure:
    """Laid out, and shown once only."""
    figure.tight_layout()
    plt.close(figure)
    return figure
