"""The content of ``result.json``."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from cl_methods.evaluation.accuracy import guessing
from cl_methods.evaluation.metrics import class_incremental_metrics, forgetting, mtil_metrics
from cl_methods.scenarios.base import Scenario
from cl_methods.training.checkpoints import TrainingProgress
from cl_methods.training.config import RunConfig


def run_result(
    config: RunConfig,
    scenario: Scenario,
    *,
    method: str,
    joint: bool,
    zero_shot: list[float],
    rows: list[list[float]],
    calibration_rows: list[list[float]],
    reliability: list[dict[str, Any]],
    evaluation_seconds: list[float],
    training: TrainingProgress,
    peak_memory: int,
    description: dict[str, Any],
) -> dict[str, Any]:
    """What a complete run found, what it cost and what it depends on, as plain values.

    A method that learns nothing, or everything at once, has the same row after every task. For joint training Transfer
    and forgetting would have no meaning and are None. Scenario ``cil`` has ``class_incremental`` besides, unless each task's
    classes competed alone.

    Args:
        config, scenario: what was run.
        method: its name.
        joint: trained on all tasks at once.
        zero_shot: (T,) percent, before any training.
        rows: accuracy rows in percent: T of them, or one for joint training, or none if nothing was trained.
        calibration_rows: expected calibration errors in percent, the zero-shot row first.
        reliability: of each task after the last one, in bins of the confidence; empty if it was not stored.
        evaluation_seconds, training, peak_memory: costs.
        description: the content of ``run.json``.
    """
    tasks = scenario.tasks
    measured = rows or [zero_shot]
    matrix = measured if len(measured) == len(tasks) else [measured[0]] * len(tasks)
    metrics = mtil_metrics(matrix)
    seconds = sum(training.seconds)
    return {
        "method": method,
        "scenario": config.scenario,
        "order": config.order,
        "seed": config.seed,
        "continual": not joint,
        "tasks": [task.name for task in tasks],
        "chance": [guessing(tasks, index, config.evaluation.label_space) for index in range(len(tasks))],
        "zero_shot": zero_shot,
        "accuracy": matrix,
        "transfer": None if joint or len(tasks) == 1 else metrics["transfer"],
        "average": metrics["average"],
        "last": metrics["last"],
        "forgetting": None if joint else forgetting(matrix),
        "calibration_error": fmean(calibration_rows[-1]),
        "calibration_error_per_row": calibration_rows,
        "reliability": reliability,
        "transfer_per_task": None if joint else metrics["transfer_per_task"],
        "average_per_task": metrics["average_per_task"],
        "last_per_task": metrics["last_per_task"],
        **_class_incremental(config, scenario, matrix, joint),
        "train": {
            "seconds": seconds,
            "samples_per_second": training.samples / seconds if seconds else None,
            "peak_memory_bytes": peak_memory,
            "trainable_parameters": max(training.trainable_parameters, default=0),
            "seconds_per_task": training.seconds,
            "samples": training.samples,
        },
        "evaluation_seconds": evaluation_seconds,
        "data": scenario.notes,
        "scenario_fingerprint": description["scenario_fingerprint"],
        "weights": description.get("weights"),
        "environment": description["environment"],
        "config": description["config"],
    }


def _class_incremental(
    config: RunConfig, scenario: Scenario, matrix: list[list[float]], joint: bool
) -> dict[str, dict[str, Any]]:
    """``class_incremental``: average, last and per_step; joint training, which has no steps, has the last alone."""
    if config.scenario != "cil" or config.evaluation.label_space == "task":
        return {}
    images = [len(getattr(task, config.evaluation.split)) for task in scenario.tasks]
    found = class_incremental_metrics(matrix, images)
    return {"class_incremental": found | {"average": None, "per_step": None} if joint else found}
