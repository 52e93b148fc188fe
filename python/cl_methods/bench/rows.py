"""Rows of a suite: exact counts, samples of times and memory, and how a peer compares with ours."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

OURS = "ours"
EXACT = (
    "operations",
    "flops",
    "saved_bytes",
    "live_bytes",
    "synchronisations",
    "text_flops",
    "text_calls",
    "image_flops",
)
"""Costs that are counted: the same on every run."""
MEASURED = ("seconds", "peak_bytes")
"""Costs that are measured: of several samples the smallest counts."""


@dataclass(frozen=True)
class Samples:
    """Repeated measurements of one thing in one run.

    Attributes:
        best: the smallest, which other load on the machine disturbs least.
        median: of all.
        count: how many.
    """

    best: float
    median: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Samples:
        """From the measurements themselves, at least one."""
        return cls(min(values), statistics.median(values), len(values))

    @property
    def spread(self) -> float:
        """How far the median lies above the best, relative to the best: the noise of the run."""
        return self.median / self.best - 1 if self.best > 0 else 0.0


@dataclass
class Row:
    """One implementation of one case.

    Attributes:
        case: what is done.
        implementation: ``ours``, or the name of a peer.
        exact: counts by name.
        measured: samples by name.
        checked: largest relative errors against the peer, by what was compared; a row without a green check has no times.
        note: what to know when reading the row.
    """

    case: str
    implementation: str = OURS
    exact: dict[str, int] = field(default_factory=dict)
    measured: dict[str, Samples] = field(default_factory=dict)
    checked: dict[str, float] = field(default_factory=dict)
    note: str = ""

    def value(self, name: str) -> float | None:
        """A cost by name: the count, or the best sample; None if the row has none."""
        if name in self.exact:
            return self.exact[name]
        return self.measured[name].best if name in self.measured else None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {name: value for name, value in asdict(self).items() if value not in ({}, "")}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Row:
        """From JSON."""
        measured = {name: Samples(**sample) for name, sample in values.get("measured", {}).items()}
        rest = {name: values[name] for name in ("exact", "checked", "note") if name in values}
        return cls(values["case"], values["implementation"], measured=measured, **rest)


def over_ours(rows: Sequence[Row]) -> dict[tuple[str, str], dict[str, float]]:
    """Every peer's costs over those of ours in the same case: (case, peer) -> cost -> ratio; above 1 ours is cheaper."""
    ours = {row.case: row for row in rows if row.implementation == OURS}
    found: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        own = ours.get(row.case)
        if row.implementation == OURS or own is None:
            continue
        ratios = {}
        for name in (*EXACT, *MEASURED):
            theirs, mine = row.value(name), own.value(name)
            if theirs is not None and mine:
                ratios[name] = theirs / mine
        found[row.case, row.implementation] = ratios
    return found
