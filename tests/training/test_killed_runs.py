"""Killed with SIGKILL at random moments and resumed: the same result in everything but times."""

from __future__ import annotations

from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("killed_runs.py")


@pytest.mark.parametrize(("method", "kills"), [("zscl", 5), ("moe_adapters", 5), ("ranpac", 3)])
def test_result_after_kills_equals_the_uninterrupted_one(method, kills, forked_clk, tmp_path):
    finished = forked_clk.run(PROGRAM, method, kills, tmp_path)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    lines = finished.stdout.splitlines()
    assert sum(int(line.split()[2]) for line in lines if line.startswith("equal after")) >= kills
