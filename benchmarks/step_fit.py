"""Constants of the time model from measured steps, and how far the model is off on steps that it has not seen."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np
from step_ranks import FLOATS

from cl_methods.forecast.hardware import Hardware
from cl_methods.forecast.time_model import Reached, seconds
from cl_methods.forecast.work import Work

Row = dict[str, Any]

NAMES = ("products", "memory", "call")
STEPS = 7
"""Values of each constant that are tried at a time, four times over, ever closer."""


def fit(rows: list[Row]) -> dict[str, Any]:
    """Two models, each fitted on one half of the measured rows and judged on the other, both ways.

    ``flat``: one share of the rate of the largest product and of the largest average. ``curves``: shares of the rates of products
    and averages of an operation's own size. Rows get the seconds that either model predicts without having seen them.
    """
    measured = sorted((row for row in rows if "seconds" in row and "calls" in row), key=lambda row: row["seconds"])
    halves = measured[::2], measured[1::2]
    models = {}
    for model, curves in (("flat", False), ("curves", True)):
        found: dict[str, Any] = {"reached": []}
        seen, unseen = [], []
        for train, test in (halves, halves[::-1]):
            reached = _fitted(train, curves)
            found["reached"].append({name: getattr(reached, name) for name in NAMES})
            seen += list(ratios(train, reached, curves))
            for row, ratio in zip(test, ratios(test, reached, curves), strict=True):
                row.setdefault("predicted", {})[model] = float(ratio * row["seconds"])
                unseen.append(ratio)
        models[model] = found | {"fitted": _summary(seen), "not_seen": _summary(unseen)}
    return {"models": models}


def _fitted(rows: list[Row], curves: bool) -> Reached:
    """The constants with the least mean square of logarithms."""
    operations = np.array([row["operations"] for row in rows])
    taken = np.log([row["seconds"] for row in rows])
    best = (np.inf, (0.0, 0.0, 0.0))
    centre, width = np.log([0.8, 0.6, 5e-6]), np.log([4.0, 8.0, 20.0])
    for _ in range(4):
        grids = [np.exp(np.linspace(m - w / 2, m + w / 2, STEPS)) for m, w in zip(centre, width, strict=True)]
        for products, memory in itertools.product(grids[0], grids[1]):
            reached = Reached(products=products, memory=memory, call=0.0, links=1.0, exchange=0.0)
            found = [predicted(row, reached, curves) for row in rows]
            for call in grids[2]:
                off = np.log(np.array(found) + call * operations) - taken
                best = min(best, (float(np.square(off).mean()), (products, memory, call)))
        centre, width = np.log(best[1]), width / 2.5
    return Reached(**dict(zip(NAMES, map(float, best[1]), strict=True)), links=1.0, exchange=0.0)


def predicted(row: Row, reached: Reached, curves: bool) -> float:
    """Seconds of a row on one thread of the machine as fast as it was when the step was measured."""
    work = Work(
        Counter({(flops, moved): times for flops, moved, times in row["calls"]}),
        Counter(dict(row["summed"])),
        Counter(dict(row["gathered"])),
    )
    return seconds(work, hardware(row, curves), row["ranks"], reached=reached, asynchronous=False).total


def hardware(row: Row, curves: bool) -> Hardware:
    """What the yardsticks say."""
    products = {2 * int(side) ** 3: 2 * int(side) ** 3 / taken for side, taken in row["products"].items()}
    averages = {12 * int(length): 12 * int(length) / taken for length, taken in row["averages"].items()}
    peak, bandwidth = products[max(products)], averages[max(averages)]
    options: dict[str, Any] = {}
    if curves:
        options = {
            "product_shares": {size: rate / peak for size, rate in products.items()},
            "traffic_shares": {size: rate / bandwidth for size, rate in averages.items()},
        }
    processes = row["ranks"]
    link = 2 * (processes - 1) / processes * 4 * FLOATS / row["sum"] if processes > 1 else 1e9
    return Hardware("CPU", {"fp32": peak / 1e12}, 8, bandwidth / 1e9, link / 1e9, **options)


def ratios(rows: list[Row], reached: Reached, curves: bool) -> np.ndarray:
    """Predicted over measured seconds of each row."""
    return np.array([predicted(row, reached, curves) / row["seconds"] for row in rows])


def _summary(found: list[float]) -> dict[str, float]:
    off = np.abs(np.array(found) - 1)
    return {"steps": len(off), "median": float(np.median(off)), "largest": float(off.max())}
