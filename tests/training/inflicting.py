"""The faults of ``faults.py``: what each does, when, and how the run has to end."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from privileges import close, open_again

from cl_methods.commands import run as run_command
from cl_methods.datasets.images import DataError, TensorImages
from cl_methods.training import run as run_module
from cl_methods.training.checkpoints import RunDirectory, atomic
from cl_methods.training.checkpoints.atomic import sha256
from cl_methods.training.progress import PlainProgress

WITHOUT_TRAINING = ["sigterm", "sigint", "kill", "two signals", "no room", "read-only", "log full", "no memory"]
SMALL = 4096


@dataclass(frozen=True)
class Fault:
    """How a run ends: exit status, sentence, and whether only optimiser steps can suffer it. Status 0: it goes on to its end."""

    status: int
    sentence: str
    optimiser: bool = False


FAULTS = {
    "sigterm": Fault(
        143, r"SIGTERM: stopping after this step.*\n(.*\n)*stopped .*(continue with --resume|which is complete)"
    ),
    "sigint": Fault(
        130, r"SIGINT: stopping after this step.*\n(.*\n)*stopped .*(continue with --resume|which is complete)"
    ),
    "two signals": Fault(-signal.SIGTERM, r"SIGTERM: stopped at once"),
    "kill": Fault(-signal.SIGKILL, ""),
    "kill in a write": Fault(-signal.SIGKILL, ""),
    "file too large": Fault(2, r"cannot be written \(.*(large|writ|offset).*--resume"),
    "no room": Fault(2, r"cannot be written \(No space left on device\).*--resume"),
    "folder gone": Fault(2, r"cannot be written \(No such file or directory\).*--resume"),
    "loss is NaN": Fault(2, r"loss is not finite at step \d+ of task \w+: .*The (last|same)|No checkpoint", True),
    "weight is NaN": Fault(2, r"weights are not finite after step \d+ of task", True),
    "folder deleted": Fault(2, r"cannot be written \(No such file or directory\).*--resume"),
    "read-only": Fault(2, r"cannot be written \(Permission denied\); make the folder writable.*--resume"),
    "no room for the result": Fault(2, r"result\.json cannot be written \(No space left on device\).*--resume"),
    "sigterm in a write": Fault(
        143, r"SIGTERM: stopping after this step.*\n(.*\n)*stopped .*(continue with --resume|which is complete)"
    ),
    "image gone": Fault(2, r"error: image \d+ is gone\. (The last good|No checkpoint).*--resume"),
    "log full": Fault(0, ""),
    "no memory": Fault(2, r"no memory left \(.*can't allocate memory.*(The last good|No checkpoint).*--memory-budget"),
    "worker killed": Fault(2, r"DataLoader worker.*a process that reads images has died.*--resume"),
}


WITH_WORKERS = ("worker killed", "sigterm", "loss is NaN", "image gone")


class Inflict:
    """One fault of one run: strikes at the event-th step or evaluation of a task that the run reports.

    Attributes:
        name: key of :data:`FAULTS`.
        event: 1 for the first.
        status, sentence: how the run has to end.
        arguments: options that the fault needs.
    """

    def __init__(self, name: str, event: int) -> None:
        self.name, self.event = name, event
        self.status, self.sentence = FAULTS[name].status, FAULTS[name].sentence
        self.arguments = ["--workers", "1"] if name in WITH_WORKERS else []
        self.output = Path()

    def prepare(self, output: Path) -> None:
        """In the child: arrange the fault, and write down what is reported as saved."""
        self.output = output
        journal = output.with_suffix(".saved")
        journal.unlink(missing_ok=True)
        file = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        save, write_json = RunDirectory.save, RunDirectory.write_json

        def saving(*arguments, **options):
            checkpoint = save(*arguments, **options)
            os.write(file, f"{checkpoint.path.name}\n".encode())
            return checkpoint

        def writing(directory, name, content):
            write_json(directory, name, content)
            if name == "rows.json":
                os.write(file, f"rows {len(content['accuracy'])}\n".encode())

        RunDirectory.save, RunDirectory.write_json = saving, writing
        if self.name in ("loss is NaN", "weight is NaN"):
            self._poison(run_module.build_method)
        elif self.name in ("kill in a write", "sigterm in a write"):
            self._signal_in_a_write(signal.SIGKILL if self.name == "kill in a write" else signal.SIGTERM)
        elif self.name == "no room for the result":
            self._no_room_for_the_result()
        else:
            run_command.progress_for = lambda: Striking(self)

    def strike(self) -> None:
        """In the child, in the middle of the run."""
        struck_in(self.output).touch()
        if self.name in ("sigterm", "sigint"):
            os.kill(os.getpid(), getattr(signal, self.name.upper()))
        elif self.name == "two signals":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.6)
            os.kill(os.getpid(), signal.SIGTERM)
        elif self.name == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.name == "file too large":
            resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL, resource.RLIM_INFINITY))
        elif self.name == "no room":
            os.fsync = no_room
        elif self.name == "folder gone":
            self.output.rename(self.output.with_suffix(".away"))
        elif self.name == "folder deleted":
            shutil.rmtree(self.output.resolve())
        elif self.name == "read-only":
            close(self.output)
        elif self.name == "image gone":
            TensorImages.image = gone
        elif self.name == "log full":
            full = os.open("/dev/full", os.O_WRONLY)
            os.dup2(full, 1)
            os.dup2(full, 2)
        elif self.name == "no memory":
            torch.empty(1 << 50, dtype=torch.uint8)
        elif self.name == "worker killed":
            for worker in multiprocessing.active_children():
                os.kill(worker.pid, signal.SIGKILL)
            time.sleep(0.3)

    def repair(self, output: Path) -> None:
        """In the parent: put back what the fault took away."""
        away = output.with_suffix(".away")
        if away.exists():
            assert not output.exists(), "a run directory that was taken away came back by itself"
            away.rename(output)
        if self.name == "read-only":
            open_again(output)

    def check_saved(self, output: Path) -> None:
        """Whatever the run had reported as saved is there, intact, and can be read."""
        lines = output.with_suffix(".saved").read_text().splitlines()
        checkpoints = [line for line in lines if not line.startswith("rows ")]
        if checkpoints:
            found = {checkpoint.path.name: checkpoint for checkpoint in RunDirectory(output).found()}
            found[checkpoints[-1]].check()
            found[checkpoints[-1]].training_state()
            state = found[checkpoints[-1]].method_state()
            assert all(not value.isnan().any() for value in state.values() if value.is_floating_point()), checkpoints[
                -1
            ]
        rows = [int(line.split()[1]) for line in lines if line.startswith("rows ")]
        if rows:
            assert len(json.loads((output / "rows.json").read_text())["accuracy"]) >= rows[-1]
        assert (output / "diverged.json").exists() == (self.name in ("loss is NaN", "weight is NaN"))

    def _poison(self, build: Callable) -> None:
        def building(*arguments):
            method, calls = build(*arguments), 0
            loss, after_step = method.loss, method.after_step

            def wrong_loss(batch):
                nonlocal calls
                calls, terms = calls + 1, loss(batch)
                return {**terms, "loss": terms["loss"] * float("nan")} if calls == self.event else terms

            def wrong_weight(step):
                nonlocal calls
                calls, _ = calls + 1, after_step(step)
                if calls == self.event:
                    with torch.no_grad():
                        method.trainable()[0][1].view(-1)[0] = float("nan")

            if self.name == "loss is NaN":
                method.loss = wrong_loss
            else:
                method.after_step = wrong_weight
            return method

        run_module.build_method = building

    def _signal_in_a_write(self, number: int) -> None:
        synchronise, calls = atomic.synchronise, 0

        def signalling(path):
            nonlocal calls
            calls += 1
            if calls == 3 * self.event + 2:  # the first two calls write run.json and config.yaml
                os.kill(os.getpid(), number)
            synchronise(path)

        atomic.synchronise = signalling

    def _no_room_for_the_result(self) -> None:
        write_json = RunDirectory.write_json

        def writing(directory, name, content):
            if name == "result.json":
                os.fsync = no_room
            write_json(directory, name, content)

        RunDirectory.write_json = writing


def struck_in(output: Path) -> Path:
    """A file that a fault leaves beside the run when it strikes."""
    return output.with_suffix(".struck")


class Striking(PlainProgress):
    """Counts steps and evaluated tasks."""

    def __init__(self, fault: Inflict) -> None:
        super().__init__()
        self.fault, self.events = fault, 0

    def _count(self) -> None:
        self.events += 1
        if self.events == self.fault.event:
            self.fault.strike()

    def step(self, report) -> None:
        super().step(report)
        self._count()

    def evaluated(self, task, accuracy) -> None:
        super().evaluated(task, accuracy)
        self._count()


def gone(_: TensorImages, index: int) -> None:
    raise DataError(f"image {index} is gone")


def no_room(_: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _newest(output: Path) -> Path:
    return RunDirectory(output).found()[-1].path


def _flip(output: Path) -> str:
    path = _newest(output) / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return r"passed over: .*model\.safetensors is not what was written"


def _cut_off(output: Path) -> str:
    path = _newest(output) / "state.pt"
    path.write_bytes(path.read_bytes()[:-100])
    return r"passed over: .*state\.pt is not what was written"


def _file_gone(output: Path) -> str:
    (_newest(output) / "state.pt").unlink()
    return r"passed over: .*state\.pt is missing"


def _rows_gone(output: Path) -> str:
    (output / "rows.json").unlink(missing_ok=True)
    return ""


def _rows_damaged(output: Path) -> str:
    (output / "rows.json").write_text('{"zero_shot": [')
    return r"rows\.json cannot be read .*the rows in the checkpoints are used"


def _rows_of_another_run(output: Path) -> str:
    (output / "rows.json").write_text(json.dumps({"zero_shot": [1.0, 2.0, 3.0, 4.0, 5.0]}))
    return r"rows\.json is damaged .*the rows in the checkpoints are used"


def _of_another_version(output: Path) -> str:
    """Intact, and with something in it that this version does not know."""
    folder = _newest(output)
    state = torch.load(folder / "state.pt", weights_only=True)
    torch.save({**state, "progress": {**state["progress"], "hours": 1.0}}, folder / "state.pt")
    names = [line.split("  ")[1] for line in (folder / "SHA256SUMS").read_text().splitlines()]
    (folder / "SHA256SUMS").write_text("".join(f"{sha256(folder / name)}  {name}\n" for name in names))
    return r"passed over: .*state\.pt cannot be read .*hours"


def _clock_set_back(output: Path) -> str:
    """The newest files are the oldest by their times, and all of them are of the future."""
    paths = [
        *(one.path for one in RunDirectory(output).found()),
        *(path for path in output.iterdir() if path.is_file()),
    ]
    for age, path in enumerate(paths):
        os.utime(path, (2**32 - age, 2**32 - age))
    return ""


DAMAGES = {
    "another version": _of_another_version,
    "clock set back": _clock_set_back,
    "checkpoint altered": _flip,
    "checkpoint cut off": _cut_off,
    "checkpoint file gone": _file_gone,
    "rows gone": _rows_gone,
    "rows damaged": _rows_damaged,
    "rows of another run": _rows_of_another_run,
}
