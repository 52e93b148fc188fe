"""Whether a method notices images of tasks that it has not learnt."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cl_methods.components.uncertainty import Uncertainty
from cl_methods.datasets.loading import evaluation_batches
from cl_methods.datasets.task import Task
from cl_methods.evaluation.uncertainty import novelty_detection
from cl_methods.methods.base import Method

Scores = Callable[[Tensor, Task], Tensor]
"""Images (B, 3, R, R) and a task -> (B, C) scores of its classes, or (F, B, C) draws of them."""


@torch.no_grad()
def novelty_of_later_tasks(
    method: Method,
    tasks: Sequence[Task],
    learnt: int,
    kind: Uncertainty = "energy",
    *,
    scores: Scores | None = None,
    batch_size: int = 128,
) -> dict[str, float]:
    """Test images of the learnt tasks are known, those of later tasks are novel; all are scored among the learnt classes.

    Args:
        method: after ``learnt`` tasks.
        tasks: the whole sequence.
        learnt: how many of them have been learnt.
        kind: which uncertainty decides.
        scores: how images are scored; :meth:`Method.scores` if None. A method with draws gives them for ``variance``:
            ``lambda images, task: method.sampled_logits(images, task, 20)``.
        batch_size: images per batch.

    Returns:
        ``{"auroc", "aupr", "fpr95"}``, fractions; see :func:`~cl_methods.evaluation.uncertainty.separation`.

    Raises:
        ValueError: nothing has been learnt, or nothing is left.

    Source: post-hoc novel data detection of CLAP4CLIP (Jha et al., NeurIPS 2024).
    """
    if not 1 <= learnt < len(tasks):
        raise ValueError(f"learnt: expected 1 to {len(tasks) - 1} of {len(tasks)} tasks, got {learnt}")
    method.before_evaluation()
    found: list[list[Tensor]] = [[], []]
    for place, task in enumerate(tasks):
        for images, _ in evaluation_batches(
            task.test, method.backbone.eval_transform, batch_size=batch_size, device=method.backbone.device
        ):
            parts = (
                method.scores(images, tasks[:learnt])
                if scores is None
                else [scores(images, candidate) for candidate in tasks[:learnt]]
            )
            found[place >= learnt].append(torch.cat(parts, dim=-1))
    known, novel = (torch.cat(batches, dim=-2) for batches in found)
    return novelty_detection(known, novel, kind)
