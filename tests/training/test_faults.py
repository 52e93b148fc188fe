"""Some of the faults of ``faults.py``, which `make faults` inflicts on every method: nothing that was saved is lost."""

from __future__ import annotations

import re
from pathlib import Path

SOME = [
    "finetune:sigterm,sigint,two signals,no room,folder gone,checkpoint altered,rows gone,weight is NaN,worker killed",
    "moe_adapters:kill in a write,file too large,loss is NaN,rows of another run,checkpoint file gone",
    "ranpac:kill,checkpoint cut off,rows damaged,read-only,no memory,log full,another version",
]


def test_runs_that_suffer_end_with_a_sentence_and_come_to_the_same_result(forked_clk, tmp_path):
    finished = forked_clk.run(Path(__file__).with_name("faults.py"), tmp_path, *SOME, timeout=900)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    told = re.search(r"(\d+) faults over 3 methods", finished.stdout)
    assert told, finished.stdout
    assert int(told[1]) >= sum(len(entry.split(",")) for entry in SOME)
    print(finished.stdout)
