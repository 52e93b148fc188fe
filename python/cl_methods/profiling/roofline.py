"""The roofline of a profile: what was reached beside what the machine reaches at best."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from cl_kernels.profile import AdapterProfile, Operation
from cl_kernels.profile.result import count
from cl_methods.evaluation.figures import FAINT, INK

_MODEL, _MOUNTED = "#0072B2", "#D55E00"
_SHOWN = 7
_MARKERS = "os^Dv<>PX"


@dataclass(frozen=True)
class Dot:
    """Work of some operations together.

    Attributes:
        label: what they are.
        flops, bytes: of all.
        seconds: inside them.
    """

    label: str
    flops: int
    bytes: int
    seconds: float

    @property
    def intensity(self) -> float:
        """FLOPs per byte."""
        return self.flops / self.bytes

    @property
    def rate(self) -> float:
        """FLOPs per second."""
        return self.flops / self.seconds


def roofline(profile: AdapterProfile) -> Figure:
    """Operators that take most time, and what is mounted, in plain PyTorch and with our kernels.

    Raises:
        ValueError: nothing was timed.
    """
    if profile.ceilings is None:
        raise ValueError("profile: expected one with times, got one from shapes alone")
    ceilings = profile.ceilings
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    axes = figure.subplots()
    kinds = operators(profile.sides["adapted"].record.operations)
    both = [mounted(profile.sides[side].record.operations, profile.mounted, label)
            for side, label in (("eager", "mounted, plain PyTorch"), ("adapted", "mounted, fused"))]  # fmt: skip
    dots = [*kinds, *(dot for dot in both if dot is not None)]
    intensities = [dot.intensity for dot in dots] or [ceilings.ridge]
    x = np.geomspace(min(0.3 * ceilings.ridge, *intensities) / 2, max(3 * ceilings.ridge, *intensities) * 3, 200)
    axes.plot(x, np.minimum(x * ceilings.bytes_per_second, ceilings.flops_per_second), color=INK, linewidth=1.4)
    axes.text(x[-1], ceilings.flops_per_second * 1.08, f"matrix product {count(ceilings.flops_per_second)}FLOP/s",
              ha="right", fontsize=8, color=INK)  # fmt: skip
    axes.annotate(f"copy {count(ceilings.bytes_per_second)}B/s", (x[0], x[0] * ceilings.bytes_per_second), fontsize=8,
                  xytext=(12, 0), textcoords="offset points", va="center", color=INK)  # fmt: skip
    for place, dot in enumerate(dots):
        inside = dot.label.startswith("mounted")
        axes.plot(
            dot.intensity, dot.rate, _MARKERS[place % len(_MARKERS)], color=_MOUNTED if inside else _MODEL, markersize=7,
            alpha=0.9, linestyle="none", label=f"{dot.label}  {count(dot.rate)}FLOP/s",
        )  # fmt: skip
    if all(both):
        start, end = ((dot.intensity, dot.rate) for dot in both if dot is not None)
        axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": _MOUNTED, "shrinkA": 5, "shrinkB": 5})
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOPs per byte of arguments and results", fontsize=9, color=INK)
    axes.set_ylabel("FLOP/s", fontsize=9, color=INK)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))
    axes.tick_params(labelsize=8, colors=INK, length=2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    figure.legend(fontsize=8, frameon=False, loc="outside right upper")
    axes.grid(True, which="major", color=FAINT, linewidth=0.3)
    return figure


def operators(operations: Iterable[Operation]) -> list[Dot]:
    """Those with FLOPs that take most time together, most first."""
    sums: dict[str, list[float]] = {}
    for operation in operations:
        if operation.flops:
            total = sums.setdefault(operation.name.partition("::")[2].lstrip("_"), [0, 0, 0.0])
            for place, value in enumerate((operation.flops, operation.bytes, operation.seconds)):
                total[place] += value
    dots = [Dot(name, int(flops), int(moved), seconds) for name, (flops, moved, seconds) in sums.items() if seconds > 0]
    return sorted(dots, key=lambda dot: -dot.seconds)[:_SHOWN]


def mounted(operations: Iterable[Operation], names: frozenset[str], label: str) -> Dot | None:
    """All operations inside the named modules, forward and backward; None if they do no work."""
    inside = [o for o in operations if o.phase != "optimizer" and not names.isdisjoint(o.stack)]
    dot = Dot(label, sum(o.flops for o in inside), sum(o.bytes for o in inside), sum(o.seconds for o in inside))
    return dot if dot.flops and dot.seconds > 0 else None
