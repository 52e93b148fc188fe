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
        novelty: of each evaluation, the first one before any task: for each uncertainty, the measures of
            :class:`~cl_methods.evaluation.novelty.NoveltyTally`; empty where none was asked for.
        further: the same for every label space after the first, without ``seconds``, which are those of all together.
    """

    zero_shot: list[float] | None = None
    accuracy: list[list[float]] = field(default_factory=list)
    calibration_error: list[list[float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    reliability: list[dict[str, Any]] = field(default_factory=list)
    novelty: list[dict[str, list[dict[str, float]]]] = field(default_factory=list)
    further: dict[str, Rows] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Rows:
        """What ``dataclasses.asdict`` gave."""
        further = {space: cls.from_dict(rows) for space, rows in values.get("further", {}).items()}
        return cls(**{**values, "further": further})

    @classmethod
    def checked(cls, values: Any, tasks: int) -> Rows:
        """The same, of a file that may be damaged.

        Args:
            values: what the file holds; None if there is none.
            tasks: of the run.

        Raises:
            ValueError: it is not what evaluations of so many tasks write.
        """
        try:
            rows = cls() if values is None else cls.from_dict(values)
            measured = [] if rows.zero_shot is None else [rows.zero_shot]
            for found in (rows, *rows.further.values()):
                numbers = [float(value) for row in (*measured, *found.accuracy) for value in row]
                if len(numbers) != tasks * (len(measured) + len(found.accuracy)):
                    raise ValueError(f"rows of other lengths than the {tasks} tasks")
                if len(found.novelty) not in (0, len(measured) + len(found.accuracy)):
                    raise ValueError(f"{len(found.novelty)} rows of novelty")
                if not len(found.accuracy) <= len(rows.accuracy) <= tasks:
                    raise ValueError(f"{len(rows.accuracy)} rows after {tasks} tasks")
        except (TypeError, AttributeError, KeyError) as error:
            raise ValueError(f"it does not hold rows of accuracies: {error}") from error
        return rows

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
