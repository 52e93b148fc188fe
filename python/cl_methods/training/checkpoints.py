"""Checkpoints that a killed process cannot leave half written, and the files of a run directory."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

_NAME = re.compile(r"task(\d+)(?:-step(\d+))?$")
_TEMPORARY = ".incomplete-"


class RunDirectoryError(RuntimeError):
    """A run directory cannot be used as asked. The message says what is in the way and what to do."""


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


@dataclass
class TrainingProgress:
    """What training has cost so far, carried from checkpoint to checkpoint.

    Attributes:
        seconds: of optimiser steps and hooks, per task.
        samples: images of tasks seen by optimiser steps since the beginning.
        trainable_parameters: per task, in the order in which they were trained.
    """

    seconds: list[float] = field(default_factory=list)
    samples: int = 0
    trainable_parameters: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk.

    Attributes:
        path: its folder: ``model.safetensors`` and ``state.pt``.
        task: 0-based task.
        step: steps done in that task, or None when the task is finished.
    """

    path: Path
    task: int
    step: int | None

    def method_state(self) -> dict[str, Tensor]:
        """The method's tensors, on the CPU."""
        return load_file(self.path / "model.safetensors")

    def training_state(self) -> tuple[dict[str, Any] | None, TrainingProgress]:
        """The optimiser's state (None after a finished task) and what training has cost."""
        state = torch.load(self.path / "state.pt", weights_only=True, map_location="cpu")
        return state["optimizer"], TrainingProgress(**state["progress"])


class RunDirectory:
    """The files of one run.

    ``run.json`` (what was asked for), ``rows.json`` (accuracies so far), ``checkpoints/``, ``result.json`` (only when
    the run is complete) and the report.

    Random number generators are not stored: every step seeds them from (seed, task, step).
    """

    _OWN = (
        "run.json",
        "config.yaml",
        "rows.json",
        "result.json",
        "checkpoints",
        "accuracy.png",
        "matrix.png",
        "report.md",
    )

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"

    def check(self, *, resume: bool = False, overwrite: bool = False) -> bool:
        """Whether an earlier run is there; touches nothing.

        Raises:
            RunDirectoryError: the directory has content and neither ``resume`` nor ``overwrite`` was given, or its
                content is not an earlier run.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RunDirectoryError(f"output: {self.path} is a file, not a directory")
        content = sorted(entry.name for entry in self.path.iterdir()) if self.path.exists() else []
        content = [name for name in content if not name.startswith(_TEMPORARY)]
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

    def prepare(self, *, resume: bool = False, overwrite: bool = False) -> bool:
        """Make the directory ready for a run.

        Returns:
            Whether an earlier run is there to be resumed.

        Raises:
            RunDirectoryError: see :meth:`check`.
        """
        earlier = self.check(resume=resume, overwrite=overwrite)
        if earlier and overwrite and not resume:
            self._remove_earlier()
            earlier = False
        self.path.mkdir(parents=True, exist_ok=True)
        for folder in (self.path, self.checkpoints):
            for leftover in folder.glob(f"{_TEMPORARY}*"):
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

    def write_json(self, name: str, content: Any) -> None:
        """Replace ``name`` by ``content`` in one step: a reader sees the old file or the new one."""
        write_atomically(self.path / name, json.dumps(content, indent=1, allow_nan=False) + "\n")

    def read_json(self, name: str) -> Any:
        """The content of ``name``, or None if there is no such file."""
        path = self.path / name
        return json.loads(path.read_text()) if path.exists() else None

    def found(self) -> list[Checkpoint]:
        """Complete checkpoints, in the order in which they were written."""
        checkpoints = []
        for path in self.checkpoints.iterdir() if self.checkpoints.exists() else ():
            match = _NAME.match(path.name)
            if match:
                task, step = match.groups()
                checkpoints.append(Checkpoint(path, int(task), None if step is None else int(step)))
        return sorted(checkpoints, key=lambda item: (item.task, float("inf") if item.step is None else item.step))

    def save(
        self,
        task: int,
        step: int | None,
        method_state: dict[str, Tensor],
        optimizer_state: dict[str, Any] | None,
        progress: TrainingProgress,
        *,
        keep: str = "all",
    ) -> Checkpoint:
        """Write a checkpoint, then remove those that it makes superfluous.

        The folder is written under another name, synchronised to the disk and renamed; until then the previous
        checkpoint stays.

        Args:
            task: 0-based task.
            step: optimiser steps done, or None when the task is finished.
            method_state, optimizer_state, progress: what to store.
            keep: see :class:`CheckpointOptions`.
        """
        self.checkpoints.mkdir(exist_ok=True)
        name = f"task{task:02d}" if step is None else f"task{task:02d}-step{step:06d}"
        folder = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=self.checkpoints))
        save_file(_without_aliases(method_state), folder / "model.safetensors")
        torch.save({"optimizer": optimizer_state, "progress": vars(progress)}, folder / "state.pt")
        for file in folder.iterdir():
            _synchronise(file)
        _synchronise(folder)
        target = self.checkpoints / name
        if target.exists():
            _remove(target)
        folder.rename(target)
        _synchronise(self.checkpoints)
        for other in self.found():
            superfluous = other.step is not None or (keep == "last" and step is None)
            if other.path != target and superfluous:
                _remove(other.path)
        return Checkpoint(target, task, step)


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` to a temporary file beside ``path``, synchronise it and rename it over ``path``."""
    handle, name = tempfile.mkstemp(prefix=_TEMPORARY, dir=path.parent)
    with os.fdopen(handle, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    Path(name).chmod(0o644)
    Path(name).replace(path)
    _synchronise(path.parent)


def _without_aliases(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors of which no two share memory, as safetensors requires."""
    seen: set[int] = set()
    result = {}
    for name, value in state.items():
        tensor = value.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        result[name] = tensor
    return result


def _synchronise(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Delete a checkpoint so that a half-deleted one is never taken for complete."""
    doomed = path.with_name(f"{_TEMPORARY}{path.name}")
    path.rename(doomed)
    shutil.rmtree(doomed)
