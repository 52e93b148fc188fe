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
from cl_methods.forecast.hardware import find_hardware
from cl_methods.forecast.prediction import Predictor
from cl_methods.training.building import select_scenario

PROGRAM = Path(__file__).with_name("exchange_program.py")


def exchanged(options: list[str]) -> list[Counter[int]]:
    """What a step of the second of two processes sums, and what it gathers: bytes of a tensor -> how often."""
    root = PROGRAM.parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root / 'python'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(PROGRAM), *options]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, timeout=300)
    return [Counter({int(size): n for size, n in part.items()}) for part in json.loads(done.stdout.splitlines()[-1])]


def options_of(method: str) -> list[str]:
    options = ["--method", method, "--limit-tasks", "1", "--limit-iterations", "1", "--device", "cpu"]
    return [*options, "--method.batch-size", "9"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["zscl", "moe_adapters", "mulki"])
def test_two_processes_exchange_what_was_counted(method: str) -> None:
    options = options_of(method)
    if method == "moe_adapters":
        options += ["--method.ddas.iterations", "1", "--method.ddas.generic-iterations", "1"]
    real = exchanged(options)
    config, _ = parse(options, "")
    counted = count_work(config, select_scenario(config), 2).stages[0].first
    assert counted.summed + counted.gathered
    assert real == [counted.summed, counted.gathered]


@pytest.mark.slow
def test_two_processes_gather_and_reduce_the_sharded_weights_that_were_counted() -> None:
    options = [*options_of("zscl"), "--distributed", "fsdp"]
    real = sum(exchanged(options), Counter())
    config, _ = parse(options, "")
    predictor = Predictor(config, select_scenario(config))
    counted = predictor.predict(find_hardware("h100"), 2).work.stages[0].first
    assert sum(size * n for size, n in real.items()) == pytest.approx(counted.exchanged, rel=1e-3)
    # without the one number that sums the consolidation's value
    pieces = sum(n for size, n in real.items() if size > 4)
    assert pieces == sum(counted.summed.values()) + sum(counted.gathered.values())
