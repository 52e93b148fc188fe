"""Numbers that papers print."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from importlib.resources import files
from typing import Any


@dataclass(frozen=True)
class Published:
    """Numbers from a paper.

    Attributes:
        method, split, source: as named there; ``split`` is the family of data splits.
        transfer, average, last: printed means in percent; None where a paper gives none.
    """

    method: str
    split: str
    source: str
    transfer: float | None
    average: float | None
    last: float | None


PROTOCOLS: dict[str, dict[str, Any]] = {
    "mtil": {"label_space": "task", "shots": None},
    "xtail": {"label_space": "all", "shots": 16},
}
"""By scenario: the label space, and the training images per class (None: all), of the numbers in the table."""


def published(scenario: str, order: str) -> list[Published]:
    """Numbers of papers on a scenario and order, under the conditions of :data:`PROTOCOLS`; none for other scenarios.

    Source: the packaged table ``published.csv``, which names for every row where it was printed.
    """
    rows: dict[tuple[str, str, str], dict[str, float]] = {}
    with files("cl_methods.evaluation").joinpath("published.csv").open() as file:
        for row in csv.DictReader(file):
            if (row["scenario"], row["order"]) == (scenario, order):
                key = (row["method"], row["split"], row["source"])
                rows.setdefault(key, {})[row["metric"]] = float(row["mean"])
    return [
        Published(*key, values.get("transfer"), values.get("average"), values.get("last"))
        for key, values in rows.items()
    ]
