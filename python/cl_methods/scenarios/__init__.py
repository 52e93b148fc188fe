"""Scenarios: sequences of tasks, by name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from cl_methods.scenarios.base import DataError, Scenario

SCENARIOS: dict[str, str] = {
    "mini": "the embedded offline world: seven small tasks, nothing to download",
    "folders": "your own images: every sub-folder of --data.root is a task in the ImageFolder layout",
}


@dataclass
class ScenarioOptions:
    """Where a scenario's data is and how it is split.

    Attributes:
        root: folder that holds the data (scenario `folders`).
        validation_fraction: share of the training images that becomes the validation split where a task brings none.
        test_fraction: share of the images that becomes the test split where a task brings none.
        split_seed: seed of those splits.
    """

    root: Path | None = None
    validation_fraction: float = 0.1
    test_fraction: float = 0.2
    split_seed: int = 0


def load(name: str, options: ScenarioOptions | None = None, *, order: str = "I") -> Scenario:
    """The scenario ``name`` with its tasks in the given order.

    Args:
        name: a key of :data:`SCENARIOS`.
        options: where the data is; defaults for scenarios that need none.
        order: ``"I"`` or ``"II"`` for ``mini``. For ``folders`` comma-separated task names, or ``"I"`` (sorted by name)
            and ``"II"`` (the reverse).

    Raises:
        DataError: unknown name or order, or data that is missing or damaged; the message says what to do.
    """
    options = options or ScenarioOptions()
    if name == "mini":
        from cl_methods.scenarios import mini

        if order not in ("I", "II"):
            raise DataError(f"order: scenario mini has the orders I and II, got {order!r}")
        return mini.load_scenario(order)
    if name == "folders":
        if options.root is None:
            raise DataError("data.root: scenario folders needs the folder that holds one sub-folder per task")
        from cl_methods.scenarios import folders

        chosen = None if order == "I" else [name.strip() for name in order.split(",")]
        if order == "II":
            chosen = folders.task_names(options.root)[::-1]
        scenario = folders.load_scenario(
            options.root,
            chosen,
            validation_fraction=options.validation_fraction,
            test_fraction=options.test_fraction,
            seed=options.split_seed,
        )
        return replace(scenario, order=order)
    raise DataError(f"scenario: expected one of {', '.join(SCENARIOS)}, got {name!r}")
