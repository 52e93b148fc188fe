"""Whether a measurement of a run's checkpoints is one of that run, on the data it had, and fair to what it has learnt from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cl_methods.methods import Method
from cl_methods.scenarios.base import Scenario
from cl_methods.scenarios.mtil import chosen_datasets
from cl_methods.training.building import select_scenario
from cl_methods.training.checkpoints import DamagedError, RunDirectory
from cl_methods.training.config import RunConfig, deciding
from cl_methods.training.export.learnt import ExportError
from cl_methods.training.rows import Rows

_OF_THE_RUN = ("method", "seed", "model", "limit_iterations", "precision")
_SPLITTING = ("data.split", "data.split_seed", "data.test_fraction", "data.validation_fraction")


def check_settings(run: Path, description: dict[str, Any], config: RunConfig) -> None:
    """Refuse settings under which the checkpoints would not be the run's, or would be tested on what they have learnt from.

    Args:
        run: directory of the run, for messages.
        description: its ``run.json``.
        config: of the measurement.

    Raises:
        ValueError: a setting is the run's own and another was given, or the split is another one of the same datasets.
    """
    before, now = description["config"], config.as_dict()
    for name in _OF_THE_RUN:
        old, new = before.get(name, now[name]), now[name]
        if name == "method":
            old, new = old["name"], new["name"]
        if old != new:
            raise ValueError(
                f"{name}: the run in {run} has {old}, got {new}; only data, evaluation and what scores read can be others"
            )
    old, new = deciding(before), deciding(now)
    moved = [f"{name} was {old.get(name)}, now {new[name]}" for name in _SPLITTING if old.get(name) != new[name]]
    shared = _learnt_from(before, description["tasks"]) & _measured_on(now)
    if moved and shared:
        raise ValueError(
            f"{'; '.join(moved)}: one split tests on training images of another, and the run in {run} has learnt from "
            f"{', '.join(sorted(shared))}; expected the run's own split, or other datasets"
        )


def is_own_data(run: Path, description: dict[str, Any], config: RunConfig, scenario: Scenario) -> bool:
    """Whether ``scenario`` has the tasks that the run learns, or the first of them.

    Raises:
        ValueError: it has, and their images are not what they were.
    """
    before, now = deciding(description["config"]), deciding(config.as_dict())
    data = [name for name in now if name in ("scenario", "order") or name.startswith("data.")]
    if any(before.get(name) != now[name] for name in data):
        return False
    limit = description["config"]["limit_tasks"]
    whole = scenario if config.limit_tasks == limit else select_scenario(replace(config, limit_tasks=limit))
    earlier, found = description["scenario_fingerprint"], whole.fingerprint()
    if (
        earlier != found
        and config.scenario == "folders"
        and not _measured_on(config.as_dict()) & _measured_on(description["config"])
    ):
        return False
    if earlier != found:
        raise ValueError(
            f"data: that of scenario {scenario.name} has changed since the run in {run} began (fingerprint {earlier[:12]}, "
            f"now {found[:12]}), so its test images may be others, or images that the run has learnt from; restore it"
        )
    return len(scenario.tasks) <= len(whole.tasks)


def check_weights(run: Path, description: dict[str, Any], method: Method) -> None:
    """The row before learning is of the weights that the run began with.

    Raises:
        ExportError: ``method`` stands on others.
    """
    known, origin = description.get("weights") or {}, method.backbone.origin
    if known.get("fingerprint") and origin is not None and origin.fingerprint != known["fingerprint"]:
        raise ExportError(
            f"pretrained: the run in {run} began with weights of fingerprint {known['fingerprint'][:12]} ({known['source']}), "
            f"{origin.source} has {origin.fingerprint[:12]}"
        )


def own_rows(run: Path, description: dict[str, Any], space: str) -> dict[int, list[float]]:
    """Accuracies that the run itself measured in a label space, by the number of tasks learnt; empty where it did not."""
    stored = description["config"]["evaluation"]["label_space"]
    spaces = [stored] if isinstance(stored, str) else list(stored)
    if space not in spaces:
        return {}
    try:
        rows = Rows.checked(RunDirectory(run).read_json("rows.json"), len(description["tasks"]))
    except (DamagedError, ValueError):
        return {}  # nothing to compare with; what is measured now does not depend on it
    found = rows if space == spaces[0] else rows.further.get(space, Rows())
    return {} if found.zero_shot is None else dict(enumerate([found.zero_shot, *found.accuracy]))


def _learnt_from(config: dict[str, Any], tasks: Sequence[str]) -> set[str]:
    own = _measured_on(config)
    return own & set(tasks) if config["scenario"] in ("mtil", "xtail") else own


def _measured_on(config: dict[str, Any]) -> set[str]:
    """What the images of a configuration come from: datasets, or a folder; nothing where there is one split."""
    scenario, data, order = config["scenario"], config["data"], config["order"]
    if scenario == "cil":
        return {str(data["dataset"])}
    if scenario == "folders":
        return {str(Path(str(data["root"])).resolve())}
    if scenario == "xtail":
        return set(chosen_datasets("X-TAIL" if order == "I" else order))
    return set(chosen_datasets(order)) if scenario == "mtil" else set()
