"""Finding and reading ``result.json`` files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cl_methods.text import printable_values

REQUIRED = (
    "method", "scenario", "seed", "tasks", "zero_shot", "accuracy", "transfer", "average", "last", "forgetting", "train",
    "environment", "config",
)  # fmt: skip


class ResultError(ValueError):
    """A result cannot be read or compared. The message names the file and says what to do."""


def find_results(paths: Sequence[Path]) -> list[Path]:
    """``result.json`` of each given run directory, or of the run directories inside each given directory.

    Raises:
        ResultError: a directory does not exist, holds no run, or holds one that is not complete.
    """
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            raise ResultError(f"{path} is not a directory; give the output directories of `clk run`")
        if (path / "result.json").is_file():
            found.append(path / "result.json")
            continue
        if (path / "run.json").is_file():
            raise ResultError(
                f"{path} holds a run that is not complete; finish it with `clk run --resume --output {path}`"
            )
        inside = sorted(path.glob("*/result.json"))
        if not inside:
            raise ResultError(
                f"{path} holds no result.json, nor does any directory in it; give the output of `clk run`"
            )
        found += inside
    return list(dict.fromkeys(file.resolve() for file in found))


def read_result(path: Path) -> dict[str, Any]:
    """The content of a ``result.json``.

    Raises:
        ResultError: it is not valid JSON, lacks keys, or its matrix does not fit its tasks.
    """
    try:
        result = printable_values(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, RecursionError) as error:
        raise ResultError(f"{path} is not valid JSON: {error}") from error
    missing = [key for key in REQUIRED if key not in result] if isinstance(result, dict) else list(REQUIRED)
    if missing:
        raise ResultError(f"{path} lacks {', '.join(missing)}; it was not written by `clk run`")
    _check_types(path, result)
    shape, tasks = np.shape(result["accuracy"]), len(result["tasks"])
    if shape != (tasks, tasks) or len(result["zero_shot"]) != tasks:
        raise ResultError(
            f"{path}: accuracy has shape {shape}, zero_shot {len(result['zero_shot'])}, tasks are {tasks}"
        )
    _check_reliability(path, result, tasks)
    return {**result, "path": str(path.parent)}


def _check_types(path: Path, result: dict[str, Any]) -> None:
    """Refuse what tables and figures would stumble over."""
    texts, mappings = ("method", "scenario"), ("train", "environment", "config")
    wrong = [name for name in texts if not isinstance(result[name], str)]
    wrong += [name for name in mappings if not isinstance(result[name], dict)]
    wrong += [] if isinstance(result["seed"], int) else ["seed"]
    wrong += [] if _lists(result["tasks"], str) else ["tasks"]
    wrong += [] if _lists(result["zero_shot"], (int, float)) else ["zero_shot"]
    wrong += [] if _novelty(result.get("novelty")) else ["novelty"]
    rows = result["accuracy"]
    regular = isinstance(rows, list) and all(_lists(row, (int, float)) for row in rows)
    wrong += [] if regular and len({len(row) for row in rows}) == 1 else ["accuracy"]
    if wrong:
        raise ResultError(f"{path}: {', '.join(wrong)} is not what `clk run` writes; restore the file or run it again")


def _novelty(found: Any) -> bool:
    """Whether it is absent, or lists of measures by uncertainty and moment."""
    moments = found.values() if isinstance(found, dict) else () if found is None else [found]
    return all(
        isinstance(one, dict)
        and one.keys() == {"zero_shot", "after_task"}
        and all(
            isinstance(rows, list)
            and all(isinstance(row, dict) and _lists([*row.values()], (int, float)) for row in rows)
            for rows in one.values()
        )
        for one in moments
    )


def _lists(values: Any, kind: type | tuple[type, ...]) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)


def _check_reliability(path: Path, result: dict[str, Any], tasks: int) -> None:
    """Absent or empty in older results; otherwise three rows of equally many numbers per task."""
    stored = result.get("reliability") or []
    keys = ("count", "correct", "confidence")
    lengths = {len(task[key]) if isinstance(task, dict) and key in task else 0 for task in stored for key in keys}
    if stored and (len(stored) != tasks or len(lengths) != 1 or 0 in lengths):
        raise ResultError(
            f"{path}: reliability has {len(stored)} entries with {sorted(lengths)} bins; expected one for each of {tasks} "
            f"tasks, with equally many numbers in {', '.join(keys)}"
        )
