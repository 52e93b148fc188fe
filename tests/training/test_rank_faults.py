"""Faults of one process of several (``rank_faults.py``): all end, with one sentence, and the run goes on afterwards."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from forked import Forkserver

PROGRAM = Path(__file__).with_name("rank_faults.py")


def suffer(server: Forkserver, folder: Path, launcher: str, *faults: str) -> None:
    root = PROGRAM.parents[2]
    environment = {
        "PYTHONPATH": os.pathsep.join(
            map(str, (root, root / "python", PROGRAM.parent))
        ),  # torchrun's processes find it
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        "CUDA_VISIBLE_DEVICES": "",
    }
    arguments = (folder, launcher, "finetune", *faults)
    finished = server.run(PROGRAM, *arguments, environment=environment, timeout=900)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert f"{len(faults)} faults, then the end" in finished.stdout
    print(finished.stdout)


def test_what_only_one_process_meets_ends_both_with_one_sentence(forked_clk, tmp_path):
    suffer(forked_clk, tmp_path, "fork", "1:sigterm", "1:image gone")


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault", ["0:loss is NaN", "1:weight is NaN", "1:worker killed", "0:no room", "0:sigint", "1:kill"]
)
def test_every_other_fault_of_one_process(fault, forked_clk, tmp_path):
    suffer(forked_clk, tmp_path, "fork", fault)


@pytest.mark.slow
def test_torchrun_is_signalled_and_its_processes_fail(forked_clk, tmp_path):
    suffer(forked_clk, tmp_path, "torchrun", "signal:SIGTERM", "1:kill", "1:image gone", "signal:SIGINT")
