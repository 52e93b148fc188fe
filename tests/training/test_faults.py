"""Some of the faults of ``faults.py``, which `make faults` inflicts on every method: nothing that was saved is lost."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

SOME = [
    "finetune:sigterm,sigint,two signals,no room,folder gone,checkpoint altered,rows gone,weight is NaN,worker killed",
    "moe_adapters:kill in a write,file too large,loss is NaN,rows of another run,checkpoint file gone",
    "ranpac:kill,checkpoint cut off,rows damaged",
]


def test_runs_that_suffer_end_with_a_sentence_and_come_to_the_same_result(tmp_path):
    program = Path(__file__).with_name("faults.py")
    root = program.parents[2]
    paths = os.pathsep.join(map(str, (root, root / "python", program.parent)))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, program, tmp_path, *SOME]
    finished = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=900)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    told = re.search(r"(\d+) faults over 3 methods", finished.stdout)
    assert told, finished.stdout
    assert int(told[1]) >= sum(len(entry.split(",")) for entry in SOME)
    print(finished.stdout)
