"""The files of a run directory, which no killed process, full disk or damaged file makes unusable."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from cl_methods import ranks
from cl_methods.training.checkpoints.atomic import TEMPORARY, WriteError, remove_folder, write_atomically, writing
from cl_methods.training.checkpoints.folder import (
    Checkpoint,
    DamagedError,
    RunDirectoryError,
    TrainingProgress,
    read_json,
    write_checkpoint,
)
from cl_methods.training.checkpoints.lock import LOCK, RunLock

_NAME = re.compile(r"task(\d+)(?:-step(\d+))?$")
_IN_A_TASK = 2
"""Checkpoints inside a task that stay: if the newest is damaged, the other one is there."""


@dataclass
class CheckpointOptions:
    """When checkpoints are written and which are kept.

    Attributes:
        every: optimiser steps between checkpoints inside a task; 0 for none. Every finished task gets one anyway.
        keep: finished tasks whose checkpoint stays: `all`, or only the `last` one.
    """

    every: int = 200
    keep: Literal["all", "last"] = "all"

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ValueError(f"checkpoint.every: expected a number of steps >= 0, got {self.every}")
        if self.keep not in ("all", "last"):
            raise ValueError(f"checkpoint.keep: expected all or last, got {self.keep!r}")


class RunDirectory:
    """The files of one run.

    ``run.json`` (what was asked for), ``rows.json`` (accuracies so far), ``checkpoints/``, ``result.json`` (only when
    the run is complete) and the report.

    Random number generators are not stored: every step seeds them from (seed, task, step). Nor is the number of processes; where
    several compute together, the first alone touches the disk, and all have what it read or the error that it met.
    """

    _OWN = (
        "run.json",
        "config.yaml",
        "rows.json",
        "result.json",
        "diverged.json",
        "checkpoints",
        "accuracy.png",
        "matrix.png",
        "report.md",
    )

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self._lock = RunLock(self.path / LOCK)

    @ranks.by_first
    def check(self, *, resume: bool = False, overwrite: bool = False) -> bool:
        """Whether an earlier run is there; touches nothing.

        Raises:
            RunDirectoryError: the directory has content and neither ``resume`` nor ``overwrite`` was given, or its
                content is not an earlier run.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RunDirectoryError(f"output: {self.path} is a file, not a directory")
        try:
            content = sorted(entry.name for entry in self.path.iterdir()) if self.path.exists() else []
        except OSError as error:
            raise RunDirectoryError(f"output: {self.path} cannot be read ({error.strerror or error})") from error
        content = [name for name in content if not name.startswith(TEMPORARY) and name != LOCK]
        earlier = "run.json" in content
        if content and not earlier:
            raise RunDirectoryError(
                f"output: {self.path} is not empty and holds no earlier run (found {', '.join(content[:3])}); "
                "choose another directory"
            )
        if earlier and not (resume or overwrite):
            raise RunDirectoryError(
                f"output: {self.path} already holds a run; continue it with --resume, replace it with --overwrite, "
                "or choose another directory"
            )
        return earlier

    @ranks.by_first
    def prepare(self, *, resume: bool = False, overwrite: bool = False) -> bool:
        """Make the directory ready for a run, and keep other processes from it until :meth:`release`.

        A complete run that is to be resumed may lie where this process cannot write: there is nothing left to do in it.

        Returns:
            Whether an earlier run is there to be resumed.

        Raises:
            RunDirectoryError: see :meth:`check`; or another process is at work in the directory.
            WriteError: it cannot be made, or not be written to.
        """
        earlier = self.check(resume=resume, overwrite=overwrite)
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.take()
        except WriteError as error:
            if resume and earlier and error.read_only and self._is_complete():
                return True
            raise
        try:
            return self._prepare(resume=resume, overwrite=overwrite)
        except BaseException:
            self._lock.release()
            raise

    @ranks.by_first
    def held(self) -> bool:
        """Whether the run may write here: between :meth:`prepare` and :meth:`release`, unless it is complete and read-only."""
        return self._lock.held

    def _is_complete(self) -> bool:
        try:
            return read_json(self.path / "result.json") is not None
        except DamagedError:
            return False

    def release(self) -> None:
        """Let other processes use the directory; nothing happens in a process that does not hold it."""
        self._lock.release()

    def _prepare(self, *, resume: bool, overwrite: bool) -> bool:
        earlier = self.check(resume=resume, overwrite=overwrite)  # again: another process may have been here until now
        if earlier and overwrite and not resume:
            self._remove_earlier()
            earlier = False
        for folder in (self.path, self.checkpoints):
            for leftover in folder.glob(f"{TEMPORARY}*"):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        return earlier

    def _remove_earlier(self) -> None:
        """Delete what a run writes, ``run.json`` last, so that an interrupted deletion is still recognised."""
        for name in sorted(self._OWN, key="run.json".__eq__):
            target = self.path / name
            if target.is_dir():
                shutil.rmtree(target)
            else:
                target.unlink(missing_ok=True)

    @ranks.by_first
    def write_json(self, name: str, content: Any) -> None:
        """Replace ``name`` by ``content`` in one step: a reader sees the old file or the new one."""
        self.write_text(name, json.dumps(content, indent=1, allow_nan=False) + "\n")

    @ranks.by_first
    def write_text(self, name: str, text: str) -> None:
        """The same for any text."""
        write_atomically(self.path / name, text)

    @ranks.by_first
    def forget(self, name: str) -> None:
        """Delete ``name`` if it is there."""
        with writing(self.path / name):
            (self.path / name).unlink(missing_ok=True)

    @ranks.by_first
    def read_json(self, name: str) -> Any:
        """The content of ``name``, or None if there is no such file.

        Raises:
            DamagedError: it cannot be read or is not JSON.
        """
        return read_json(self.path / name)

    @ranks.by_first
    def found(self) -> list[Checkpoint]:
        """Complete checkpoints, in the order in which they were written."""
        checkpoints = []
        for path in self.checkpoints.iterdir() if self.checkpoints.exists() else ():
            match = _NAME.match(path.name)
            if match:
                task, step = match.groups()
                checkpoints.append(Checkpoint(path, int(task), None if step is None else int(step)))
        return sorted(checkpoints, key=lambda item: (item.task, float("inf") if item.step is None else item.step))

    @ranks.by_first
    def save(
        self,
        task: int,
        step: int | None,
        method_state: dict[str, Tensor],
        optimizer_state: dict[str, Any] | None,
        progress: TrainingProgress,
        *,
        keep: str = "all",
        rows: dict[str, Any] | None = None,
    ) -> Checkpoint:
        """Write a checkpoint, then remove those that it makes superfluous.

        The folder is written under another name, synchronised to the disk and renamed; until then the previous
        checkpoint stays.

        Args:
            task: 0-based task.
            step: optimiser steps done, or None when the task is finished.
            method_state, optimizer_state, progress: what to store.
            keep: see :class:`CheckpointOptions`.
            rows: the accuracies known so far, so that ``rows.json`` can be lost without loss.

        Raises:
            WriteError: the disk is full or the folder is gone; all earlier checkpoints are as they were.
        """
        with writing(self.checkpoints):
            self.checkpoints.mkdir(exist_ok=True)
        target = self.checkpoints / (f"task{task:02d}" if step is None else f"task{task:02d}-step{step:06d}")
        write_checkpoint(target, method_state, optimizer_state, progress, rows)
        written = Checkpoint(target, task, step)
        for other in self._superfluous(written, keep):
            remove_folder(other.path)
        return written

    def _superfluous(self, written: Checkpoint, keep: str) -> list[Checkpoint]:
        """What nobody needs any more, or what belongs to a later time than ``written`` and was not good enough to go on from."""
        others = [other for other in self.found() if other.path != written.path]
        inside = [other for other in others if other.step is not None]
        if written.step is None:
            return inside + [other for other in others if other.step is None and keep == "last"]
        earlier = [other for other in inside if other.task == written.task and (other.step or 0) < written.step]
        stay = earlier[-(_IN_A_TASK - 1) :]
        return [other for other in inside if other not in stay]
