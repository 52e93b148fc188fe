"""Faults that are inflicted on runs of every method; a program of its own, so that nothing else shares its processes.

Each method runs once undisturbed. Then a second run suffers one fault after the other, is resumed after each, and must come to the
same result. After every fault: the expected exit status, one sentence and no traceback, and everything that had been
reported as saved is there and intact.

usage: faults.py FOLDER [METHOD:FAULT,FAULT … | METHOD … | random:COUNT:SEED]

All methods if none is named. A method whose faults are not named suffers nine of them, which differ from method to method;
METHOD:all is all of them. random:60:1 are 60 faults, at moments that the seed decides as it does them, of six methods.

Every run is `clk run` in a child that is forked after the imports, which take longer than the runs.
"""

from __future__ import annotations

import atexit
import copy
import json
import os
import random
import re
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from inflicting import DAMAGES, FAULTS, WITHOUT_TRAINING, Inflict, struck_in

from cl_methods import cli
from cl_methods.commands import run as run_command
from cl_methods.methods import METHODS
from cl_methods.training.checkpoints import DamagedError, RunDirectory

SHARE = 9
RANDOM_METHODS = 6
TWO_AT_ONCE = "two at once"
SHORT = ["--limit-tasks", "2", "--limit-iterations", "3", "--evaluation.limit", "40"]
SHORT += ["--evaluation.split", "validation", "--checkpoint.every", "1"]
FITTED = {"moe_adapters": ["--method.ddas.iterations", "30", "--method.ddas.generic-iterations", "30"]}
"""What is fitted between tasks takes longer than all steps of the run unless it is cut down like them."""


def start(method: str, output: Path, fault: Inflict | None, *, resume: bool) -> int:
    """`clk run` in a child, with a fault to come; its exit status, negative if a signal ended it."""
    return wait(begin(method, output, fault, resume=resume))


def wait(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def begin(method: str, output: Path, fault: Inflict | None, *, resume: bool, log: Path | None = None) -> int:
    """The same, without waiting: its process."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    log = os.open(log or log_of(output), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
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
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):  # a log that is full
                stream.flush()
    atexit._run_exitfuncs()  # as a process of its own leaves: with workers that live, for one
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

    def __init__(self, method: str, folder: Path, seed: str = "") -> None:
        self.method, self.folder = method, folder
        self.moments, self.number, self.count = random.Random(method + seed), 0, 0
        self.latest = 6 if METHODS[method].trains else 3  # of two tasks only the evaluation is reported
        status = start(method, folder / "whole", None, resume=False)
        assert status == 0, log_of(folder / "whole").read_text()
        self.expected = without_times(folder / "whole")
        self._new_run()

    def _new_run(self) -> None:
        """Every other one is a link to where it lies."""
        self.output, self.resume, self.sentence = self.folder / f"run{self.number}", False, None
        if self.number % 2:
            place = self.folder / "elsewhere" / f"run{self.number}"
            place.mkdir(parents=True)
            self.output.symlink_to(place)
        self.number += 1

    def suffer(self, name: str) -> None:
        """Go on with the run until the fault has struck; runs that end before are compared, and a new one begins."""
        if name in DAMAGES:
            while self.sentence is not None or not self._newest_is_intact():
                self.suffer("kill")
            self._damage(name)
            return
        if name == TWO_AT_ONCE:
            self._two_at_once()
            return
        for _ in range(8):
            fault = Inflict(name, self.moments.randrange(1, self.latest))
            struck_in(self.output).unlink(missing_ok=True)
            status = start(self.method, self.output, fault, resume=self.resume)
            text = log_of(self.output).read_text()
            self._check_sentence(text)
            if status == 0:
                if fault.status == 0 and struck_in(self.output).exists():
                    self._told(name, "went on")
                    self._compare()
                    return
                self._compare()
                continue
            self.resume = True
            if name == "folder deleted":
                self._check_end(fault, status, text)
                assert not self.output.exists()
                self._told(name, f"exit {status}")
                self._new_run()
                return
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

    def _two_at_once(self) -> None:
        """Both may do all of it, one after the other; otherwise one is refused, and nothing of the other's is touched."""
        logs = [self.folder / f"{self.output.name}-{number}.log" for number in range(2)]
        children = [begin(self.method, self.output, None, resume=self.resume, log=log) for log in logs]
        statuses = [wait(child) for child in children]
        texts = [log.read_text() for log in logs]
        where = f"{self.method}: two at once: exits {statuses}\n" + "\n".join(texts)
        assert 0 in statuses, where
        for status, text in zip(statuses, texts, strict=True):
            assert "Traceback" not in text, where
            assert status == 0 or (status == 2 and re.search("is in use by process|already holds a run", text)), where
        self._check_sentence("\n".join(texts))
        self._told(TWO_AT_ONCE, f"exits {statuses}")
        self._compare()

    def _check_end(self, fault: Inflict, status: int, text: str) -> str:
        where = f"{self.method}: {fault.name} at event {fault.event}: exit {status}\n{text}"
        assert status == fault.status, where
        assert "Traceback" not in text, where
        assert re.search(fault.sentence, text), where
        return where

    def _check_fault(self, fault: Inflict, status: int, text: str) -> None:
        fault.repair(self.output)
        where = self._check_end(fault, status, text)
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
        return [*WITHOUT_TRAINING, TWO_AT_ONCE]
    names = [*FAULTS, *DAMAGES, TWO_AT_ONCE]
    if METHODS[method].closed_form:
        names = [name for name in names if name not in FAULTS or not FAULTS[name].optimiser]
    first = SHARE * list(METHODS).index(method)
    return names if everything else [names[(first + number) % len(names)] for number in range(SHARE)]


def at_random(count: int, seed: str) -> list[str]:
    """What ``main`` takes: so many faults of six methods."""
    draw = random.Random(seed)
    methods = draw.sample([name for name in METHODS if METHODS[name].trains], RANDOM_METHODS)
    chosen: dict[str, list[str]] = {method: [] for method in methods}
    for number in range(count):
        method = methods[number % RANDOM_METHODS]
        chosen[method].append(draw.choice(faults_of(method, everything=True)))
    return [f"{method}:{','.join(names)}" for method, names in chosen.items()]


def main(folder: Path, wanted: list[str]) -> None:
    os.environ["CLK_CACHE"] = str(folder / "cache")
    began, count, seed = time.monotonic(), 0, ""
    if wanted and wanted[0].startswith("random:"):
        _, number, seed = wanted[0].split(":")
        wanted = at_random(int(number), seed)
    methods = dict(entry.partition(":")[::2] for entry in wanted or METHODS)
    for method, names in methods.items():
        chosen = names.split(",") if names not in ("", "all") else faults_of(method, everything=names == "all")
        (folder / method).mkdir(parents=True)
        sufferer = Sufferer(method, folder / method, seed)
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
