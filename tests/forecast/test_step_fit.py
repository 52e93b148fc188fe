"""The benchmark that fits the time model finds constants that are known, and judges them on steps that it has not seen."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def row(number: int) -> dict[str, Any]:
    """Products, elementwise operations and their sizes in proportions that differ from row to row."""
    grown = 1.7**number
    calls = [[1e6, 1e4, 40], [2e8 * grown, 1e5, 3 + number], [0, 3e4, 900 / (1 + number)], [0, 2e7 * grown, 5]]
    return {
        "calls": calls,
        "operations": sum(times for *_, times in calls),
        "products": {"64": 2 * 64**3 / 40e9, "512": 2 * 512**3 / 90e9},
        "averages": {"1024": 12 * 2**10 / 7e9, "65536": 12 * 2**16 / 110e9, "8388608": 12 * 2**23 / 30e9},
        "summed": [[4 * 2**20, 2]] if number == 3 else [],
        "gathered": [],
        "ranks": 2 if number == 3 else 1,
        "sum": 2e-3,
    }


def test_known_constants_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from step_fit import fit, predicted

    from cl_methods.forecast.time_model import Reached

    true = Reached(products=0.7, memory=0.3, call=0.0, start=8e-5, links=1.0, exchange=0.0)
    rows = [row(number) for number in range(8)]
    for one in rows:
        one["seconds"] = predicted(one, true, "sizes")
    # Two exchanges of 4 MiB last as long as the yardstick says, twice.
    alone = predicted({**rows[3], "summed": []}, true, "sizes")
    assert rows[3]["seconds"] - alone == pytest.approx(2 * 2e-3)
    models = fit(rows)["models"]
    for found in models["sizes"]["reached"]:
        assert found == pytest.approx({"products": 0.7, "memory": 0.3, "start": 8e-5}, rel=1e-3)
    assert models["sizes"]["not_seen"]["largest"] < 1e-3
    assert models["flat"]["not_seen"]["largest"] > 0.05
    assert all(one["predicted"]["sizes"] == pytest.approx(one["seconds"], rel=1e-3) for one in rows)
    for name in ("step_fit", "step_ranks", "step_cases", "yardsticks"):
        sys.modules.pop(name, None)
