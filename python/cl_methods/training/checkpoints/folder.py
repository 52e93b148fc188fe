"""One checkpoint on disk: its files, their checksums, and reading them without ever running what is in them."""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cl_methods.training.checkpoints.atomic import new_folder, sha256

MODEL, STATE, ROWS, SUMS = "model.safetensors", "state.pt", "rows.json", "SHA256SUMS"


class DamagedError(RuntimeError):
    """A file of a run is missing, cut off or altered. The message names it."""


class RunDirectoryError(RuntimeError):
    """A run directory cannot be used as asked. The message says what is in the way and what to do."""


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
        path: its folder: ``model.safetensors``, ``state.pt``, ``rows.json`` and ``SHA256SUMS``.
        task: 0-based task.
        step: steps done in that task, or None when the task is finished.
    """

    path: Path
    task: int
    step: int | None

    def method_state(self) -> dict[str, Tensor]:
        """The method's tensors, on the CPU.

        Raises:
            DamagedError: they cannot be read.
        """
        path = self.path / MODEL
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise DamagedError(f"{path} cannot be read ({error})") from error

    def training_state(self) -> tuple[dict[str, Any] | None, TrainingProgress]:
        """The optimiser's state (None after a finished task) and what training has cost.

        Raises:
            DamagedError: they cannot be read, or reading them would run code.
        """
        path = self.path / STATE
        try:
            state = torch.load(path, weights_only=True, map_location="cpu")
            return state["optimizer"], TrainingProgress(**state["progress"])
        except pickle.UnpicklingError as error:
            raise DamagedError(f"{path} holds more than tensors and plain values, so it is not read") from error
        except (OSError, RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
            text = (str(error).splitlines() or [type(error).__name__])[0]
            raise DamagedError(f"{path} cannot be read ({text})") from error

    def rows(self) -> dict[str, Any] | None:
        """The accuracies that were known when it was written; None if none were.

        Raises:
            DamagedError: they cannot be read.
        """
        path = self.path / ROWS
        return read_json(path)

    def check(self) -> None:
        """Compare the files with their checksums.

        Raises:
            DamagedError: one is missing, cut off or altered, or the list of checksums is.
        """
        path = self.path / SUMS
        if not path.exists():
            return  # written before there were checksums; a later error of reading says the same
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
            expected = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
        except (OSError, ValueError) as error:
            raise DamagedError(f"{path} cannot be read ({error})") from error
        if not expected.keys() >= {MODEL, STATE} or not expected.keys() <= {MODEL, STATE, ROWS}:
            raise DamagedError(f"{path} does not list {MODEL} and {STATE}")
        for name, digest in expected.items():
            file = self.path / name
            if not file.is_file():
                raise DamagedError(f"{file} is missing")
            if sha256(file) != digest:
                raise DamagedError(f"{file} is not what was written (its sha256 differs)")


def write_checkpoint(
    path: Path,
    method_state: dict[str, Tensor],
    optimizer_state: dict[str, Any] | None,
    progress: TrainingProgress,
    rows: dict[str, Any] | None,
) -> None:
    """Write a checkpoint's folder: under another name, synchronised to the disk, then renamed.

    Raises:
        WriteError: it cannot be written; what was at ``path`` is as it was.
    """
    with new_folder(path) as folder:
        save_file(_without_aliases(method_state), folder / MODEL)
        with (folder / STATE).open("wb") as file:  # whose errors have the system's reason, torch's own writing has not
            torch.save({"optimizer": optimizer_state, "progress": vars(progress)}, file)
        names = [MODEL, STATE]
        if rows is not None:
            (folder / ROWS).write_text(json.dumps(rows, allow_nan=False), encoding="utf-8")
            names.append(ROWS)
        lines = [f"{sha256(folder / name)}  {name}\n" for name in names]  # as `sha256sum --check` reads them
        (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def read_json(path: Path) -> Any:
    """The content of a JSON file, or None if there is no such file.

    Raises:
        DamagedError: it cannot be read or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedError(f"{path} cannot be read ({error})") from error


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
