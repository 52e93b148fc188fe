"""Shared by all benchmark suites: no speed without a green check, the floor and exact counts beside every time, ratios at the end.

Run them with ``pytest -c benchmarks/pytest.ini benchmarks``; compare rows of one run only, because machines differ and are noisy.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from machine import DEVICE, ceilings, replayed

from cl_kernels.profile import ExtraMemory, OperationCount

OURS = "ours"


@pytest.fixture
def measure(benchmark, request) -> Callable[..., None]:
    """``measure(function, expected, floor_bytes=…, flops=…)``: check ``function()`` against ``expected``, count, then time it.

    In the JSON beside each time: ``floor_seconds``, the larger of bytes and FLOPs over what this machine reaches, in bf16 where
    ``half``; ``dispatched`` operations; ``extra_bytes`` of memory at the peak; and what it is compared with, ``implementation``
    and ``shape``. On a GPU ``replay_seconds`` of ours: on the device alone, where a call of some hundred microseconds is mostly
    the host's. It is what the part of the floor is taken from there.
    """

    def run(
        function: Callable[[], Any],
        expected: list[Tensor],
        *,
        tolerance: float,
        floor_bytes: float,
        flops: float,
        half: bool = False,
    ) -> None:
        results = function()
        for result, wanted in zip(results, expected, strict=True):
            error = (result.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp(min=1e-30)
            assert error <= tolerance, f"relative error {error:.1e} is above {tolerance:.0e}: no time is reported"
        del results
        with OperationCount() as count:
            function()
        with ExtraMemory(DEVICE) as extra:
            function()
        best = ceilings()
        benchmark.extra_info |= {
            "device": str(DEVICE),
            "threads": torch.get_num_threads(),
            "dispatched": count.operations,
            "extra_bytes": extra.bytes,
            "floor_bytes": floor_bytes,
            "flops": flops,
            "floor_seconds": max(floor_bytes / best["bytes"], flops / best["bf16_flops" if half else "flops"]),
            **_place(request.node),
        }

        def timed() -> None:
            function()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()

        benchmark(timed)
        if DEVICE.type == "cuda" and benchmark.extra_info["implementation"].startswith(OURS):
            try:
                benchmark.extra_info["replay_seconds"] = replayed(function)
            except RuntimeError as error:  # what has been timed stays
                benchmark.extra_info["replay_error"] = str(error)

    return run


def _place(item: pytest.Item) -> dict[str, str]:
    """Which implementation of what: a benchmark's parameter ``implementation``, and the rest of its id."""
    call = getattr(item, "callspec", None)
    if call is None:
        return {"implementation": OURS, "compared": ""}
    function = call.params.get("implementation")
    name = OURS if function is None else function.__name__
    return {"implementation": name, "compared": "-".join(part for part in call.id.split("-") if part != name)}


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    """Add the machine's ceilings, and to each row how it compares."""
    output_json["ceilings"] = ceilings()
    output_json["ratios"] = _ratios(
        [(row["name"], row["extra_info"], row["stats"]["min"]) for row in output_json["benchmarks"]]
    )


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print for each comparison the times over ours, and what part of the floor ours reaches."""
    session = getattr(config, "_benchmarksession", None)
    if session is None or not session.benchmarks:
        return
    rows = [(b.name, b.extra_info, b.stats.min) for b in session.benchmarks if not b.has_error and b.stats]
    best = ceilings()
    terminalreporter.section("ratios: time over ours (best rounds); floor: part of what bytes and FLOPs allow")
    terminalreporter.write_line(
        f"{DEVICE}, {torch.get_num_threads()} threads, {best['flops'] / 1e9:,.0f} GFLOP/s, {best['bytes'] / 1e9:,.0f} GB/s"
    )
    for comparison in _ratios(rows):
        terminalreporter.write_line(f"{comparison['of']}  ({comparison['floor']:.0%} of the floor)")
        for name, row in comparison["rows"].items():
            memory = "" if row["extra_bytes"] is None else f"{row['extra_bytes'] / 2**20:9.1f} MiB"
            floor = f"  {row['floor']:.0%} of its floor" if name.startswith(OURS) and name != OURS else ""
            terminalreporter.write_line(
                f"    {name:<28}{row['ratio']:7.2f}x{row['dispatched']:8d} operations{memory}{floor}"
            )


def _ratios(rows: list[tuple[str, dict[str, Any], float]]) -> list[dict[str, Any]]:
    """Rows of the same benchmark and parameters side by side, for those that have one of ours."""
    groups: dict[str, dict[str, tuple[dict[str, Any], float]]] = defaultdict(dict)
    for name, info, seconds in rows:
        of = name.split("[")[0].removeprefix("bench_") + (f" {info['compared']}" if info["compared"] else "")
        groups[of][info["implementation"]] = (info, seconds)
    found = []
    for of, group in groups.items():
        if OURS not in group:
            continue
        _, ours = group[OURS]
        columns = {
            name: {
                "ratio": seconds / ours,
                "seconds": seconds,
                "floor": row["floor_seconds"] / row.get("replay_seconds", seconds),
                **{key: row[key] for key in ("dispatched", "extra_bytes")},
            }
            for name, (row, seconds) in group.items()
        }
        found.append({"of": of, "floor": columns[OURS]["floor"], "rows": columns})
    return found
