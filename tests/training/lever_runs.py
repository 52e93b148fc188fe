"""Short runs under pairs of levers; a program of its own, so that nothing else shares its processes.

usage: lever_runs.py FOLDER COUNT OPTIONS …

Each OPTIONS is one argument, such as ``--precision bf16 --compile blocks``, for a run of its own in FOLDER by COUNT processes; a
leading ``resume`` goes on, under these options, with a run without any that was stopped after its first step. ``BUDGET`` in
OPTIONS is too little for the whole batch. Prints a JSON object: OPTIONS -> the losses of its steps, and the memory plan's parts.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import torch
from forked_ranks import fork_ranks, statuses

from cl_methods import ranks
from cl_methods.commands.configuration import parse
from cl_methods.components.compiled_blocks import compile_blocks
from cl_methods.training import run as run_module
from cl_methods.training.distributed import processes
from cl_methods.training.memory import planner
from cl_methods.training.progress import RunProgress
from cl_methods.training.run import Run
from cl_methods.training.signals import StoppedError

SHORT = "--method weight_ensemble --device cpu --limit-tasks 1 --limit-iterations 2 --method.batch-size 32 --method.average-every 1"
SHORT += " --evaluation.limit 4 --checkpoint.every 1"
SHARE = 0.9


class Losses(RunProgress):
    """Keeps the losses; stops the run after its first step if asked to."""

    def __init__(self, stop: bool) -> None:
        super().__init__()
        self.stop, self.found, self.run = stop, [], None

    def step(self, report) -> None:
        super().step(report)
        self.found.append(report.log.values()["loss"])
        if self.stop:
            self.run.stop()


def one(folder: Path, options: list[str], *, stop: bool = False) -> dict:
    config, _ = parse([*SHORT.split(), *options], "")
    progress = Losses(stop)
    progress.run = Run(config, folder, resume=True, overwrite=False, progress=progress)
    try:
        progress.run.execute()
    except StoppedError:
        assert stop
    plan = progress.run.memory_plan
    return {
        "losses": progress.found,
        "parts": None if plan is None or plan.micro_batches is None else plan.micro_batches.images,
    }


def budget(options: list[str]) -> str:
    """Less than a step needs with the whole batch under these options, in bytes of tensors alone."""
    config, _ = parse([*SHORT.split(), *[option.replace("BUDGET", "8GiB") for option in options]], "")
    scenario = run_module.select_scenario(config)
    plan = ranks.from_first(lambda: planner.plan_run(config, scenario, torch.device("cpu")))
    return str(int(SHARE * plan.peak / 0.92))


def run_all(folder: Path, every: list[str]) -> None:
    planner._process_bytes = lambda backbone: 0
    run_module.compile_blocks = partial(compile_blocks, backend="eager")  # which compiler follows is not looked at
    with processes():
        found = {}
        for number, text in enumerate(every):
            place = folder / str(number)
            resumed, options = text.startswith("resume"), text.removeprefix("resume").split()
            if "BUDGET" in options:
                options[options.index("BUDGET")] = budget(options)
            first = one(place, [], stop=True)["losses"] if resumed else []
            found[text] = one(place, options)
            found[text]["losses"][:0] = first
            if ranks.first():
                print(f"{text or 'nothing'}: {found[text]}", file=sys.stderr, flush=True)
        if ranks.first():
            print(json.dumps(found))


def main(folder: Path, count: int, every: list[str]) -> int:
    return max(statuses(fork_ranks(count, run_all, folder, every)))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]))
