"""What evaluations have found so far, as ``rows.json`` holds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cl_methods.evaluation.accuracy import Measured


@dataclass
class Rows:
    """Accuracies and calibration errors so far, in percent.

    Attributes:
        zero_shot: (T,) before any training; None until measured.
        accuracy: rows after each task learnt so far.
        calibration_error: rows of expected calibration errors, the zero-shot one first.
        seconds: duration of each evaluation, the zero-shot one first.
        reliability: of each task in the latest evaluation; empty in files of runs that did not store it.
        further: the same for every label space after the first, without ``seconds``, which are those of all together.
    """

    zero_shot: list[float] | None = None
    accuracy: list[list[float]] = field(default_factory=list)
    calibration_error: list[list[float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    reliability: list[dict[str, Any]] = field(default_factory=list)
    further: dict[str, Rows] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Rows:
        """What ``dataclasses.asdict`` gave."""
        further = {space: cls.from_dict(rows) for space, rows in values.get("further", {}).items()}
        return cls(**{**values, "further": further})

    def add(self, measured: Sequence[Measured]) -> list[float]:
        """Append a row, the zero-shot one first; its accuracies."""
        row = [entry.accuracy for entry in measured]
        if self.zero_shot is None:
            self.zero_shot = row
        else:
            self.accuracy.append(row)
        self.calibration_error.append([entry.calibration_error for entry in measured])
        self.reliability = [entry.reliability for entry in measured]
        return row
