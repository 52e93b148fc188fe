"""Figures of a profile: waterfall of the step, costs by layer, memory over time, roofline."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from cl_kernels.profile import AdapterProfile, Operation
from cl_kernels.profile.result import count, duration, size
from cl_methods.evaluation.figures import FAINT, INK, png
from cl_methods.profiling.roofline import roofline

__all__ = ["all_figures", "png"]

MODEL, MOUNTED, OUTSIDE, UPDATE, OVERHEAD = "#0072B2", "#D55E00", "#777777", "#009E73", "#CCCCCC"
_PHASES = {"forward": "#f4f4f4", "backward": "#e6e6e6", "optimizer": "#f4f4f4"}
_NAMES = {"optimizer": "optimiser"}  # in the API it has torch's name


def all_figures(profile: AdapterProfile) -> dict[str, tuple[str, Figure]]:
    """{file name without suffix: (title, figure)}."""
    found = {
        "waterfall": ("Where a training step goes", waterfall(profile)),
        "layers": ("What every layer adds", layers(profile)),
        "memory": ("Live memory over a step", memory(profile)),
    }
    if profile.ceilings is not None:
        found["roofline"] = ("Roofline", roofline(profile))
    return found


def waterfall(profile: AdapterProfile) -> Figure:
    """Parts of the step one after the other: by time, or by FLOPs where nothing was timed, and by dispatched operations."""
    parts = _parts(profile.sides["adapted"].record.operations, profile.mounted)
    names = list(parts)
    counted = [float(len(operations)) for operations in parts.values()]
    if profile.timed:
        first = [sum(o.seconds for o in operations) for operations in parts.values()]
        rest = max(0.0, profile.seconds["fused"].median - sum(first))
        panels = [("time", [*first, rest], duration), ("dispatched operations", [*counted, 0.0], _whole)]
        names.append("Python, dispatch, autograd")
    else:
        flops = [float(sum(o.flops for o in operations)) for operations in parts.values()]
        panels = [("FLOPs", flops, count), ("dispatched operations", counted, _whole)]
    figure = Figure(figsize=(11, 0.36 * len(names) + 1.3), layout="constrained")
    for axes, (title, values, text) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
        _waterfall(axes, names, values, text)
        axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color=INK)
    return figure


def _waterfall(axes: Axes, names: Sequence[str], values: Sequence[float], text: Callable[[float], str]) -> None:
    starts = np.concatenate([[0.0], np.cumsum(values)[:-1]])
    total = sum(values) or 1.0
    axes.barh(names, values, left=starts, color=[_color(name) for name in names], height=0.66)
    for place, (start, value) in enumerate(zip(starts, values, strict=True)):
        after = start + value < 0.72 * total
        axes.text(
            start + value + 0.01 * total if after else start - 0.01 * total, place,
            f"{text(value).strip()}  {value / total:.0%}", va="center", ha="left" if after else "right", fontsize=8, color=INK,
        )  # fmt: skip
    axes.set_xlim(0, 1.02 * total)
    axes.set_ylim(len(names) - 0.4, -0.6)
    _plain(axes, text)


def layers(profile: AdapterProfile) -> Figure:
    """Blocks from first to last: what each adds to forward FLOPs, costs backward, keeps, and dispatches."""
    rows = [row for row in profile.layers if row.base is not None and row.name.rpartition(".")[2].isdigit()]
    rows = [row for row in rows if row.difference()["operations_forward"] or row.cost.operations_backward] or rows
    rows = rows or [row for row in profile.layers if row.cost.operations]
    changes = [row.difference() for row in rows]
    added = [float(change["flops_forward"] or 0) for change in changes]
    more = [float(sum(change[f"operations_{part}"] or 0 for part in ("forward", "backward"))) for change in changes]
    panels: list[tuple[str, list[float], Callable[[float], str]]] = [
        ("FLOPs forward, added", added, count),
        ("FLOPs backward", [float(row.cost.flops_backward) for row in rows], count),
        ("kept for backward", [float(row.cost.bytes_saved) for row in rows], size),
        ("operations, added", more, _whole),
    ]
    figure = Figure(figsize=(11, 0.2 * len(rows) + 1.1), layout="constrained")
    for axes, (title, values, text) in zip(figure.subplots(1, 4, sharey=True), panels, strict=True):
        axes.barh(range(len(rows)), values, color=MOUNTED if "added" in title else MODEL, height=0.7)
        axes.set_yticks(range(len(rows)), [_short(row.name) for row in rows], fontsize=7)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_title(title, loc="left", fontsize=9, fontweight="bold", color=INK)
        axes.set_xlim(min(0, *values), max(*values, 1) * 1.05) if len(values) > 1 else axes.set_xlim(
            0, max(values[0], 1)
        )
        _plain(axes, text, 3)
    return figure


def memory(profile: AdapterProfile) -> Figure:
    """Bytes of the step's own tensors after each operation: training step, plain PyTorch, frozen forward pass."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    axes = figure.subplots()
    operations = profile.sides["adapted"].record.operations
    begins = 0.0
    for phase, width in _widths(operations).items():
        axes.axvspan(begins, begins + width, color=_PHASES[phase], zorder=0, linewidth=0)
        name, above = _NAMES.get(phase, phase), axes.get_xaxis_transform()
        axes.text(begins + width / 2, 1.01, name, transform=above, ha="center", fontsize=8, color=INK)
        begins += width
    for side, label, color in (
        ("eager", "plain PyTorch, forward and backward", OUTSIDE), ("base", "frozen, forward", MODEL),
        ("adapted", "training step", MOUNTED),
    ):  # fmt: skip
        live = [0, *(operation.live for operation in profile.sides[side].record.operations)]
        share = _progress(profile.sides[side].record.operations, operations)
        axes.plot(share, live, color=color, linewidth=1.4, label=label, drawstyle="steps-post")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, None)
    axes.set_xticks([])
    axes.set_xlabel("operations of each phase, in order", fontsize=9, color=INK)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: size(value)))
    axes.tick_params(labelsize=8, colors=INK, length=2)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(fontsize=8, frameon=False, loc="outside lower right", ncols=3)
    return figure


