"""Constants of the time model from measured steps, and how far the model is off on steps that it has not seen."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from scipy.optimize import least_squares
from step_ranks import FLOATS

from cl_methods.forecast.hardware import Hardware
from cl_methods.forecast.time_model import Reached, seconds
from cl_methods.forecast.work import Work

Row = dict[str, Any]

MODELS = {"flat": ("products", "memory", "call"), "start": ("products", "memory", "call", "start")}
"""Constants of each model: one share of the peak for products of every size, or less for small ones."""

BEGIN = {"products": 0.8, "memory": 0.4, "call": 1e-5, "start": 5e-5}


def fit(rows: list[Row]) -> dict[str, Any]:
    """Two models, each fitted on one half of the measured rows and judged on the other, both ways.

    Rows get the seconds that either model predicts without having seen them.
    """
    measured = sorted((row for row in rows if "seconds" in row and "calls" in row), key=lambda row: row["seconds"])
    halves = measured[::2], measured[1::2]
    models = {}
    for model, names in MODELS.items():
        constants, seen, unseen = [], [], []
        for train, test in (halves, halves[::-1]):
            reached = _fitted(train, names)
            constants.append({name: getattr(reached, name) for name in names})
            seen += [predicted(row, reached) / row["seconds"] for row in train]
            for row in test:
                row.setdefault("predicted", {})[model] = predicted(row, reached)
                unseen.append(row["predicted"][model] / row["seconds"])
        models[model] = {"reached": constants, "fitted": _summary(seen), "not_seen": _summary(unseen)}
    return {"models": models}


def _fitted(rows: list[Row], names: tuple[str, ...]) -> Reached:
    """The constants with the least squares of logarithms of predicted over measured seconds."""

    def off(logarithms: np.ndarray) -> list[float]:
        reached = _reached(names, np.exp(logarithms))
        return [float(np.log(predicted(row, reached) / row["seconds"])) for row in rows]

    return _reached(names, np.exp(least_squares(off, np.log([BEGIN[name] for name in names])).x))


def _reached(names: tuple[str, ...], values: np.ndarray) -> Reached:
    constants = dict(zip(names, map(float, values), strict=True))
    return Reached(links=1.0, exchange=0.0, **constants)  # the yardstick of exchange has both in it


def predicted(row: Row, reached: Reached) -> float:
    """Processor seconds of a row on one thread of the machine as fast as it was when the step was measured."""
    work = Work(
        Counter({(flops, moved): times for flops, moved, times in row["calls"]}),
        Counter(dict(row["summed"])),
        Counter(dict(row["gathered"])),
    )
    return seconds(work, hardware(row), row["ranks"], reached=reached, asynchronous=False).total


def hardware(row: Row) -> Hardware:
    """What the yardsticks say: the best product, the largest average, a sum over the processes."""
    peak = max(2 * int(side) ** 3 / taken for side, taken in row["products"].items())
    length, taken = max((int(length), taken) for length, taken in row["averages"].items())
    processes = row["ranks"]
    link = 2 * (processes - 1) / processes * 4 * FLOATS / row["sum"] if processes > 1 else 1.0
    return Hardware("CPU", {"fp32": peak / 1e12}, 8, 12e-9 * length / taken, link / 1e9)


def _summary(found: list[float]) -> dict[str, float]:
    off = np.abs(np.array(found) - 1)
    return {"steps": len(off), "median": float(np.median(off)), "largest": float(off.max())}
