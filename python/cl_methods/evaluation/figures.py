"""Figures: accuracy per task over time, accuracy matrices, and the summary of several methods."""

from __future__ import annotations

import io
from pathlib import Path
from textwrap import fill

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from cl_methods.evaluation.boards import Board, Group

_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F3C8D", "#666666")
_OF_METHOD = {"finetune": "#D55E00", "zscl": "#0072B2", "moe_adapters": "#009E73", "joint": "#444444"}
INK, FAINT, _BEFORE = "#222222", "#9a9a9a", "#efefef"
_DPI = 160
_BOLD = 0.7
"""Width of a bold letter for its height: more than most are, so that no line of them is wider."""


def accuracy_over_time(board: Board) -> Figure:
    """One panel per task, all on one scale: accuracy before any training and after each task, with zero-shot dotted.

    Grey is the time before the panel's task is learnt, where transfer shows; after it, forgetting does. Several seeds are
    drawn as their mean with a band of one standard deviation. The last panel is the mean over tasks.
    """
    groups = board.compared()
    count = len(board.tasks)
    columns = min(4, count + 1)
    rows = -(-(count + 1) // columns)
    figure = Figure(figsize=(3.0 * columns, 2.35 * rows + 0.9), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    steps = np.arange(count + 1)
    colors = colors_of(groups)
    for index, panel in enumerate(panels[: count + 1]):
        mean_panel = index == count
        baseline = np.mean(board.zero_shot) if mean_panel else board.zero_shot[index]
        chance = None if board.chance is None else np.mean(board.chance) if mean_panel else board.chance[index]
        panel.axhline(baseline, color=INK, linestyle=":", linewidth=1.2, zorder=1)
        if chance is not None:
            panel.axhline(chance, color=FAINT, linestyle=(0, (1, 4)), linewidth=0.9, zorder=1)
        if not mean_panel:
            panel.axvspan(-0.5, index + 0.5, color=_BEFORE, zorder=0, linewidth=0)
        for group in groups:
            curves = group.curves().mean(axis=2) if mean_panel else group.curves()[:, :, index]
            _curve(panel, steps, curves, colors[group.label], group)
        title = "mean of all tasks" if mean_panel else f"{index + 1}  {board.tasks[index]}"
        panel.set_title(title, loc="left", fontsize=10, fontweight="bold", color=INK)
        panel.set_xlim(-0.3, count + 0.3)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        panel.yaxis.set_major_locator(MaxNLocator(5))
        panel.tick_params(labelsize=8, colors=INK, length=2)
        panel.tick_params(labelbottom=True, labelleft=True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.spines[["left", "bottom"]].set_color(FAINT)
    panels[0].set_ylim(*_limits(panels[0]))
    for panel in panels[count + 1 :]:
        panel.set_visible(False)
    for panel in panels[max(0, count + 1 - columns) : count + 1]:
        panel.set_xlabel("tasks learnt", fontsize=9, color=INK)
    _legend(figure, panels[0], board, groups, colors)
    headline(figure, f"{board.title}: accuracy in %", 12)
    return figure


def matrix(board: Board) -> Figure:
    """A heat map per method: accuracy on every task (columns) after every task (rows), zero-shot row first.

    Colour is the difference to zero-shot, the number is the accuracy; several seeds are averaged.
    """
    groups = [group for group in board.compared() if group.continual] or board.groups
    count = len(board.tasks)
    columns = min(len(groups), 2 if len(groups) in (2, 4) or count > 8 else 3)
    rows = -(-len(groups) // columns)
    cell = 0.52
    figure = Figure(figsize=((cell * count + 1.5) * columns + 0.8, (cell * 0.72 * (count + 1) + 1.25) * rows + 0.3),
                    layout="constrained")  # fmt: skip
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    zero_shot = np.array(board.zero_shot)
    changes = [group.curves().mean(axis=0) - zero_shot for group in groups]
    limit = max(10.0, float(np.ceil(max(np.abs(change).max() for change in changes) / 10) * 10))
    for panel, group, change in zip(panels, groups, changes, strict=False):
        image = panel.imshow(change, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
        for (row, column), value in np.ndenumerate(change + zero_shot):
            dark = abs(change[row, column]) > 0.62 * limit
            weight = "bold" if row == column + 1 else "normal"
            color = "white" if dark else INK
            panel.text(
                column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color=color, fontweight=weight
            )
        panel.set_xticks(range(count), board.tasks, rotation=40, ha="right", rotation_mode="anchor", fontsize=8)
        panel.set_yticks(range(count + 1), [board.baseline, *(f"+ {task}" for task in board.tasks)], fontsize=8)
        panel.set_title(group.label, loc="left", fontsize=10, fontweight="bold", color=INK)
        panel.tick_params(length=0, colors=INK)
        panel.spines[:].set_visible(False)
        panel.plot([-0.5, count - 0.5], [0.5, 0.5], color="white", linewidth=3)
    for panel in panels[len(groups) :]:
        panel.set_visible(False)
    bar = figure.colorbar(image, ax=list(panels), shrink=0.7, aspect=30, pad=0.02)
    bar.set_label(
        f"change against {'the start' if board.conditions.get('start') else 'zero-shot'}, points", fontsize=8, color=INK
    )
    bar.ax.tick_params(labelsize=8, length=2)
    bar.outline.set_visible(False)
    headline(figure, f"{board.title}: accuracy in %", 11)
    return figure


def summary(board: Board) -> Figure:
    """Transfer, Average and Last of every method as dots with their spread; chance, zero-shot and joint as lines."""
    groups = [group for group in board.compared() if group.continual]
    colors = colors_of(board.groups)
    figure = Figure(figsize=(9.5, 0.46 * max(len(groups), 1) + 1.75), layout="constrained")
    panels = figure.subplots(1, 3, sharex=True, sharey=True)
    places = np.arange(len(groups))[::-1]
    joint = [group for group in board.groups if not group.continual]
    for panel, metric in zip(panels, ("transfer", "average", "last"), strict=True):
        part = slice(1, None) if metric == "transfer" and len(board.tasks) > 1 else slice(None)
        baseline = float(np.mean(board.zero_shot[part]))
        panel.axvline(baseline, color=INK, linestyle=":", linewidth=1.2)
        panel.annotate(board.baseline, (baseline, 1.0), xycoords=("data", "axes fraction"), xytext=(0, 2), fontsize=7.5,
                       textcoords="offset points", ha="center", color=INK)  # fmt: skip
        if joint and metric == "last":
            bound = float(joint[0].values("last").mean())
            panel.axvline(bound, color=_OF_METHOD["joint"], linestyle="--", linewidth=1.0)
            panel.annotate("joint", (bound, 1.0), xycoords=("data", "axes fraction"), xytext=(0, 2), fontsize=7.5,
                           textcoords="offset points", ha="center", color=INK)  # fmt: skip
        for place, group in zip(places, groups, strict=True):
            values = group.values(metric)
            if not len(values):
                continue
            mean, color = float(values.mean()), colors[group.label]
            panel.plot([baseline, mean], [place, place], color=color, linewidth=2.2, alpha=0.35, solid_capstyle="butt")
            if len(values) > 1:
                panel.errorbar(mean, place, xerr=values.std(ddof=1), color=color, capsize=3, linewidth=1.2)
            panel.plot(mean, place, "o", color=color, markersize=7)
            panel.annotate(f"{mean:.1f}", (mean, place), xytext=(0, 7), textcoords="offset points", ha="center",
                           fontsize=8.5, color=INK, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6})  # fmt: skip
        panel.set_title(metric.capitalize(), loc="left", fontsize=10, fontweight="bold", color=INK, pad=14)
        panel.margins(x=0.15)
        panel.set_ylim(-0.6, len(groups) - 0.4)
        panel.set_yticks(places, [group.label for group in groups], fontsize=9)
        panel.tick_params(length=0, labelsize=8, colors=INK)
        panel.tick_params(axis="y", labelsize=9)
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.spines["bottom"].set_color(FAINT)
    headline(figure, f"{board.title}: accuracy in %", 12)
    return figure


def colors_of(groups: list[Group]) -> dict[str, str]:
    """A colour per label; a method keeps its own from figure to figure."""
    spare = [color for color in _COLORS if color not in _OF_METHOD.values()]
    colors: dict[str, str] = {}
    for group in groups:
        own = _OF_METHOD.get(group.method)
        free = own is not None and own not in colors.values()
        colors[group.label] = own if own is not None and free else spare[len(colors) % len(spare)]
    return colors


def headline(figure: Figure, text: str, size: int) -> None:
    """A title over the whole figure, in as many lines as its width asks for; letters are ``size`` points high."""
    letters = int(0.97 * 72 * figure.get_figwidth() / (_BOLD * size))
    figure.suptitle(fill(text, letters), x=0.01, ha="left", fontsize=size, fontweight="bold", color=INK)


def legend_below(figure: Figure, handles: list[Artist], labels: list[str]) -> None:
    """A legend under the panels, in as many columns as the longest label leaves room for."""
    letter, handle = 0.105, 0.75  # inches: a wide letter of 9 points, and what stands before the label
    labels = [fill(label, int((figure.get_figwidth() - handle) / letter)) for label in labels]
    longest = max(len(line) for label in labels for line in label.splitlines())
    columns = max(1, int(figure.get_figwidth() / (handle + letter * longest)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=9, frameon=False)


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    for text in figure.findobj(Text):  # names from data are no formulas; matplotlib's own ticks may be
        if "$" in text.get_text() and r"\mathdefault" not in text.get_text():
            text.set_parse_math(False)
    figure.savefig(buffer, format="png", dpi=_DPI, facecolor="white")
    return buffer.getvalue()


def save(figure: Figure, path: Path) -> None:
    """Write the figure as a PNG file."""
    path.write_bytes(png(figure))


def _curve(panel: Axes, steps: np.ndarray, curves: np.ndarray, color: str, group: Group) -> None:
    if not group.continual:
        panel.axhline(curves[:, -1].mean(), color=color, linestyle="--", linewidth=1.0, zorder=2)
        return
    mean = curves.mean(axis=0)
    if len(curves) > 1:
        deviation = curves.std(axis=0, ddof=1)
        panel.fill_between(steps, mean - deviation, mean + deviation, color=color, alpha=0.18, linewidth=0, zorder=2)
    panel.plot(steps, mean, color=color, linewidth=1.8, marker="o", markersize=3, zorder=3)


def _limits(panel: Axes) -> tuple[float, float]:
    low, high = panel.get_ylim()
    return max(-2.0, low - 2), min(103.0, high + 2)


def _legend(figure: Figure, panel: Axes, board: Board, groups: list[Group], colors: dict[str, str]) -> None:
    handles: list[Artist] = []
    labels: list[str] = []
    for group in groups:
        style = {"linewidth": 1.8, "marker": "o", "markersize": 3} if group.continual else {"linestyle": "--"}
        handles += panel.plot([], [], color=colors[group.label], **style)
        labels.append(group.label + ("" if group.continual else " (bound)"))
    handles += panel.plot([], [], color=INK, linestyle=":", linewidth=1.2)
    labels.append(board.baseline)
    if board.chance is not None:
        handles += panel.plot([], [], color=FAINT, linestyle=(0, (1, 4)), linewidth=0.9)
        labels.append("chance")
    handles.append(Patch(facecolor=_BEFORE))
    labels.append("before it is learnt")
    legend_below(figure, handles, labels)
