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

MODELS = {"flat": ("products", "memory", "call"), "sizes": ("products", "memory", "start")}
"""Constants of each model. ``flat``: one share of the peaks for operations of every size, and a time for every call. ``sizes``:
small products reach less of the peak; memory is as fast as averages of an operation's own size, whose smallest are the time of a
call.
"""

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
            reached = _fitted(train, model)
            constants.append({name: getattr(reached, name) for name in names})
            seen += [predicted(row, reached, model) / row["seconds"] for row in train]
            for row in test:
                row.setdefault("predicted", {})[model] = predicted(row, reached, model)
                unseen.append(row["predicted"][model] / row["seconds"])
        models[model] = {"reached": constants, "fitted": _summary(seen), "not_seen": _summary(unseen)}
    return {"models": models}


def _fitted(rows: list[Row], model: str) -> Reached:
    """The constants with the least squares of logarithms of predicted over measured seconds."""
    names = MODELS[model]

    def off(logarithms: np.ndarray) -> list[float]:
        reached = _reached(names, np.exp(logarithms))
        return [float(np.log(predicted(row, reached, model) / row["seconds"])) for row in rows]

    return _reached(names, np.exp(least_squares(off, np.log([BEGIN[name] for name in names])).x))


def _reached(names: tuple[str, ...], values: np.ndarray) -> Reached:
    constants = dict(zip(names, map(float, values), strict=True))
    constants = {"call": 0.0} | constants
    return Reached(links=1.0, exchange=0.0, **constants)  # the yardstick of exchange has both in it


def predicted(row: Row, reached: Reached, model: str) -> float:
    """Processor seconds of a row on one thread of the machine as fast as it was when the step was measured."""
    work = Work(
        Counter({(flops, moved): times for flops, moved, times in row["calls"]}),
        Counter(dict(row["summed"])),
        Counter(dict(row["gathered"])),
    )
    return seconds(work, hardware(row, model), row["ranks"], reached=reached, asynchronous=False).total


def hardware(row: Row, model: str) -> Hardware:
    """What the yardsticks say: the best product, averages, a sum over the processes."""
    peak = max(2 * int(side) ** 3 / taken for side, taken in row["products"].items())
    traffic = {12 * int(length): 12 * int(length) / taken for length, taken in row["averages"].items()}
    bandwidth = traffic[max(traffic)]
    shares = {size: rate / bandwidth for size, rate in traffic.items()} if model == "sizes" else {}
    processes = row["ranks"]
    link = 2 * (processes - 1) / processes * 4 * FLOATS / row["sum"] if processes > 1 else 1.0
    return Hardware("CPU", {"fp32": peak / 1e12}, 8, bandwidth / 1e9, link / 1e9, traffic_shares=shares)


def _summary(found: list[float]) -> dict[str, float]:
    off = np.abs(np.array(found) - 1)
    return {"steps": len(off), "median": float(np.median(off)), "largest": float(off.max())}
