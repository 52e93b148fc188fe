"""Suite ``kernels``: the checkout's own benchmarks, reduced to rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cl_methods.bench.record import CHECKOUT
from cl_methods.bench.rows import Row, Samples


def kernels_suite(pattern: str, rounds: int, note: Callable[[str], None]) -> tuple[list[Row], torch.device]:
    """Run ``benchmarks/`` with pytest in a process of its own; its correctness gate decides what is timed at all.

    Args:
        pattern: run only benchmarks whose names match, as pytest's ``-k``; "" for all.
        rounds: at least so many timed rounds each.
        note: told what is being done.

    Raises:
        ValueError: there is no checkout, or nothing matches.
        RuntimeError: a benchmark's check failed; nothing is reported.
    """
    folder = CHECKOUT / "benchmarks"
    if not (folder / "pytest.ini").is_file():
        raise ValueError(
            f"suite: kernels are measured by the benchmarks of a checkout, and {CHECKOUT} is none; "
            "clone the repository, `pip install -e .` it, and run `clk bench` from there"
        )
    note("running benchmarks/ (minutes)")
    with tempfile.TemporaryDirectory() as temporary:
        target = Path(temporary) / "benchmark.json"
        command = [sys.executable, "-m", "pytest", "-c", str(folder / "pytest.ini"), str(folder)]
        command += [f"--benchmark-json={target}", f"--benchmark-min-rounds={rounds}"]
        command += ["-k", pattern] if pattern else []
        environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}  # as the record says
        done = subprocess.run(command, capture_output=True, text=True, cwd=CHECKOUT, check=False, env=environment)
        if done.returncode == 5:
            raise ValueError(f"filter: no benchmark matches {pattern!r}")
        if done.returncode:
            raise RuntimeError(
                "benchmarks: a check failed, no speed is reported: " + _failures(done.stdout, done.stderr)
            )
        content = json.loads(target.read_text())
    rows = reduced(content)
    return rows, torch.device("cuda" if any("cuda" in row.note for row in rows) else "cpu")


def reduced(content: dict[str, Any]) -> list[Row]:
    """Rows from pytest-benchmark's JSON, ours first in every case."""
    rows = []
    for entry in content["benchmarks"]:
        info, stats = entry["extra_info"], entry["stats"]
        case = entry["name"].split("[")[0].removeprefix("bench_") + (f" {info['compared']}" if info["compared"] else "")
        measured = {"seconds": Samples(stats["min"], stats["median"], stats["rounds"])}
        if info["extra_bytes"] is not None:
            measured["peak_bytes"] = Samples(info["extra_bytes"], info["extra_bytes"], 1)
        exact = {"operations": info["dispatched"]}
        note = f"{info['device']}, {info['floor_seconds'] / stats['min']:.0%} of the floor"
        rows.append(Row(case, info["implementation"], exact, measured, note=note))
    return sorted(rows, key=lambda row: (row.case, row.implementation != "ours", row.implementation))


def _failures(out: str, error: str) -> str:
    lines = [line for line in out.splitlines() if line.startswith(("FAILED", "ERROR", "E  "))]
    return "; ".join(lines[:5]) or error.strip() or out.strip()[-500:]
