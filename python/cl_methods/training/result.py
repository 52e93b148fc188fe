"""The content of ``result.json``."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from cl_methods.evaluation.metrics import class_incremental_metrics, forgetting, mtil_metrics
from cl_methods.evaluation.options import LabelSpace, evaluated_images, guessing
from cl_methods.scenarios.base import Scenario
from cl_methods.training.checkpoints import TrainingProgress
from cl_methods.training.config import RunConfig
from cl_methods.training.rows import Rows


def run_result(
    config: RunConfig,
    scenario: Scenario,
    *,
    method: str,
    joint: bool,
    rows: Rows,
    training: TrainingProgress,
    peaks: Sequence[int],
    description: dict[str, Any],
) -> dict[str, Any]:
    """What a complete run found, what it cost and what it depends on, as plain values.

    A method that learns nothing, or everything at once, has the same row after every task. For joint training Transfer
    and forgetting would have no meaning and are None. Scenario ``cil`` has ``class_incremental`` besides, unless each task's
    classes competed alone. Where several label spaces were measured, these are the values of the first, and
    ``label_spaces`` has those of the others by name. ``evaluated`` says how many images the accuracies are of, and
    whether that is all; ``novelty`` how well the uncertainties that were asked for tell known images from novel ones.

    Args:
        config, scenario: what was run.
        method: its name.
        joint: trained on all tasks at once.
        rows: what evaluations found: T rows of accuracies, or one for joint training, or none if nothing was trained.
        training: costs.
        peaks: peak memory of every process, in bytes.
        description: the content of ``run.json``.
    """
    tasks, options = scenario.tasks, config.evaluation
    first, *others = options.label_spaces
    seconds = sum(training.seconds)
    further = {space: _accuracies(config, scenario, space, rows.further[space], joint) for space in others}
    return {
        "method": method,
        "scenario": config.scenario,
        "order": config.order,
        "seed": config.seed,
        "continual": not joint,
        "tasks": [task.name for task in tasks],
        **_accuracies(config, scenario, first, rows, joint),
        **({"label_spaces": further} if further else {}),
        **_novelty(rows),
        "evaluated": {
            "limit": options.limit,
            "images": [len(evaluated_images(task, options)) for task in tasks],
            "available": [len(getattr(task, options.split)) for task in tasks],
        },
        "train": {
            "seconds": seconds,
            "samples_per_second": training.samples / seconds if seconds else None,
            "peak_memory_bytes": max(peaks),
            "trainable_parameters": max(training.trainable_parameters, default=0),
            "seconds_per_task": training.seconds,
            "samples": training.samples,
            **_memory(description.get("memory_plan"), peaks),
        },
        "evaluation_seconds": rows.seconds,
        "data": scenario.notes,
        "scenario_fingerprint": description["scenario_fingerprint"],
        "weights": description.get("weights"),
        **({"started_from": started} if (started := description.get("started_from")) else {}),
        "environment": description["environment"],
        "config": description["config"],
    }


def _accuracies(config: RunConfig, scenario: Scenario, space: LabelSpace, rows: Rows, joint: bool) -> dict[str, Any]:
    """What was found in one label space."""
    tasks, zero_shot = scenario.tasks, rows.zero_shot or []
    measured = rows.accuracy or [zero_shot]
    matrix = measured if len(measured) == len(tasks) else [measured[0]] * len(tasks)
    metrics = mtil_metrics(matrix)
    return {
        "chance": [guessing(tasks, index, space) for index in range(len(tasks))],
        "zero_shot": zero_shot,
        "accuracy": matrix,
        "transfer": None if joint or len(tasks) == 1 else metrics["transfer"],
        "average": metrics["average"],
        "last": metrics["last"],
        "forgetting": None if joint else forgetting(matrix),
        "calibration_error": fmean(rows.calibration_error[-1]),
        "calibration_error_per_row": rows.calibration_error,
        "reliability": rows.reliability,
        "transfer_per_task": None if joint else metrics["transfer_per_task"],
        "average_per_task": metrics["average_per_task"],
        "last_per_task": metrics["last_per_task"],
        **_class_incremental(config, scenario, space, matrix, joint),
    }


def _novelty(rows: Rows) -> dict[str, Any]:
    """``novelty``: for each uncertainty the measures in percent after every task but the last, of zero-shot and learnt model."""
    if not rows.novelty:
        return {}
    start, *later = rows.novelty
    kinds = dict.fromkeys(kind for row in rows.novelty for kind in row)
    return {
        "novelty": {
            kind: {
                "zero_shot": _percent(start.get(kind, [])),
                "after_task": _percent([measures for row in later for measures in row.get(kind, [])]),
            }
            for kind in kinds
        }
    }


def _percent(measured: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: 100.0 * value for name, value in measures.items()} for measures in measured]


def _memory(plan: dict[str, Any] | None, peaks: Sequence[int]) -> dict[str, Any]:
    """``memory``: the plan, the peaks of all processes, and how far the highest is from the prediction as a share of it."""
    if plan is None:
        return {}
    return {"memory": {"plan": plan, "measured": list(peaks), "difference": max(peaks) / plan["peak"] - 1}}


def _class_incremental(
    config: RunConfig, scenario: Scenario, space: LabelSpace, matrix: list[list[float]], joint: bool
) -> dict[str, dict[str, Any]]:
    """``class_incremental``: average, last and per_step; joint training, which has no steps, has the last alone."""
    if config.scenario != "cil" or space == "task":
        return {}
    images = [len(evaluated_images(task, config.evaluation)) for task in scenario.tasks]
    found = class_incremental_metrics(matrix, images)
    return {"class_incremental": found | {"average": None, "per_step": None} if joint else found}
