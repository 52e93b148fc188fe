"""Figures of a history: how many times ours a peer costs, and how costs of ours went over time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from textwrap import shorten

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from cl_methods.bench.record import Record
from cl_methods.bench.rows import OURS, Row, over_ours
from cl_methods.bench.tables import COLUMNS

_COLORS = {
    "seconds": "#0072B2",
    "operations": "#D55E00",
    "flops": "#009E73",
    "peak_bytes": "#CC79A7",
    "saved_bytes": "#E69F00",
    "live_bytes": "#8C564B",
    "text_flops": "#009E73",
    "text_calls": "#D55E00",
    "image_flops": "#56B4E9",
    "synchronisations": "#7F3C8D",
}
_INK, _FAINT, _LINE = "#222222", "#b0b0b0", 0.3
_SETTLED = 0.05
_LABELLED = 6


def of_group(group: Sequence[Record]) -> dict[str, Figure]:
    """Figures of records of one key, oldest first, by name: ``peers`` where there are some, ``time`` from two records on."""
    found = {}
    if over_ours(group[-1].rows):
        found["peers"] = beside_peers(group[-1])
    if len(group) > 1:
        found["time"] = over_time(group)
    return found


def beside_peers(record: Record) -> Figure:
    """A line per case and peer: how many times the cost of ours it takes, on a logarithmic axis; right of 1 ours is cheaper."""
    ratios = over_ours(record.rows)
    names = [f"{shorten(case, 62, placeholder=' …')}  |  {peer}" for case, peer in ratios]
    several = len({peer for _, peer in ratios}) > 1
    labels = names if several else [shorten(case, 80, placeholder=" …") for case, _ in ratios]
    figure = Figure(figsize=(11, 1.5 + _LINE * len(labels)), layout="constrained")
    panel = figure.subplots()
    costs = [cost for cost in COLUMNS if any(cost in row for row in ratios.values())]
    for cost in costs:
        points = [(row[cost], -place) for place, row in enumerate(ratios.values()) if row.get(cost)]
        if points:
            xs, ys = zip(*points, strict=True)
            panel.plot(xs, ys, "o", color=_COLORS[cost], markersize=5.5, alpha=0.85, label=COLUMNS[cost])
    panel.axvline(1, color=_INK, linewidth=1)
    panel.set_xscale("log")
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    panel.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if str(value)[0] in "25" else ""))
    panel.set_yticks([-place for place in range(len(labels))], labels)
    panel.set_ylim(-len(labels) + 0.4, 0.6)
    panel.set_title("peer's cost over ours, latest record", loc="left", fontsize=11)
    _plain(panel)
    figure.legend(loc="outside lower center", ncols=len(costs), frameon=False)
    return figure


def over_time(group: Sequence[Record]) -> Figure:
    """A panel per cost, a line per case: the cost of ours over that in its first record; what moved is labelled."""
    costs = [cost for cost in COLUMNS if sum(_costs(record, cost) for record in group) > 1]
    columns = min(3, max(1, len(costs)))
    rows = -(-max(1, len(costs)) // columns)
    figure = Figure(figsize=(11, 3.1 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel, cost in zip(panels, costs, strict=False):
        _trend(panel, group, cost)
    for panel in panels[len(costs) :]:
        panel.set_visible(False)
    return figure


def _costs(record: Record, cost: str) -> bool:
    return any(row.implementation == OURS and row.value(cost) for row in record.rows)


def _value(record: Record, row: Row, cost: str) -> float | None:
    """A cost of ours; times over the mean of those of its peers in the same run, where it has some."""
    value = row.value(cost)
    if value is None or cost != "seconds":
        return value
    peers = [other.value(cost) for other in record.rows if other.case == row.case and other.implementation != OURS]
    logarithms = [math.log(peer) for peer in peers if peer]
    return value / math.exp(sum(logarithms) / len(logarithms)) if logarithms else value


def _trend(panel: Axes, group: Sequence[Record], cost: str) -> None:
    lines: dict[str, list[tuple[int, float]]] = {}
    for place, record in enumerate(group):
        for row in record.rows:
            value = _value(record, row, cost) if row.implementation == OURS else None
            if value:
                lines.setdefault(row.case, []).append((place, value))
    moved = {case: max(abs(math.log(value / line[0][1])) for _, value in line) for case, line in lines.items()}
    most = sorted((case for case in moved if moved[case] > _SETTLED), key=lambda case: -moved[case])[:_LABELLED]
    colors = list(dict.fromkeys(_COLORS.values()))
    for case, line in lines.items():
        xs, values = zip(*line, strict=True)
        relative = [value / values[0] for value in values]
        shown = case in most
        color = colors[most.index(case) % len(colors)] if shown else _FAINT
        panel.plot(
            xs,
            relative,
            "o-",
            color=color,
            linewidth=1.6 if shown else 0.8,
            markersize=3.5,
            zorder=3 if shown else 2,
            label=shorten(case, 44, placeholder=" …") if shown else None,
        )
    panel.axhline(1, color=_INK, linewidth=0.8)
    beside = " beside peers" if cost == "seconds" else ""
    panel.set_title(f"{COLUMNS[cost]}{beside}, over the first record", loc="left", fontsize=10)
    labels = [f"{record.date[5:10]}\n{record.commit[:7]}{'+' if record.dirty else ''}" for record in group]
    step = max(1, len(group) // 6)
    panel.set_xticks(range(0, len(group), step), labels[::step], fontsize=8)
    low, high = panel.get_ylim()
    panel.set_ylim(min(low, 0.95), max(high, 1.05))
    _plain(panel)
    if most:
        panel.legend(frameon=False, fontsize=8)


def _plain(panel: Axes) -> None:
    panel.grid(axis="x" if panel.get_xscale() == "log" else "y", color="#e6e6e6", linewidth=0.8)
    panel.set_axisbelow(True)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
