"""What makes a run the same run: its settings, data and weights, as ``run.json`` holds them."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cl_methods import ranks
from cl_methods.methods import Method
from cl_methods.scenarios.base import Scenario
from cl_methods.training.checkpoints import DamagedError, RunDirectory, RunDirectoryError
from cl_methods.training.config import RunConfig, differences
from cl_methods.training.environment import describe_environment

FORMAT = 1
"""Of the files in a run directory. A version that reads other files, or reads them otherwise, has the next number."""


def describe_run(config: RunConfig, scenario: Scenario, method: Method, device: torch.device) -> dict[str, Any]:
    """Settings, fingerprints of data and weights, environment and command, as plain values."""
    origin = getattr(method.backbone, "origin", None)
    return {
        "format": FORMAT,
        "config": config.as_dict(),
        "scenario_fingerprint": scenario.fingerprint(),
        "tasks": [task.name for task in scenario.tasks],
        "weights": origin.as_dict() if origin is not None else None,
        "environment": describe_environment(device),
        "command": shlex.join(sys.argv),
    }


def check_same_everywhere(description: dict[str, Any]) -> None:
    """Make sure that the processes of a run have the same data and weights, each from wherever it read them.

    Raises:
        ValueError: they have not.
    """
    kinds = {"weights": "weights", "started_from": "weights to start from"}
    own = {kind: (description.get(key) or {}).get("fingerprint") for key, kind in kinds.items()}
    own["data"] = description["scenario_fingerprint"]
    for number, others in enumerate(ranks.gather_values(own)):
        for kind, fingerprint in own.items():
            if others[kind] != fingerprint:
                raise ValueError(
                    f"{kind}: expected the same in every process, got fingerprint {str(fingerprint)[:12]} in number "
                    f"{ranks.rank()} and {str(others[kind])[:12]} in number {number}; give every machine the same files"
                )


def check_same_run(before: dict[str, Any], now: dict[str, Any], path: Path, note: Callable[[str], None]) -> None:
    """Refuse to resume a run of other settings, data or weights.

    Args:
        before: what ``run.json`` holds.
        now: :func:`describe_run` of the run that would go on.
        path: the run directory, for messages.
        note: told if the environment is another one.

    Raises:
        RunDirectoryError: something that decides the result differs, or a later version wrote the run.
    """
    written = before.get("format", FORMAT)
    if not isinstance(written, int) or written > FORMAT:
        version = before.get("environment", {}).get("cl_kernels", "a later version")
        raise RunDirectoryError(
            f"resume: the run in {path} has files of format {written}, written by cl_kernels {version}; this version reads "
            f"formats up to {FORMAT}. Go on with that version, or choose another directory"
        )
    changed = differences(before["config"], now["config"])
    if changed:
        raise RunDirectoryError(
            f"resume: the run in {path} has other settings: {'; '.join(changed)}. "
            "Give the same settings again, or choose another directory"
        )
    if before["scenario_fingerprint"] != now["scenario_fingerprint"]:
        raise RunDirectoryError(
            f"resume: the data of scenario {now['config']['scenario']} has changed since the run in {path} began "
            f"(fingerprint {before['scenario_fingerprint'][:12]}, now {now['scenario_fingerprint'][:12]}). "
            "Restore the data, or start a new run"
        )
    old_weights, new_weights = (entry.get("weights") or {} for entry in (before, now))
    if old_weights.get("fingerprint") and old_weights["fingerprint"] != new_weights.get("fingerprint"):
        raise RunDirectoryError(
            f"resume: the weights of {now['config']['model']} have changed since the run in {path} began "
            f"(fingerprint {old_weights['fingerprint'][:12]} of {old_weights['source']}, "
            f"now {str(new_weights.get('fingerprint'))[:12]}). Restore the file, or start a new run"
        )
    old_start, new_start = (entry.get("started_from") or {} for entry in (before, now))
    if old_start.get("fingerprint") != new_start.get("fingerprint"):
        raise RunDirectoryError(
            f"resume: the run in {path} began from {_start(old_start)}, now from {_start(new_start)}. "
            "Give the same --weights again, or start a new run"
        )
    old, new = before["environment"], now["environment"]
    moved = [f"{key} was {old.get(key)}, now {new[key]}" for key in new if old.get(key) != new[key]]
    if moved:
        note(f"resuming in another environment; results may differ in the last bits: {'; '.join(moved)}")


def evaluation_batch_of(directory: RunDirectory) -> int | None:
    """How many images the run in ``directory`` scores together; None where there is no run, or no whole description of it."""
    try:
        described = directory.read_json("run.json") or {}
        images = described["config"]["evaluation"]["batch_size"]
    except (DamagedError, KeyError, TypeError):
        return None  # whoever opens the directory says what is wrong with it
    return images if isinstance(images, int) else None


def _start(started: dict[str, Any]) -> str:
    return f"{started['source']} ({started['fingerprint'][:12]})" if started else "the pre-trained model"
