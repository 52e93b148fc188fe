"""Times with their spread, and whether the machine was quiet enough for them to mean something."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

WIDE_SPREAD = 0.15
"""Width from the 20th to the 80th percentile, relative to the median, beyond which a time is not to be trusted."""

DRIFT = 0.10
"""Change of a fixed piece of work from before to after, beyond which the machine changed in between."""

IDLE_LOAD = 0.5
"""Load average per core before anything was measured, beyond which something else was running."""


@dataclass(frozen=True)
class Spread:
    """Seconds of something repeated: median, 20th and 80th percentile, and how often it was done."""

    median: float
    p20: float
    p80: float
    repeats: int

    @staticmethod
    def of(seconds: Sequence[float]) -> Spread:
        """Of at least one measurement."""
        if len(seconds) == 1:
            return Spread(seconds[0], seconds[0], seconds[0], 1)
        fifths = statistics.quantiles(seconds, n=5, method="inclusive")
        return Spread(statistics.median(seconds), fifths[0], fifths[3], len(seconds))

    @property
    def relative(self) -> float:
        """Width from the 20th to the 80th percentile over the median."""
        return (self.p80 - self.p20) / self.median if self.median > 0 else 0.0


@dataclass(frozen=True)
class Trust:
    """Whether times measured between :meth:`Watch.start` and :meth:`Watch.stop` may be believed.

    Attributes:
        reasons: why not, in sentences; none if they may.
        load_average: over the last minute, when the measurement began; None where the system does not tell.
        cores: that this process may use.
        calibration_before, calibration_after: seconds of the same fixed work, before and after.
    """

    reasons: tuple[str, ...]
    load_average: float | None
    cores: int
    calibration_before: Spread
    calibration_after: Spread

    @property
    def trustworthy(self) -> bool:
        """Whether nothing speaks against the times."""
        return not self.reasons


class Watch:
    """Looks at the machine before and after a measurement.

    Args:
        device: where the measured work runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        self.before = self._calibrate()

    def _calibrate(self) -> Spread:
        x = torch.ones(384, 384, device=self.device)
        return interleaved({"work": lambda: torch.mm(x, x)}, 15, self.device)["work"]

    def stop(self, times: Mapping[str, Spread]) -> Trust:
        """The verdict.

        Args:
            times: the measured ones by name, whose spread counts too.
        """
        after = self._calibrate()
        return Trust(self._reasons(after, times), self.load, self.cores, self.before, after)

    def _reasons(self, after: Spread, times: Mapping[str, Spread]) -> tuple[str, ...]:
        reasons = []
        if self.load is not None and self.load > IDLE_LOAD * self.cores:
            reasons.append(f"the machine was busy: load average {self.load:.1f} on {self.cores} cores at the start")
        drift = after.median / self.before.median - 1
        if abs(drift) > DRIFT:
            change = "slower" if drift > 0 else "faster"
            reasons.append(
                f"the same product of matrices was {abs(drift):.0%} {change} after the measurement than before"
            )
        wide = {name: spread for name, spread in times.items() if spread.relative > WIDE_SPREAD}
        if wide:
            name = max(wide, key=lambda key: wide[key].relative)
            reasons.append(
                f"{len(wide)} of {len(times)} times vary by more than {WIDE_SPREAD:.0%}, most of all {name} "
                f"({wide[name].relative:.0%} from the 20th to the 80th percentile)"
            )
        return tuple(reasons)


def interleaved(
    functions: Mapping[str, Callable[[], object]], repeats: int, device: torch.device, warmup: int = 1
) -> dict[str, Spread]:
    """Seconds of each function, called in turn, so that a machine that slows down slows down all of them.

    Args:
        functions: by name.
        repeats: calls of each that count.
        device: waited for before and after each call.
        warmup: calls of each before those.

    Raises:
        ValueError: ``repeats`` < 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats: expected a number >= 1, got {repeats}")
    times: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(warmup + repeats):
        for name, function in functions.items():
            wait(device)
            start = time.perf_counter()
            function()
            wait(device)
            if number >= warmup:
                times[name].append(time.perf_counter() - start)
    return {name: Spread.of(seconds) for name, seconds in times.items()}


def wait(device: torch.device) -> None:
    """Until a GPU has finished what it was given; nothing on other devices."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
