"""Whether a method notices images of tasks that it has not learnt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from cl_methods import ranks
from cl_methods.components.image_batch import ImageBatch
from cl_methods.components.uncertainty import Uncertainty, uncertainty
from cl_methods.datasets.loading import evaluation_batches
from cl_methods.datasets.task import Task
from cl_methods.evaluation.options import EvaluationOptions
from cl_methods.evaluation.uncertainty import separation
from cl_methods.methods.base import Method

Scores = Callable[[Tensor, Task], Tensor]
"""Images (B, 3, R, R) and a task -> (B, C) scores of its classes, or (F, B, C) draws of them."""

Measures = dict[str, float]
"""``{"auroc", "aupr", "fpr95"}``, fractions; see :func:`~cl_methods.evaluation.uncertainty.separation`."""


class NoveltyTally:
    """Uncertainties of evaluated images among the classes learnt so far, collected task by task.

    Images of the first ``split`` tasks are known and those of the others novel, for every split.

    Args:
        kinds: which uncertainties.
        tasks: the whole sequence.
        splits: numbers of known tasks, ascending, each from 1 to one less than the tasks.
        draws: ask the method for draws of its scores.

    Attributes:
        candidates: tasks whose classes compete.
    """

    def __init__(
        self, kinds: Sequence[Uncertainty], tasks: Sequence[Task], splits: Sequence[int], *, draws: bool = False
    ) -> None:
        self.candidates, self.draws = tuple(tasks[: max(splits)]), draws
        self._values: dict[tuple[Uncertainty, int], list[list[Tensor]]] = {
            (kind, split): [[] for _ in tasks] for kind in kinds for split in splits
        }

    @property
    def scored(self) -> Sequence[Task]:
        """Tasks whose scores :meth:`look` needs."""
        return () if self.draws else self.candidates

    def look(self, method: Method, place: int, images: ImageBatch, scores: Mapping[int, Tensor]) -> None:
        """:meth:`add` a batch of images, given the ``scores`` (B, C_t) of :attr:`scored` by the ids of these tasks."""
        found = method.draws(images, self.candidates) if self.draws else [scores[id(task)] for task in self.scored]
        self.add(place, found)

    def add(self, place: int, scores: Sequence[Tensor]) -> None:
        """Take in a batch of images of task number ``place`` with scores (B, C_t) or draws (F, B, C_t) for each candidate."""
        for (kind, split), values in self._values.items():
            values[place].append(uncertainty(torch.cat(list(scores[:split]), dim=-1), kind))

    def collect(self, place: int, batches: int, start: int) -> None:
        """Take in what the other processes found in their ``batches`` of a task; see :func:`cl_methods.ranks.gather_batches`."""
        if ranks.count() > 1:
            for values in self._values.values():
                values[place] = ranks.gather_batches([one.cpu() for one in values[place]], batches, start)

    def found(self) -> dict[str, list[Measures]]:
        """For each uncertainty the measures of every split."""
        measures: dict[str, list[Measures]] = {}
        for (kind, split), values in self._values.items():
            known, novel = (
                torch.cat([one for task in part for one in task]) for part in (values[:split], values[split:])
            )
            measures.setdefault(kind, []).append(separation(-known, -novel))
        return measures


def check_novelty(method: Method, options: EvaluationOptions, tasks: int) -> None:
    """Check, before a run begins, that the uncertainties of ``options`` can be measured.

    Raises:
        ValueError: there is one task only, so nothing is ever novel; or the variance over draws of a method without draws.
    """
    if options.novelty and tasks < 2:
        raise ValueError(f"evaluation.novelty: expected at least two tasks, so that one is novel, got {tasks}")
    if "variance" in options.novelty and not method.draws_scores:
        raise ValueError(
            f"evaluation.novelty: variance is that over draws of the scores, and {method.name} has one score for each class; "
            "expected a method with draws, such as clap4clip, or another uncertainty"
        )


def novelty_tally(
    method: Method, tasks: Sequence[Task], learnt: int, options: EvaluationOptions
) -> NoveltyTally | None:
    """What collects the uncertainties of one row; None where none is asked for, or nothing is novel.

    Before any task has been learnt, every split of the sequence is measured with the model as it is: what later rows are
    compared with. There are no draws then, so no ``variance``.
    """
    splits = [learnt] if learnt else list(range(1, len(tasks)))
    kinds = [kind for kind in options.novelty if learnt or kind != "variance"]
    if not kinds or not 0 < max(splits, default=0) < len(tasks):
        return None
    return NoveltyTally(kinds, tasks, splits, draws=learnt > 0 and method.draws_scores)


@torch.no_grad()
def novelty_of_later_tasks(
    method: Method,
    tasks: Sequence[Task],
    learnt: int,
    kind: Uncertainty = "energy",
    *,
    scores: Scores | None = None,
    batch_size: int = 128,
) -> Measures:
    """Test images of the learnt tasks are known, those of later tasks are novel; all are scored among the learnt classes.

    ``clk run --evaluation.novelty energy`` measures the same after every task, in the pass that gives the accuracies.

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
    tally = NoveltyTally([kind], tasks, [learnt])
    for place, task in enumerate(tasks):
        for images, _ in evaluation_batches(
            task.test, method.backbone.eval_transform, batch_size=batch_size, device=method.backbone.device
        ):
            if scores is None:
                tally.add(place, method.scores(images, tally.candidates))
            else:
                tally.add(place, [scores(images, candidate) for candidate in tally.candidates])
    return tally.found()[kind][0]
