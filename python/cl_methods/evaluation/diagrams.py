"""Figures of the tasks one by one: bars per data set, and reliability diagrams."""

from __future__ import annotations

from textwrap import fill

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cl_methods.evaluation.boards import Board, Group
from cl_methods.evaluation.figures import FAINT, INK, colors_of, headline, legend_below

_METRICS = ("transfer", "average", "last")
_ROOM = 0.82  # of the distance between two tasks, for the bars of one


def bars(board: Board) -> Figure:
    """Transfer, Average and Last of every task: a bar per method and a line across for zero-shot; seeds are averaged.

    Joint training has bars in Last alone. The first task has no Transfer.
    """
    groups = board.compared()
    colors = colors_of(board.groups)
    count = len(board.tasks)
    width = min(26.0, max(7.0, 1.2 + count * (0.35 + 0.17 * max(len(groups), 1))))
    figure = Figure(figsize=(width, 6.6 + 0.1 * len(groups)), layout="constrained")
    panels = figure.subplots(3, 1, sharex=True, sharey=True)
    places, bar = np.arange(count), _ROOM / max(len(groups), 1)
    zero_shot = np.array(board.zero_shot)
    for panel, metric in zip(panels, _METRICS, strict=True):
        baseline = zero_shot.copy()
        if metric == "transfer":
            baseline[0] = np.nan
            panel.text(0, 2, "no Transfer", ha="center", va="bottom", fontsize=7.5, color=FAINT)
        panel.hlines(baseline, places - 0.46, places + 0.46, color=INK, linestyle=":", linewidth=1.3, zorder=3)
        for number, group in enumerate(groups):
            if not group.continual and metric != "last":
                continue
            centres = places + (number - (len(groups) - 1) / 2) * bar
            panel.bar(
                centres, group.per_task(metric), width=0.9 * bar, color=colors[group.label], linewidth=0, zorder=2
            )
        panel.set_title(metric.capitalize(), loc="left", fontsize=10, fontweight="bold", color=INK)
        panel.set_xlim(-0.6, count - 0.4)
        panel.set_ylim(0, 100)
        panel.yaxis.grid(visible=True, color=FAINT, alpha=0.3, linewidth=0.6)
        panel.set_axisbelow(True)
        _plain(panel)
    panels[-1].set_xticks(places, board.tasks, fontsize=8, rotation=25 if count > 4 else 0, ha="right" if count > 4 else "center",
                          rotation_mode="anchor")  # fmt: skip
    handles: list[Artist] = [*panels[0].plot([], [], color=INK, linestyle=":", linewidth=1.3)]
    for group in groups:
        handles += panels[0].plot([], [], "s", markersize=7, color=colors[group.label])
    labels = [board.baseline, *(group.label + ("" if group.continual else " (bound)") for group in groups)]
    legend_below(figure, handles, labels)
    headline(figure, f"{board.title}: accuracy in %", 12)
    return figure


def reliability(board: Board) -> Figure | None:
    """How often each method is right when it is so sure, after the last task; None if no run of the board stored it.

    A panel per method, over the images of all tasks and seeds: bars are the share of right images in equally wide bins of the
    confidence, hollow parts up to the diagonal its gap to the mean confidence there, faint lines the single tasks. Grey at the
    foot: how the images are spread over the bins.
    """
    groups = [(group, pooled) for group in board.groups if (pooled := _pooled(group)) is not None]
    if not groups:
        return None
    columns = min(4, len(groups))
    rows = -(-len(groups) // columns)
    figure = Figure(figsize=(max(3.0 * columns, 5.4), 3.0 * rows + 0.5), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    colors = colors_of(board.groups)
    for panel, (group, tasks) in zip(panels, groups, strict=False):
        _reliability_panel(panel, tasks, colors[group.label])
        error = group.values("calibration_error")
        title = fill(group.label, 34) + (f"\nECE {error.mean():.1f}" if len(error) else "")
        panel.set_title(title, loc="left", fontsize=9, fontweight="bold", color=INK)
    for number, panel in enumerate(panels):
        panel.set_visible(number < len(groups))
        panel.tick_params(labelbottom=True, labelleft=True)
        if number + columns >= len(groups):
            panel.set_xlabel("confidence", fontsize=9, color=INK)
        if number % columns == 0:
            panel.set_ylabel("share of right images", fontsize=9, color=INK)
    headline(figure, f"{board.title}: reliability after the last task", 11)
    return figure


def _pooled(group: Group) -> np.ndarray | None:
    """(3, T, bins) images, right ones and summed confidences over the seeds that stored them in the same bins."""
    stored = [result["reliability"] for result in group.results if result.get("reliability")]
    found = [[[task[key] for task in tasks] for key in ("count", "correct", "confidence")] for tasks in stored]
    shapes = {np.shape(values) for values in found}
    return np.sum(found, axis=0, dtype=float) if len(shapes) == 1 else None


def _reliability_panel(panel: Axes, tasks: np.ndarray, color: str) -> None:
    count, correct, confidence = tasks.sum(axis=1)
    edges = np.linspace(0, 1, len(count) + 1)
    width = edges[1]
    full = count > 0
    accuracy, mean = correct[full] / count[full], confidence[full] / count[full]
    left = edges[:-1][full]
    panel.bar(
        left, accuracy, width=width, align="edge", color=color, alpha=0.75, edgecolor="white", linewidth=0.6, zorder=2
    )
    panel.bar(left, mean - accuracy, bottom=accuracy, width=width, align="edge", fill=False, edgecolor=INK, linewidth=0.7,
              hatch="////", alpha=0.35, zorder=3)  # fmt: skip
    for images, right, sure in tasks.transpose(1, 0, 2):
        some = images > 0
        panel.plot(sure[some] / images[some], right[some] / images[some], color=INK, linewidth=0.6, alpha=0.3, zorder=4)
    panel.plot([0, 1], [0, 1], color=INK, linestyle=":", linewidth=1.2, zorder=5)
    panel.bar(
        edges[:-1],
        -0.14 * count / count.max(),
        width=width,
        align="edge",
        color=FAINT,
        edgecolor="white",
        linewidth=0.6,
    )
    panel.axhline(0, color=FAINT, linewidth=0.8)
    panel.set_xlim(0, 1)
    panel.set_ylim(-0.16, 1.02)
    panel.set_yticks(np.linspace(0, 1, 6))
    _plain(panel)


def _plain(panel: Axes) -> None:
    panel.tick_params(length=2, labelsize=8, colors=INK)
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(FAINT)
