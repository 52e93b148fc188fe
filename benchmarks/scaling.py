"""Time against one dimension at a time, ours and plain PyTorch turn about: where a kernel pays, and where it stops.

    python benchmarks/scaling.py --output docs/images

Writes scaling.json and one figure per operation, and prints for each curve where ours is slower.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from machine import DEVICE, ceilings
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

import cl_kernels as clk

Step = Callable[[], Any]
ROUNDS, ENOUGH = 7, 1.5
"""Rounds of each pair, and seconds after which a pair has had enough of them (but at least three)."""

ADAPTER = {"B": 16, "L": 197, "D": 768, "E": 22, "k": 2, "R": 64}
DISTILLATION = {"N": 64, "M": 4000, "d": 512}
AVERAGE = {"tensors": 100, "weights": 2**24}
SWEEPS: dict[str, tuple[dict[str, int], dict[str, Sequence[int]]]] = {
    "moe_adapter": (
        ADAPTER,
        {
            "B": (1, 2, 4, 8, 16, 32, 64),
            "L": (1, 4, 17, 50, 197, 577),
            "D": (96, 192, 384, 768, 1024),
            "E": (2, 4, 8, 22, 64),
            "k": (1, 2, 3, 4),
            "R": (8, 16, 32, 64, 128),
        },
    ),
    "token_routing": (ADAPTER | {"B": 3152, "L": 1}, {"B": (197, 788, 3152, 12608), "E": (2, 4, 8, 22, 64)}),
    "feature_distill_kl": (
        DISTILLATION,
        {"N": (8, 32, 64, 128, 256, 512), "M": (100, 400, 1000, 4000, 16000, 60000), "d": (64, 128, 256, 512, 768)},
    ),
    "average_": (AVERAGE, {"tensors": (1, 10, 100, 302, 1000, 3000), "weights": (2**12, 2**16, 2**20, 2**24, 2**27)}),
}
"""Operation -> the point that the curves cross, and the values of each dimension; the other dimensions stay there."""


def moe_adapter(B: int, L: int, D: int, E: int, k: int, R: int) -> tuple[Step, Step]:
    """Forward and backward, one choice of experts per sample; against one pass per expert over the samples that chose it."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=generator) * scale).to(DEVICE).requires_grad_()

    x, gates = normal(B, L, D), normal(B, k)
    ids = torch.stack([torch.randperm(max(E, k), generator=generator)[:k] % E for _ in range(B)]).to(DEVICE)
    weights = normal(E, R, D, scale=D**-0.5), normal(E, R), normal(E, D, R, scale=R**-0.5), normal(E, D)
    upstream = torch.randn(B, L, D, device=DEVICE)

    def step(backend: str | None) -> None:
        out = clk.moe_adapter(x, ids, gates, *weights, scale=0.1, residual=x, backend=backend)
        torch.autograd.grad(out, (x, gates, *weights), upstream)

    return (lambda: step(None)), (lambda: step("reference"))


def token_routing(B: int, L: int, D: int, E: int, k: int, R: int) -> tuple[Step, Step]:
    """The same with a choice for every one of B · L tokens; against sorting, two grouped products and sorting back."""
    ours, _ = moe_adapter(B * L, 1, D, E, k, R)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B * L, D, generator=generator).to(DEVICE).requires_grad_()
    ids = torch.stack([torch.randperm(max(E, k), generator=generator)[:k] % E for _ in range(B * L)]).to(DEVICE)
    gates = torch.randn(B * L, k, device=DEVICE).requires_grad_()
    down = (torch.randn(E, D, R, device=DEVICE) * D**-0.5).requires_grad_()
    up = (torch.randn(E, R, D, device=DEVICE) * R**-0.5).requires_grad_()
    down_bias, up_bias = (torch.randn(E, n, device=DEVICE).requires_grad_() for n in (R, D))
    upstream = torch.randn(B * L, D, device=DEVICE)

    def grouped() -> None:
        order = ids.flatten().argsort(stable=True)
        expert, token = ids.flatten()[order], order // k
        ends = torch.bincount(expert, minlength=E).cumsum(0).to(torch.int32)
        hidden = F.relu(F.grouped_mm(x[token], down, offs=ends) + down_bias[expert])
        y = F.grouped_mm(hidden, up, offs=ends) + up_bias[expert]
        out = x.index_add(0, token, 0.1 * gates.flatten()[order, None] * y)
        torch.autograd.grad(out, (x, gates, down, up, down_bias, up_bias), upstream)

    return ours, grouped


