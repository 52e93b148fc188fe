"""Which results may be compared: in one table those of the same tasks and conditions, in one row those of all seeds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cl_methods.evaluation.metrics import mtil_metrics

METRICS = ("transfer", "average", "last", "forgetting", "calibration_error")


@dataclass
class Group:
    """Runs that differ in nothing but the seed.

    Attributes:
        label: the method's name, with the settings in which groups of the same method differ.
        results: contents of ``result.json``, by seed.
    """

    label: str
    results: list[dict[str, Any]]

    @property
    def method(self) -> str:
        """The method's name."""
        return self.results[0]["method"]

    @property
    def continual(self) -> bool:
        """False for joint training."""
        return self.results[0].get("continual", True)

    @property
    def learnt(self) -> bool:
        """Whether there was training, rather than one measurement."""
        return self.method != "zero_shot" and not _measured_only(self.results[0])

    def values(self, metric: str) -> np.ndarray:
        """(seeds,) of one of :data:`METRICS`; empty if it is not defined, or was not when the runs were made."""
        return np.array([result[metric] for result in self.results if result.get(metric) is not None], dtype=float)

    def curves(self) -> np.ndarray:
        """(seeds, T + 1, T) accuracies: the zero-shot row, then one row after each task."""
        return np.array([[result["zero_shot"], *result["accuracy"]] for result in self.results], dtype=float)

    def per_task(self, metric: str) -> np.ndarray:
        """(T,) mean over seeds of one of transfer, average and last; NaN for the first task's Transfer."""
        values = [mtil_metrics(result["accuracy"])[f"{metric}_per_task"] for result in self.results]
        mean = np.mean(values, axis=0)
        return np.concatenate([[np.nan], mean]) if metric == "transfer" else mean


@dataclass
class Board:
    """Groups that may stand in one table: same scenario, order, data, model, label space and split.

    Attributes:
        scenario, order: of the runs.
        tasks: their names.
        conditions: model, label space, split and limit; family of splits, shots, dataset and what a run went on from, where
            there are any; for headings.
        chance: (T,) accuracy of guessing in percent.
        zero_shot: (T,) accuracy of the model before any training.
        zero_shot_calibration: (1,) its mean calibration error; empty if it was not measured.
        groups: continual methods first, joint training last.
    """

    scenario: str
    order: str
    tasks: list[str]
    conditions: dict[str, Any]
    chance: list[float] | None
    zero_shot: list[float]
    zero_shot_calibration: np.ndarray
    groups: list[Group] = field(default_factory=list)

    @property
    def title(self) -> str:
        """Scenario, the dataset of class-incremental runs, order, and whatever is not the default."""
        extra = [self.conditions["model"]] if self.conditions["model"] != self.scenario else []
        if self.conditions["label_space"] != "task":
            extra.append(f"label space {self.conditions['label_space']}")
        if self.conditions["split"] != "test":
            extra.append(f"{self.conditions['split']} split")
        if self.conditions.get("limit") is not None:
            extra.append(f"at most {self.conditions['limit']} images per task")
        if self.conditions.get("family") is not None:
            extra.append(f"{self.conditions['family']} splits")
        if self.conditions.get("shots") is not None:
            extra.append(f"{self.conditions['shots']} shots")
        if self.conditions.get("start") is not None:
            extra.append(f"going on from {self.conditions['start']}")
        name = " ".join(filter(None, (self.scenario, self.conditions.get("dataset"))))
        return f"{name}, order {self.order}" + (f" ({', '.join(extra)})" if extra else "")

    @property
    def baseline(self) -> str:
        """What the row before the first task is called."""
        return "zero-shot" if self.conditions.get("start") is None else "at the start"

    def compared(self) -> list[Group]:
        """The groups without runs that learnt nothing (zero-shot, or measured only), whose row every board has anyway."""
        return [group for group in self.groups if group.learnt]


def arrange(results: Sequence[dict[str, Any]]) -> tuple[list[Board], list[str]]:
    """Sort results into boards and groups.

    Returns:
        The boards, and notes for the reader: repeated runs are counted once, runs that were evaluated on some of the images
        stand apart from those with all of them.
    """
    notes: list[str] = []
    boards: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for result in results:
        for view in _label_spaces(result):
            boards.setdefault(_board_key(view), []).append(view)
    notes += [
        f"{result['path']} was evaluated on at most {_limit(result)} images per task; it is not compared with whole test sets"
        for result in results
        if _limit(result) is not None
    ]
    arranged = []
    for members in boards.values():
        first = members[0]
        board = Board(
            scenario=first["scenario"],
            order=first.get("order", "I"),
            tasks=first["tasks"],
            conditions=_conditions(first),
            chance=first.get("chance"),
            zero_shot=np.mean([member["zero_shot"] for member in members], axis=0).tolist(),
            zero_shot_calibration=_zero_shot_calibration(members),
        )
        board.groups, repeated = _groups(members)
        notes += [note for note in repeated if note not in notes]
        arranged.append(board)
    return arranged, notes


