"""What two real processes exchange in a step is what the counting of one says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from cl_methods.commands.configuration import parse
from cl_methods.forecast.counting import count_work
from cl_methods.training.building import select_scenario

PROGRAM = Path(__file__).with_name("exchange_program.py")


@pytest.mark.slow
@pytest.mark.parametrize("method", ["zscl", "moe_adapters", "mulki"])
def test_two_processes_exchange_what_was_counted(method: str) -> None:
    options = ["--method", method, "--limit-tasks", "1", "--limit-iterations", "1", "--device", "cpu"]
    options += ["--method.batch-size", "9"]
    if method == "moe_adapters":
        options += ["--method.ddas.iterations", "1", "--method.ddas.generic-iterations", "1"]
    root = PROGRAM.parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root / 'python'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(PROGRAM), *options]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, timeout=300)
    real = [Counter({int(size): n for size, n in part.items()}) for part in json.loads(done.stdout.splitlines()[-1])]
    config, _ = parse(options, "")
    counted = count_work(config, select_scenario(config), 2).stages[0].first
    assert counted.summed + counted.gathered
    assert real == [counted.summed, counted.gathered]