def feature_distill_kl(N: int, M: int, d: int) -> tuple[Step, Step]:
    """Both directions and the student's gradient; against logits, soft-max and cross-entropy."""
    generator = torch.Generator().manual_seed(0)
    student, teacher, anchors = (
        F.normalize(torch.randn(n, d, generator=generator), dim=-1).to(DEVICE) for n in (N, N, M)
    )
    student.requires_grad_()

    def ours() -> None:
        loss = clk.feature_distill_kl(student, teacher, anchors, logit_scale=100.0)
        torch.autograd.grad(loss, student)

    def plain() -> None:
        z_s, z_t = 100.0 * student @ anchors.T, 100.0 * teacher @ anchors.T
        pairs = ((z_t, z_s), (z_t.T, z_s.T))
        loss = sum(4.0 * F.cross_entropy(s / 2.0, F.softmax(t / 2.0, dim=1)) for t, s in pairs)
        torch.autograd.grad(loss, student)

    return ours, plain


def average_(tensors: int, weights: int) -> tuple[Step, Step]:
    """That many weights in that many tensors; against torch's own list operation."""
    averages, values = ([torch.randn(max(1, weights // tensors), device=DEVICE) for _ in range(tensors)] for _ in "av")
    return (lambda: clk.average_(averages, values, 0.3)), (lambda: torch._foreach_lerp_(averages, values, 0.3))


PEERS = {
    "moe_adapter": "plain PyTorch, expert by expert",
    "token_routing": "sort and grouped_mm",
    "feature_distill_kl": "logits, soft-max, cross-entropy",
    "average_": "torch._foreach_lerp_",  # a label that begins with an underscore would not be drawn
}


def turn_about(pair: tuple[Step, Step]) -> list[float]:
    """Best seconds of both, measured alternately, so that a busy moment of the machine meets both."""
    best = [float("inf")] * 2
    begin = time.perf_counter()
    for number in range(ROUNDS + 1):
        for which, step in enumerate(pair):
            start = time.perf_counter()
            step()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            if number:
                best[which] = min(best[which], time.perf_counter() - start)
        if number >= 3 and time.perf_counter() - begin > ENOUGH:
            break
    return best


def sweep(operation: str) -> dict[str, list[dict[str, float]]]:
    """Every curve of an operation: dimension -> points with ``value``, ``ours`` and ``peer`` seconds."""
    centre, dimensions = SWEEPS[operation]
    curves = {}
    for dimension, values in dimensions.items():
        curves[dimension] = []
        for value in values:
            ours, peer = turn_about(globals()[operation](**{**centre, dimension: value}))
            curves[dimension].append({"value": value, "ours": ours, "peer": peer})
        print(f"{operation:<20}{dimension:>8}  " + _line(curves[dimension]), flush=True)
    return curves


def _line(points: list[dict[str, float]]) -> str:
    return "  ".join(f"{p['value']}: {p['peer'] / p['ours']:.2f}x" for p in points)


def draw(operation: str, curves: dict[str, list[dict[str, float]]], where: str) -> Figure:
    """One panel per dimension, both axes logarithmic, the ratio written below ours."""
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(3.3 * columns, 2.6 * rows + 0.3), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for panel, (dimension, points) in zip(panels, curves.items(), strict=True):
        values = [p["value"] for p in points]
        for key, color, label in (("peer", "#999999", PEERS[operation]), ("ours", "#0072B2", "cl_kernels")):
            panel.plot(values, [1e3 * p[key] for p in points], "o-", color=color, markersize=3, label=label)
        for p in points:
            ratio = p["peer"] / p["ours"]
            color = "#0072B2" if ratio >= 1 else "#D55E00"
            panel.annotate(f"{ratio:.1f}x", (p["value"], 1e3 * p["ours"]), (0, -11), textcoords="offset points",
                           ha="center", fontsize=7, color=color)  # fmt: skip
        panel.set(xscale="log", yscale="log", xlabel=dimension)
        panel.set_xticks(
            values, [f"{value:,}" for value in values], fontsize=7, rotation=30 if max(values) > 999 else 0
        )
        panel.minorticks_off()
        panel.margins(x=0.1, y=0.15)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[::columns]:
        panel.set_ylabel("milliseconds")
    panels[0].legend(frameon=False, fontsize=7, loc="upper left")
    centre = ", ".join(f"{name} {value:,}" for name, value in SWEEPS[operation][0].items())
    figure.suptitle(f"{operation}: {centre}   ({where})", fontsize=9, x=0.01, ha="left")
    return figure


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/images"))
    parser.add_argument("--operation", choices=SWEEPS, action="append", help="these alone")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    best = ceilings()
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    where = f"{name}, {best['flops'] / 1e9:,.0f} GFLOP/s, {best['bytes'] / 1e9:,.0f} GB/s"
    print(where)
    found = {}
    for operation in options.operation or SWEEPS:
        found[operation] = sweep(operation)
        draw(operation, found[operation], where).savefig(
            options.output / f"scaling_{operation.strip('_')}.png", dpi=150
        )
        (options.output / "scaling.json").write_text(json.dumps({"machine": where, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