def _widths(operations: Sequence[Operation]) -> dict[str, float]:
    """Shares of the axis: the optimiser's many small operations would leave no room for what matters."""
    wanted = {"forward": 0.4, "backward": 0.4, "optimizer": 0.2}
    present = {phase: width for phase, width in wanted.items() if any(o.phase == phase for o in operations)}
    return {phase: width / sum(present.values()) for phase, width in present.items()}


def _progress(operations: Sequence[Operation], reference: Sequence[Operation]) -> np.ndarray:
    """Places of the operations on the axis of another step: every phase has the width that it has there."""
    places, begins = [0.0], 0.0
    for phase, width in _widths(reference).items():
        number = sum(o.phase == phase for o in operations)
        places += [begins + width * (place + 1) / number for place in range(number)]
        begins += width
    return np.array(places)


def _parts(operations: Sequence[Operation], mounted: frozenset[str]) -> dict[str, list[Operation]]:
    """Operations by phase and by where they belong, in the order of the step."""
    found: dict[str, list[Operation]] = {}
    for operation in operations:
        found.setdefault(_part(operation, mounted), []).append(operation)
    order = {"forward": 0, "backward": 1, "optimiser": 2}
    return dict(sorted(found.items(), key=lambda entry: order.get(entry[0].partition(":")[0], 3)))


def _part(operation: Operation, mounted: frozenset[str]) -> str:
    if operation.phase in _NAMES:
        return _NAMES[operation.phase]
    if not operation.stack:
        return f"{operation.phase}: loss and the rest"
    if not mounted.isdisjoint(operation.stack):
        return f"{operation.phase}: mounted"
    return f"{operation.phase}: {'image tower' if operation.stack[0] == 'visual' else 'the rest of the model'}"


def _color(name: str) -> str:
    endings = {"mounted": MOUNTED, "optimiser": UPDATE, "rest": OUTSIDE, "autograd": OVERHEAD}
    return next((color for ending, color in endings.items() if name.endswith(ending)), MODEL)


def _short(name: str) -> str:
    parts = name.split(".")
    return f"{parts[0]} {parts[-1]}" if len(parts) > 1 else name


def _plain(axes: Axes, text: Callable[[float], str], ticks: int = 5) -> None:
    axes.xaxis.set_major_locator(_locator(ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: text(value).strip() if value else "0"))
    axes.tick_params(labelsize=8, colors=INK, length=2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)


def _locator(ticks: int):  # type: ignore[no-untyped-def]
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(ticks)


def _whole(value: float) -> str:
    return f"{value:,.0f}"
