"""The figure of measured steps: a panel for each dimension, processor seconds measured and predicted, FLOPs counted."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

COLOURS = {"zscl": "#0072B2", "moe_adapters": "#D55E00", "mulki": "#009E73", "clap4clip": "#CC79A7"}
NAMES = {"zscl": "ZSCL", "moe_adapters": "MoE-Adapters", "mulki": "MulKI", "clap4clip": "CLAP4CLIP"}
COUNTED = "#999999"
MODEL = "sizes"
"""Of the two time models, the one whose predictions are drawn."""


def draw(found: dict[str, Any]) -> Figure:
    """Measured as dots, predicted (by constants fitted without the step) as crosses, FLOPs as lines on the right-hand scale."""
    groups: dict[tuple[str, bool], list[dict[str, Any]]] = {}
    for row in found["cases"]:
        groups.setdefault((row["axis"], row["model"] == "mini"), []).append(row)
    groups = {key: sorted(rows, key=lambda row: row["value"]) for key, rows in groups.items()}
    columns = 4
    lines = -(-len(groups) // columns)
    figure = Figure(figsize=(3.1 * columns, 2.5 * lines + 0.4), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for panel, ((axis, mini), rows) in zip(panels, groups.items(), strict=False):
        _panel(panel, _title(axis, mini, rows), rows)
    for panel in panels[len(groups) :]:
        panel.set_axis_off()
    handles = [Line2D([], [], color=colour, marker="o", ls="", label=NAMES[name]) for name, colour in COLOURS.items()]
    handles += [
        Line2D([], [], color="black", marker="o", ls="", label="processor seconds, measured (left)"),
        Line2D([], [], color="black", marker="x", ls="", label="predicted, step not seen"),
        Line2D([], [], color=COUNTED, label="GFLOPs, counted (right)"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False, fontsize=7.5)
    return figure


def _title(axis: str, mini: bool, rows: list[dict[str, Any]]) -> str:
    models = {row["model"] for row in rows}
    return f"{axis} of ViT" if len(models) > 1 else f"{axis} ({'mini' if mini else models.pop()})"


def _panel(panel: Axes, title: str, rows: list[dict[str, Any]]) -> None:
    right = panel.twinx()
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        at, colour = [row["value"] for row in own], COLOURS[method]
        right.plot(at, [row["flops"] / 1e9 for row in own], "-", color=COUNTED, linewidth=1)
        panel.plot(at, [row["seconds"] for row in own], "o", color=colour, markersize=4.5)
        panel.plot(at, [row["predicted"][MODEL] for row in own], "x", color=colour, markersize=6)
    values = sorted({row["value"] for row in rows})
    seconds = [row["seconds"] for row in rows] + [row["predicted"][MODEL] for row in rows]
    flops = [row["flops"] / 1e9 for row in rows]
    # Both scales span the same number of decades, so that what is proportional to FLOPs runs along its line.
    decades = 1.25 * max(max(seconds) / min(seconds), max(flops) / min(flops)) ** 0.5
    for part, shown in ((panel, seconds), (right, flops)):
        middle = (max(shown) * min(shown)) ** 0.5
        part.set(yscale="log", ylim=(middle / max(decades, 2), middle * max(decades, 2)))
        digits = (1, 2, 5) if decades > 4 else (1, 1.5, 2, 3, 4, 5, 7)
        ticks = [digit * 10.0**power for power in range(-4, 4) for digit in digits]
        low, high = part.get_ylim()
        part.set_yticks([tick for tick in ticks if low <= tick <= high], [f"{t:g}" for t in ticks if low <= t <= high])
        part.minorticks_off()
        part.tick_params(labelsize=6.5)
        part.spines["top"].set_visible(False)
    panel.set(xscale="log")
    panel.set_title(title, fontsize=8.5)
    panel.set_xticks(values, [f"{value:,g}" for value in values])
    panel.minorticks_off()
    right.tick_params(colors=COUNTED)
