"""What a training step costs along one dimension at a time: counted, measured, and predicted from the counts.

    python benchmarks/step_scaling.py measure  --output benchmarks/results/step_scaling.json
    python benchmarks/step_scaling.py count    --output benchmarks/results/step_scaling.json
    python benchmarks/step_scaling.py fit      --output benchmarks/results/step_scaling.json
    python benchmarks/step_scaling.py draw     --output benchmarks/results/step_scaling.json --figure docs/images/scaling_step.png

``count`` needs no clock and no data, and gives the same everywhere. ``measure`` takes real steps of the same settings on the CPU
at hand (noise for images), each beside products and averages of several sizes in the same moment. ``fit`` chooses the constants
of the time model on half of the measured steps, and says how far it is off on the half that it has not seen. ``draw`` makes the
figure. What the file holds is neither counted nor measured again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from step_cases import Case, cases, counted, step_of
from yardsticks import Yardsticks

ROUNDS = 3
"""Timed rounds."""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("count", "measure", "fit", "draw"))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--figure", type=Path, default=Path("docs/images/scaling_step.png"))
    parser.add_argument("--axis", help="cases whose name begins like this alone")
    parser.add_argument(
        "--seconds", type=float, default=80.0, help="measure: begin no step after this long; go on by calling again"
    )
    options = parser.parse_args()
    found = json.loads(options.output.read_text()) if options.output.is_file() else {}
    rows: dict[str, dict[str, Any]] = {row["key"]: row for row in found.get("cases", [])}
    wanted = [case for case in cases() if options.axis is None or case.key.startswith(options.axis)]

    def save() -> None:
        order = {case.key: place for place, case in enumerate(cases())}
        found["cases"] = sorted(rows.values(), key=lambda row: order[row["key"]])
        options.output.write_text(json.dumps(found) + "\n")

    if options.what == "draw":
        from step_figure import draw

        draw(found).savefig(options.figure, dpi=110)
    elif options.what == "fit":
        from step_fit import fit

        found |= fit(list(rows.values()))
        print(json.dumps(found["models"], indent=1))
        save()
    else:
        found["machine"] = {"threads": 1, "torch": torch.__version__}
        deadline = time.perf_counter() + options.seconds
        name, work = ("flops", counted) if options.what == "count" else ("seconds", measured)
        for case in wanted:
            row = rows.setdefault(case.key, {"key": case.key, **dataclasses.asdict(case)})
            if name not in row and (options.what == "count" or time.perf_counter() < deadline):
                row |= work(case)
                print(case.key, f"{row[name]:.4g} {name}", flush=True)
                save()


def measured(case: Case) -> dict[str, Any]:
    """Best processor seconds of one thread for some steps, and for the yardsticks between them.

    Processor time, because other work shares the machine; what that costs in caches and bandwidth, the yardsticks pay as well.
    """
    if case.axis == "processes":
        program = Path(__file__).with_name("step_ranks.py")
        command = [sys.executable, str(program), json.dumps(dataclasses.asdict(case))]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        return dict(json.loads(done.stdout.splitlines()[-1]))
    torch.set_num_threads(1)
    step, sticks = step_of(case), Yardsticks()
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.process_time()
        step.run()
        best = min(best, time.process_time() - start)
        sticks.measure()
    return {"seconds": best, **sticks.seconds}


if __name__ == "__main__":
    main()
