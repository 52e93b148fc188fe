"""The suites by name: what each measures, and the setting under which its records are comparable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from cl_methods.bench.rows import Row
from cl_methods.bench.step import StepOptions, count_method, public_rows, step_suite
from cl_methods.bench.world import mini_world

Result = tuple[dict[str, Any], list[Row], torch.device]


def run(
    suite: str,
    *,
    model: str,
    methods: tuple[str, ...],
    batch: int,
    captions: int | None,
    rounds: int,
    time: bool,
    device: torch.device,
    pattern: str,
    note: Callable[[str], None],
) -> Result:
    """Measure a suite: its setting, its rows, and the device that they are of.

    Raises:
        ValueError: the suite is unknown, or an option is wrong.
        RuntimeError: something does not compute what it should.
    """
    cpu, threads = torch.device("cpu"), {"threads": torch.get_num_threads()}
    if suite == "counts":
        options = StepOptions(methods=methods, time=False)
        return {"model": "mini"}, exact_rows(options, note), cpu
    if suite == "step":
        options = StepOptions(model, methods, batch, captions, rounds, time, device)
        setting = {"model": model, "methods": ",".join(methods) or "all", **threads}
        sizes = {} if model == "mini" or not time else {"batch": batch, "captions": captions or "published ratio"}
        return {**setting, **sizes, **({} if time else {"time": "no"})}, step_suite(options, note), device
    if suite == "evaluation":
        from cl_methods.bench.evaluation import evaluation_suite

        name = "ViT-B-16" if model == "mini" else model
        return {"model": name, **(threads if time else {})}, evaluation_suite(name, note, time=time), cpu
    if suite == "kernels":
        from cl_methods.bench.kernels import kernels_suite

        rows, device = kernels_suite(pattern, rounds, note)
        return {**threads, **({"filter": pattern} if pattern else {})}, rows, device
    raise ValueError(f"suite: expected kernels, step, evaluation or counts, got {suite!r}")


def exact_rows(options: StepOptions, note: Callable[[str], None] = lambda _: None) -> list[Row]:
    """Exact counts of a step of every trained method on `mini`, and of the two public procedures."""
    world = mini_world()
    rows: list[Row] = []
    for name in options.chosen:
        note(f"counting {name}")
        rows += count_method(name, world, options)
    return rows + public_rows(options, note)
