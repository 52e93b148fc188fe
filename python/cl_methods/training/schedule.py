"""Learning-rate schedule of the published CLIP continual-learning runs."""

from __future__ import annotations

import math


def warmup_cosine(lr: float, step: int, iterations: int, warmup: int) -> float:
    """Linear warm-up, then half a cosine down to zero.

    ``lr (t + 1) / w`` for ``t < w``, else ``lr / 2 (1 + cos(π (t - w) / (T - w)))``, for ``t = 0 … T``: a task has
    ``T + 1`` optimiser steps and the last one has learning rate zero.

    Args:
        lr: peak learning rate.
        step: 0-based optimiser step ``t``.
        iterations: ``T``, the step at which the cosine reaches zero.
        warmup: ``w``, number of warm-up steps; 0 for none. With ``warmup > iterations`` the task ends inside the
            warm-up; with ``warmup == iterations`` the last step has learning rate zero.

    Raises:
        ValueError: ``step`` is not in ``0 … iterations``, or ``warmup`` is negative.

    Source: the schedule of the ZSCL and MoE-Adapters code, which iterates ``range(T + 1)``.
    """
    if not 0 <= step <= iterations:
        raise ValueError(f"step: expected 0 to iterations = {iterations}, got {step}")
    if warmup < 0:
        raise ValueError(f"warmup: expected a number of steps >= 0, got {warmup}")
    if step < warmup:
        return lr * (step + 1) / warmup
    if iterations == warmup:
        return 0.0
    return 0.5 * lr * (1.0 + math.cos(math.pi * (step - warmup) / (iterations - warmup)))
