"""Runs that are killed at random moments and resumed; a program of its own, so that nothing else shares its processes.

A moment is a random delay after a random number of changes to the run directory (a checkpoint begun, renamed or deleted, a
row written), so that most of them fall into training and writing and not into start-up.

usage: killed_runs.py METHOD KILLS FOLDER

Every child is forked after the imports, which take longer than the runs. Prints one line per run that came to its end.
"""

from __future__ import annotations

import copy
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from cl_methods.commands.configuration import parse
from cl_methods.training.progress import PlainProgress
from cl_methods.training.run import run

SHORT = ["--limit-tasks", "2", "--limit-iterations", "5", "--method.batch-size", "16"]
SHORT += ["--evaluation.split", "validation", "--evaluation.limit", "40", "--checkpoint.every", "1"]
FITTED = {"moe_adapters": ["--method.ddas.iterations", "30", "--method.ddas.generic-iterations", "30"]}
"""What is fitted between tasks takes longer than all steps of the run unless it is cut down like them."""


def start(method: str, output: Path, *, resume: bool) -> int:
    """Fork a child that does what ``clk run`` does without the report; returns its process id."""
    process = os.fork()
    if process:
        return process
    torch.set_num_threads(1)
    log = os.open(output.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 2)
    config, _ = parse(["--method", method, *SHORT, *FITTED.get(method, [])], "")
    with os.fdopen(log, "w", buffering=1) as stream:
        run(config, output, resume=resume, progress=PlainProgress(stream))
    os._exit(0)


def without_times(path: Path) -> dict:
    result = copy.deepcopy(json.loads((path / "result.json").read_text()))
    del result["evaluation_seconds"]
    for name in ("seconds", "samples_per_second", "peak_memory_bytes", "seconds_per_task"):
        del result["train"][name]
    return result


def snapshot(output: Path) -> tuple[str, ...]:
    """What the run directory holds at this moment."""
    return tuple(
        sorted(
            entry.name for folder in (output, output / "checkpoints") if folder.exists() for entry in folder.iterdir()
        )
    )


def wait(process: int, output: Path, changes: int, delay: float) -> int | None:
    """The exit status if the process ends before ``changes`` changes of its directory and the delay, else None."""
    before, deadline = snapshot(output), None
    while deadline is None or time.monotonic() < deadline:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        now = snapshot(output)
        if now != before:
            before, changes = now, changes - 1
        if changes <= 0 and deadline is None:
            deadline = time.monotonic() + delay
        time.sleep(0.001)
    return None


def kill_and_compare(method: str, kills: int, folder: Path) -> None:
    process = start(method, folder / "whole", resume=False)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    assert status == 0, (folder / "whole.log").read_text()
    expected = without_times(folder / "whole")
    moments, done, number = random.Random(method), 0, 0
    while True:
        output, resume, killed = folder / f"killed{number}", False, 0
        while True:
            process = start(method, output, resume=resume)
            changes = moments.randrange(12) if done < kills else 10**9
            status = wait(process, output, changes, moments.uniform(0.0, 0.15))
            if status is not None:
                break
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            done, killed, resume = done + 1, killed + 1, True
        assert status == 0, output.with_suffix(".log").read_text()
        assert without_times(output) == expected, f"{output} differs after {killed} kills"
        print(f"equal after {killed} kills", flush=True)
        number += 1
        if done >= kills:
            return


if __name__ == "__main__":
    kill_and_compare(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
