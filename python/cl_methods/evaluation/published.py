"""Numbers that papers print."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from importlib.resources import files


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


def published(scenario: str, order: str) -> list[Published]:
    """Numbers of papers on a scenario and order; none for scenarios that no paper has used.

    Source: the packaged table ``published.csv``, which names for every row where it was printed.
    """
    if scenario != "mtil":
        return []
    rows: dict[tuple[str, str, str], dict[str, float]] = {}
    with files("cl_methods.evaluation").joinpath("published.csv").open() as file:
        for row in csv.DictReader(file):
            if row["order"] == order:
                key = (row["method"], row["split"], row["source"])
                rows.setdefault(key, {})[row["metric"]] = float(row["mean"])
    return [
        Published(*key, values.get("transfer"), values.get("average"), values.get("last"))
        for key, values in rows.items()
    ]