def _zero_shot_calibration(results: Sequence[dict[str, Any]]) -> np.ndarray:
    rows = [result["calibration_error_per_row"][0] for result in results if "calibration_error_per_row" in result]
    return np.array([np.mean(rows)] if rows else [])


def _label_spaces(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A result of several label spaces as one for each, the accuracies at the top being those of the first."""
    config, further = result["config"], result.get("label_spaces", {})
    evaluation = config.get("evaluation", {})
    stored = evaluation.get("label_space", "task")
    first = stored if isinstance(stored, str) else stored[0]
    elsewhere = {"novelty": None} if further else {}  # the same in every label space
    return [
        {
            **result,
            **(elsewhere if found else {}),
            **found,
            "config": {**config, "evaluation": {**evaluation, "label_space": space}},
        }
        for space, found in {first: {}, **further}.items()
    ]


def _conditions(result: dict[str, Any]) -> dict[str, Any]:
    config = result["config"]
    evaluation, data = config.get("evaluation", {}), config.get("data", {})
    families = result["scenario"] in ("mtil", "xtail", "cil")
    return {
        "model": config.get("model", "?"),
        "pretrained": config.get("pretrained"),
        "label_space": evaluation.get("label_space", "task"),
        "split": evaluation.get("split", "test"),
        "limit": _limit(result),
        "family": data.get("split", "zscl") if families else None,
        "shots": data.get("shots") if families else None,
        "dataset": data.get("dataset") if result["scenario"] == "cil" else None,
        "start": _start(result),
    }


def _start(result: dict[str, Any]) -> str | None:
    """What the run went on from, for headings; None for the pre-trained model."""
    started = result.get("started_from")
    if not isinstance(started, dict):
        return None
    return f"{started.get('source')} ({str(started.get('fingerprint'))[:8]})"


def _measured_only(result: dict[str, Any]) -> bool:
    return bool(result["config"].get("evaluation", {}).get("only"))


def _limit(result: dict[str, Any]) -> int | None:
    """Images that tasks were evaluated on at most; None where these were all."""
    evaluated = result.get("evaluated", {})
    whole = evaluated.get("images") == evaluated.get("available")
    return None if whole else evaluated["limit"]


def _board_key(result: dict[str, Any]) -> tuple[Any, ...]:
    tasks = tuple(result["tasks"])
    fingerprint = result.get("scenario_fingerprint")
    return (result["scenario"], result.get("order", "I"), tasks, fingerprint, *_conditions(result).values())


def _flat_settings(result: dict[str, Any]) -> dict[str, Any]:
    settings = {key: value for key, value in result["config"].get("method", {}).items() if key != "name"}
    limit = result["config"].get("limit_iterations")
    measured = {"measured only": True} if _measured_only(result) else {}
    return {**settings, **measured, **({} if limit is None else {"limit_iterations": limit})}


def _groups(results: list[dict[str, Any]]) -> tuple[list[Group], list[str]]:
    by_settings: dict[str, dict[int, dict[str, Any]]] = {}
    notes = []
    for result in results:
        key = json.dumps([result["method"], _flat_settings(result)], sort_keys=True)
        seeds = by_settings.setdefault(key, {})
        if result["seed"] in seeds:
            other = seeds[result["seed"]]["path"]
            notes.append(f"{other} and {result['path']} have the same method, settings and seed; the first is counted")
            continue
        seeds[result["seed"]] = result
    members = [[seeds[seed] for seed in sorted(seeds)] for seeds in by_settings.values()]
    groups = [Group(_label(group[0], [other[0] for other in members]), group) for group in members]
    return sorted(groups, key=lambda group: not group.continual), notes


def _label(result: dict[str, Any], others: list[dict[str, Any]]) -> str:
    """The method's name, and the settings in which it differs from other groups of the same method."""
    rivals = [_flat_settings(other) for other in others if other["method"] == result["method"]]
    mine = _flat_settings(result)
    differing = [key for key in mine if any(rival.get(key) != mine[key] for rival in rivals)]
    return result["method"] + (f" ({', '.join(f'{key}={mine[key]}' for key in differing)})" if differing else "")
