"""Faults that are inflicted on runs of every method; a program of its own, so that nothing else shares its processes.

Each method runs once undisturbed. Then a second run suffers one fault after the other, is resumed after each, and must come to the
same result. After every fault: the expected exit status, one sentence and no traceback, and everything that had been
reported as saved is there and intact.

usage: faults.py FOLDER [METHOD:FAULT,FAULT … | METHOD …]

All methods if none is named. A method whose faults are not named suffers nine of them, which differ from method to method;
METHOD:all is all of them.

Every run is `clk run` in a child that is forked after the imports, which take longer than the runs.
"""

from __future__ import annotations

import copy
import json
import os
import random
import re
import signal
import sys
import time
from pathlib import Path

from inflicting import DAMAGES, FAULTS, WITHOUT_TRAINING, Inflict

from cl_methods import cli
from cl_methods.commands import run as run_command
from cl_methods.methods import METHODS
from cl_methods.training.checkpoints import DamagedError, RunDirectory

SHARE = 9
SHORT = ["--limit-tasks", "2", "--limit-iterations", "3", "--evaluation.limit", "40"]
SHORT += ["--evaluation.split", "validation", "--checkpoint.every", "1"]
FITTED = {"moe_adapters": ["--method.ddas.iterations", "30", "--method.ddas.generic-iterations", "30"]}
"""What is fitted between tasks takes longer than all steps of the run unless it is cut down like them."""


def start(method: str, output: Path, fault: Inflict | None, *, resume: bool) -> int:
    """`clk run` in a child, with a fault to come; its exit status, negative if a signal ended it."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    log = os.open(log_of(output), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    run_command.write_run_report = lambda *_: None  # figures take longer than the run
    arguments = ["run", "--method", method, *SHORT, "--output", str(output)]
    arguments += ["--method.batch-size", "8"] if METHODS[method].trains else []
    arguments += FITTED.get(method, [])
    if fault is not None:
        arguments += fault.arguments
        fault.prepare(output)
    try:
        status = cli.main([*arguments, *(["--resume"] if resume else [])])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def log_of(output: Path) -> Path:
    return output.with_suffix(".log")


def without_times(path: Path) -> dict:
    result = copy.deepcopy(json.loads((path / "result.json").read_text()))
    del result["evaluation_seconds"], result["config"]["workers"]
    for name in ("seconds", "samples_per_second", "peak_memory_bytes", "seconds_per_task"):
        del result["train"][name]
    return result


class Sufferer:
    """Runs of one method in one folder."""

    def __init__(self, method: str, folder: Path) -> None:
        self.method, self.folder = method, folder
        self.moments, self.number, self.count = random.Random(method), 0, 0
        self.latest = 6 if METHODS[method].trains else 3  # of two tasks only the evaluation is reported
        status = start(method, folder / "whole", None, resume=False)
        assert status == 0, log_of(folder / "whole").read_text()
        self.expected = without_times(folder / "whole")
        self._new_run()

    def _new_run(self) -> None:
        self.output, self.resume, self.sentence = self.folder / f"run{self.number}", False, None
        self.number += 1

    def suffer(self, name: str) -> None:
        """Go on with the run until the fault has struck; runs that end before are compared, and a new one begins."""
        if name in DAMAGES:
            while self.sentence is not None or not self._newest_is_intact():
                self.suffer("kill")
            self._damage(name)
            return
        for _ in range(8):
            fault = Inflict(name, self.moments.randrange(1, self.latest))
            status = start(self.method, self.output, fault, resume=self.resume)
            text = log_of(self.output).read_text()
            self._check_sentence(text)
            if status == 0:
                self._compare()
                continue
            self.resume = True
            self._check_fault(fault, status, text)
            return
        raise AssertionError(f"{self.method}: {name} never struck")

    def _newest_is_intact(self) -> bool:
        found = RunDirectory(self.output).found()
        try:
            for checkpoint in found[-1:]:
                checkpoint.check()
        except DamagedError:
            return False
        return bool(found)

    def finish(self) -> None:
        """Bring the run to its end."""
        if self.resume:
            assert start(self.method, self.output, None, resume=True) == 0, log_of(self.output).read_text()
            self._check_sentence(log_of(self.output).read_text())
            self._compare()

    def _compare(self) -> None:
        assert without_times(self.output) == self.expected, f"{self.output} differs from the undisturbed run"
        assert not list(self.output.rglob(".incomplete-*"))
        assert not (self.output / "diverged.json").exists(), "an account of a divergence outlives it"
        self._new_run()

    def _damage(self, name: str) -> None:
        self.sentence = DAMAGES[name](self.output)
        self._told(name, "resumed")

    def _check_sentence(self, text: str) -> None:
        """What was damaged before this run is named in its log."""
        if self.sentence is not None:
            assert re.search(self.sentence, text), f"{self.sentence!r} is not said:\n{text}"
        self.sentence = None

    def _check_fault(self, fault: Inflict, status: int, text: str) -> None:
        fault.repair(self.output)
        where = f"{self.method}: {fault.name} at event {fault.event}: exit {status}\n{text}"
        assert status == fault.status, where
        assert "Traceback" not in text, where
        assert re.search(fault.sentence, text), where
        assert isinstance(json.loads((self.output / "run.json").read_text()), dict), where
        fault.check_saved(self.output)
        self._told(fault.name, f"exit {status}")
        if (self.output / "result.json").exists():
            self._compare()

    def _told(self, name: str, outcome: str) -> None:
        self.count += 1
        print(f"{self.method:<22}{name:<24}{outcome}", flush=True)


def faults_of(method: str, *, everything: bool) -> list[str]:
    """What a method can suffer: all of it, or a share that goes round with the methods."""
    if not METHODS[method].trains:
        return WITHOUT_TRAINING
    names = [*FAULTS, *DAMAGES]
    if METHODS[method].closed_form:
        names = [name for name in names if name in DAMAGES or not FAULTS[name].optimiser]
    first = SHARE * list(METHODS).index(method)
    return names if everything else [names[(first + number) % len(names)] for number in range(SHARE)]


def main(folder: Path, wanted: list[str]) -> None:
    os.environ["CLK_CACHE"] = str(folder / "cache")
    began, count = time.monotonic(), 0
    methods = dict(entry.partition(":")[::2] for entry in wanted or METHODS)
    for method, names in methods.items():
        chosen = names.split(",") if names not in ("", "all") else faults_of(method, everything=names == "all")
        (folder / method).mkdir(parents=True)
        sufferer = Sufferer(method, folder / method)
        order = random.Random(len(method)).sample(chosen, len(chosen))
        for name in order:
            sufferer.suffer(name)
        sufferer.finish()
        count += sufferer.count
    seconds = time.monotonic() - began
    print(f"{count} faults over {len(methods)} methods in {seconds:.0f} s: nothing lost, every result as undisturbed")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have background jobs ignore it
    main(Path(sys.argv[1]), sys.argv[2:])
