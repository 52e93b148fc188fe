"""``clk evaluate`` by 1, 2 … processes, forked after the imports; a program of its own, so that nothing else shares its processes.

usage: distributed_evaluations.py RUN FOLDER COUNTS [OPTION ...]

COUNTS are separated by commas. FOLDER/COUNT/evaluated is what each number of processes writes.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from distributed_runs import report, start

from cl_methods.commands import evaluate


def evaluate_together(folder: Path, run: str, options: list[str]) -> None:
    evaluate.main([run, "--output", str(folder / "evaluated"), "--device", "cpu", *options])


def main(run: str, folder: str, counts: str, *options: str) -> int:
    for count in counts.split(","):
        children = start(int(count), Path(folder) / count, run, list(options), work=evaluate_together)
        if report(int(count), children):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
