"""Killed with SIGKILL at random moments and resumed: the same result in everything but times."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(("method", "kills"), [("zscl", 5), ("moe_adapters", 5), ("ranpac", 3)])
def test_result_after_kills_equals_the_uninterrupted_one(method, kills, tmp_path):
    program = Path(__file__).with_name("killed_runs.py")
    root = program.parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root / 'python'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, program, method, str(kills), tmp_path]
    finished = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=600)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    lines = finished.stdout.splitlines()
    assert sum(int(line.split()[2]) for line in lines if line.startswith("equal after")) >= kills
