"""Faults that strike one of several processes of a run; a program of its own, so that nothing else shares its processes.

usage: rank_faults.py FOLDER fork|torchrun METHOD RANK:FAULT …

Two processes begin a run, one of them suffers the first fault, both end; the run is resumed for the next fault, and in the end once
more, undisturbed. After every fault: exit statuses, one sentence in all, no traceback of ours, and a newest checkpoint that
is intact. With ``fork`` the processes are children of this one, forked after the imports; with ``torchrun`` they are its own, and
``signal:SIGTERM`` and ``signal:SIGINT`` go to torchrun itself.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from forked_ranks import fork_ranks, statuses
from inflicting import FAULTS, Inflict, Striking

from cl_methods import cli
from cl_methods.commands import run as run_command
from cl_methods.datasets.images import DataError
from cl_methods.training.checkpoints import RunDirectory
from cl_methods.training.data import TrainingSteps

COUNT = 2
EVENT = 2
SHORT = ["--limit-tasks", "1", "--limit-iterations", "3", "--evaluation.limit", "16", "--method.batch-size", "8"]
SHORT += ["--evaluation.split", "validation", "--checkpoint.every", "1", "--device", "cpu"]
STOPPED = r"stopped (after step \d+ of|before|in the evaluation) .*continue with --resume"
IMAGE_GONE = "image gone"


def run_as_rank(output: Path, fault: str, struck: int, arguments: list[str]) -> int:
    """`clk run` as the process that the environment says, which suffers the fault if it is the one."""
    run_command.write_run_report = lambda *_: None  # figures take longer than the run
    if fault and int(os.environ["RANK"]) == struck:
        if fault == IMAGE_GONE:
            TrainingSteps._read = image_gone
        else:
            inflicted = Inflict(fault, EVENT)
            arguments = [*arguments, *inflicted.arguments]
            inflicted.prepare(output)
            run_command.RunProgress = lambda: Unheard(inflicted)  # what processes other than the first report to
    return cli.main(arguments)


class Unheard(Striking):
    """Strikes as the other, and leaves sentences to the first process."""

    def note(self, text: str) -> None:
        pass


def image_gone(steps: TrainingSteps, step: int) -> None:
    raise DataError(f"image {step} is gone")


def forked(output: Path, fault: str, struck: int, arguments: list[str], log: Path) -> list[int]:
    def work() -> None:
        stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        sys.exit(run_as_rank(output, fault, struck, arguments))

    return statuses(fork_ranks(COUNT, work))


def by_torchrun(output: Path, fault: str, struck: int, arguments: list[str], log: Path) -> list[int]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(COUNT)]
    inside = [__file__, "inside", output, "" if struck < 0 else fault, struck, *arguments]
    with log.open("w") as stream:
        process = subprocess.Popen([*command, *map(str, inside)], stdout=stream, stderr=stream, start_new_session=True)
        if struck < 0 and fault:
            wait_for_a_checkpoint(output, process)
            process.send_signal(getattr(signal, fault))
        return [process.wait(timeout=300)]


def wait_for_a_checkpoint(output: Path, process: subprocess.Popen) -> None:
    known = {checkpoint.path for checkpoint in RunDirectory(output).found()}
    while process.poll() is None and {checkpoint.path for checkpoint in RunDirectory(output).found()} <= known:
        time.sleep(0.01)


def expected(fault: str, launcher: str, struck: int) -> tuple[list[int], str]:
    """Exit statuses and sentence."""
    if fault == "kill":
        left = [-signal.SIGKILL if rank == struck else 2 for rank in range(COUNT)]
        return [
            1
        ] if launcher == "torchrun" else left, "a process of the run is gone without a word .*--resume continues"
    stopped = fault in ("sigterm", "sigint", "SIGTERM", "SIGINT")
    if launcher == "torchrun":
        statuses = [1]
    elif stopped:
        statuses = [143 if fault == "sigterm" else 130] * COUNT
    else:
        statuses = [2] * COUNT
    return statuses, STOPPED if stopped else r"image \d+ is gone" if fault == IMAGE_GONE else FAULTS[fault].sentence


def main(folder: Path, launcher: str, method: str, faults: list[str]) -> None:
    start = forked if launcher == "fork" else by_torchrun
    output = folder / "run"
    arguments = ["run", "--method", method, *SHORT, "--output", str(output)]
    if launcher == "torchrun":  # which is signalled from outside, not at a step
        arguments[arguments.index("--limit-iterations") + 1] = "30"
    for number, (struck, fault) in enumerate(entry.split(":") for entry in faults):
        log = folder / f"{number}.log"
        rank = -1 if struck == "signal" else int(struck)
        statuses = start(output, fault, rank, [*arguments, *(["--resume"] if number else [])], log)
        text = log.read_text()
        where = f"{fault} of rank {struck}: exit {statuses}\n{text}"
        exits, sentence = expected(fault, launcher, rank)
        assert statuses == exits, where
        assert len(re.findall(r"clk run: error: |" + STOPPED, text)) == 1, where
        assert "TCPStore" not in text, where
        assert re.search(sentence, text), where
        assert "Traceback" not in text or launcher == "torchrun", where  # which shows its own
        assert "cl_methods/training/run.py" not in text, where
        newest = RunDirectory(output).found()[-1:]
        for checkpoint in newest:
            checkpoint.check()
        assert not (output / "run.lock").exists(), where
        print(
            f"{fault} of {struck}: exit {statuses}, newest checkpoint {[one.path.name for one in newest]}", flush=True
        )
    log = folder / "last.log"
    statuses = start(output, "", -1, [*arguments, "--resume"], log)
    assert set(statuses) == {0}, log.read_text()
    print(f"{len(faults)} faults, then the end")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have background jobs ignore it
    if sys.argv[1] == "inside":
        place, name, number, *rest = sys.argv[2:]
        sys.exit(run_as_rank(Path(place), name, int(number), rest))
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:])
