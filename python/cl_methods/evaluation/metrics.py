"""Summary numbers of an accuracy matrix, by the definitions of the MTIL benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def mtil_metrics(matrix: Any) -> dict[str, Any]:
    """Transfer, Average and Last of an accuracy matrix.

    With ``R[j, i]`` the accuracy on task i after learning task j (0-based, no zero-shot row)::

        transfer_i = mean_{j < i} R[j, i]   (i >= 1)      Transfer = mean_i transfer_i
        average_i  = mean_j R[j, i]                       Average  = mean_i average_i
        last_i     = R[T - 1, i]                          Last     = mean_i last_i

    Transfer leaves the first task out and is a mean over tasks, not over entries.

    Args:
        matrix: (T, T) nested sequence, array or tensor; percent or fractions, the results have the same unit.

    Returns:
        ``transfer``, ``average``, ``last`` (floats) and ``transfer_per_task`` (T - 1 floats, from the second task on),
        ``average_per_task``, ``last_per_task`` (T floats each). With a single task ``transfer`` is NaN.

    Raises:
        ValueError: ``matrix`` is not square, is empty or holds values that are not finite.

    Source: Zheng et al., "Preventing Zero-Shot Transfer Degradation in Continual Learning of Vision-Language Models"
    (ICCV 2023), section 5.
    """
    accuracy = _square(matrix)
    tasks = len(accuracy)
    transfer = np.array([accuracy[:task, task].mean() for task in range(1, tasks)])
    average, last = accuracy.mean(axis=0), accuracy[-1]
    return {
        "transfer": float(transfer.mean()) if tasks > 1 else float("nan"),
        "average": float(average.mean()),
        "last": float(last.mean()),
        "transfer_per_task": transfer.tolist(),
        "average_per_task": average.tolist(),
        "last_per_task": last.tolist(),
    }


def forgetting(matrix: Any) -> float:
    """Mean drop from the best accuracy since a task was learnt to the final one.

    ``1 / (T - 1) Σ_{i < T - 1} (max_{i <= j < T - 1} R[j, i] - R[T - 1, i])``. Negative if tasks went on improving.

    Args:
        matrix: as for :func:`mtil_metrics`.

    Returns:
        In the matrix' unit; 0 with a single task.

    Raises:
        ValueError: as :func:`mtil_metrics`.

    Source: Chaudhry et al., "Riemannian Walk for Incremental Learning" (ECCV 2018), restricted to models that have
    already learnt the task, since CLIP knows something of every task beforehand.
    """
    accuracy = _square(matrix)
    tasks = len(accuracy)
    if tasks == 1:
        return 0.0
    return float(np.mean([accuracy[task:-1, task].max() - accuracy[-1, task] for task in range(tasks - 1)]))


def class_incremental_metrics(matrix: Any, images: Sequence[int]) -> dict[str, Any]:
    """Average and Last of class-incremental learning: accuracies over the images of all classes learnt so far.

    With ``R[t, i]`` the accuracy on task i after task t among the classes of all tasks up to t, and n_i test images::

        a_t = Σ_{i <= t} n_i R[t, i] / Σ_{i <= t} n_i        Average = mean_t a_t        Last = a_{T - 1}

    The first task counts, base classes or not. This is not MTIL's Average, which has tasks that were not learnt yet in it and gives
    all tasks the same weight.

    Args:
        matrix: as for :func:`mtil_metrics`; what is above the diagonal is not looked at.
        images: T numbers of test images, one per task.

    Returns:
        ``average``, ``last`` (floats) and ``per_step`` (T floats), in the matrix' unit.

    Raises:
        ValueError: as :func:`mtil_metrics`, or ``images`` are not T positive numbers.

    Source: Rebuffi et al., "iCaRL: Incremental Classifier and Representation Learning" (CVPR 2017), section 4.1.
    """
    accuracy = _square(matrix)
    weights = np.asarray(images, dtype=np.float64)
    if weights.shape != (len(accuracy),) or not (weights > 0).all():
        raise ValueError(f"images: expected {len(accuracy)} numbers > 0, one per task, got {list(images)}")
    per_step = [float(np.average(row[: step + 1], weights=weights[: step + 1])) for step, row in enumerate(accuracy)]
    return {"average": float(np.mean(per_step)), "last": per_step[-1], "per_step": per_step}


def _square(matrix: Any) -> np.ndarray:
    rows: Sequence[Any] = matrix.tolist() if hasattr(matrix, "tolist") else matrix
    try:
        accuracy = np.asarray(rows, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"matrix: expected (T, T) numbers, got rows of different length or other types: {error}"
        ) from error
    if accuracy.ndim != 2 or accuracy.shape[0] != accuracy.shape[1] or accuracy.size == 0:
        raise ValueError(f"matrix: expected (T, T) with T >= 1, got {accuracy.shape}")
    if not np.isfinite(accuracy).all():
        row, column = np.argwhere(~np.isfinite(accuracy))[0]
        raise ValueError(f"matrix: expected finite values, got {accuracy[row, column]} in row {row}, column {column}")
    return accuracy
