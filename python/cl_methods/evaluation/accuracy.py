"""Accuracy and calibration of a method on its tasks, in several label spaces from one pass over the images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from cl_methods import ranks
from cl_methods.components.image_batch import ImageBatch
from cl_methods.datasets.loading import ImageReader
from cl_methods.datasets.task import Task
from cl_methods.evaluation.features import EvaluationImages, FeatureStore, RowReader
from cl_methods.evaluation.novelty import NoveltyTally
from cl_methods.evaluation.options import EvaluationOptions, LabelSpace, competing_tasks, evaluated_images, guessing
from cl_methods.evaluation.tally import Measured, Tally
from cl_methods.methods.base import Method

__all__ = [
    "EvaluationOptions",
    "LabelSpace",
    "Measured",
    "competing_tasks",
    "feature_store",
    "guessing",
    "measure",
    "measure_row",
    "measure_spaces",
    "row_reader",
]


def measure(
    method: Method, task: Task, candidates: Sequence[Task], options: EvaluationOptions, workers: int = 0
) -> Measured:
    """Classify every image of a task among the classes of the candidates.

    Classes of the same name in several tasks count as one class, whose probability is the sum of theirs.

    Args:
        method: after ``before_evaluation``.
        task: whose images are classified.
        candidates: tasks whose classes compete, ``task`` among them.
        options: split, limit and batch size.
        workers: data-loading processes.

    Raises:
        ValueError: the split is empty, or the scores have the wrong shape or are NaN.
    """
    with closing(row_reader(method, [task], options, workers)) as reader:
        store = feature_store([task], options)
        return _measure(method, task, [candidates], options, store, reader, 0, _dealt(reader)[0])[0]


def measure_row(
    method: Method,
    tasks: Sequence[Task],
    learnt: int,
    options: EvaluationOptions,
    workers: int = 0,
    on_task: Callable[[int, float], None] | None = None,
) -> list[Measured]:
    """:func:`measure_spaces`, of which only the first label space is returned."""
    return measure_spaces(method, tasks, learnt, options, workers, on_task)[options.label_spaces[0]]


def measure_spaces(
    method: Method,
    tasks: Sequence[Task],
    learnt: int,
    options: EvaluationOptions,
    workers: int = 0,
    on_task: Callable[[int, float], None] | None = None,
    store: FeatureStore | None = None,
    reader: RowReader | None = None,
    novelty: NoveltyTally | None = None,
) -> dict[LabelSpace, list[Measured]]:
    """Every task with the method as it is: one row of the matrix of each label space, from one pass over the images.

    Where several processes compute together, every one scores whole batches of its own, each image once, and all get the totals.

    Args:
        method: the method after ``learnt`` tasks.
        tasks: the whole sequence.
        learnt: number of tasks learnt; 0 for the zero-shot row.
        options, workers: see :func:`measure`.
        on_task: called with the task's position and its accuracy in the first label space.
        store: of :func:`feature_store` with the same tasks and options; where the method's frozen features stay from row to row.
        reader: of :func:`row_reader` with the same tasks and options, whose processes stay from row to row; ``workers`` is then
            without effect.
        novelty: takes in the uncertainties of all images, from the same pass.

    Raises:
        ValueError: see :func:`measure`.
    """
    if reader is None:
        with closing(row_reader(method, tasks, options, workers)) as own:
            return measure_spaces(
                method, tasks, learnt, options, on_task=on_task, store=store, reader=own, novelty=novelty
            )
    method.expect(tasks)
    method.before_evaluation()
    store = store or feature_store(tasks, options)
    rows: dict[LabelSpace, list[Measured]] = {space: [] for space in options.label_spaces}
    for index, (task, dealt) in enumerate(zip(tasks, _dealt(reader), strict=True)):
        spaces = [competing_tasks(tasks, index, learnt, space) for space in rows]
        found = _measure(method, task, spaces, options, store, reader, index, dealt, novelty)
        for row, measured in zip(rows.values(), found, strict=True):
            row.append(measured)
        if on_task is not None:
            on_task(index, rows[options.label_spaces[0]][-1].accuracy)
    return rows


def row_reader(method: Method, tasks: Sequence[Task], options: EvaluationOptions, workers: int = 0) -> RowReader:
    """A reader of the evaluated images of ``tasks``, for any number of rows; to be closed after them."""
    sources, backbone = [evaluated_images(task, options) for task in tasks], method.backbone
    with ranks.alone():
        return RowReader(
            ImageReader(
                sources,
                backbone.eval_transform,
                batch_size=options.images_together,
                device=backbone.device,
                workers=workers,
            )
        )


@dataclass(frozen=True)
class _Dealt:
    """How the batches of one task are dealt to the processes.

    Attributes:
        batches: of the task.
        start: batches that were dealt before.
        own: numbers of those of this process.
    """

    batches: int
    start: int
    own: list[int]


def _dealt(reader: RowReader) -> list[_Dealt]:
    """Deal the batches of all sources, and begin a row with those of this process."""
    found: list[_Dealt] = []
    for source in reader.sources:
        batches = -(-len(source) // reader.batch_size)
        start = found[-1].start + found[-1].batches if found else 0
        found.append(_Dealt(batches, start, ranks.dealt(batches, start)))
    reader.begin([(number, batch) for number, dealt in enumerate(found) for batch in dealt.own])
    return found


def feature_store(
    tasks: Sequence[Task], options: EvaluationOptions, note: Callable[[str], None] | None = None
) -> FeatureStore:
    """An empty store for the evaluated images of ``tasks``; ``note`` is told what does not fit into it."""
    images = sum(len(evaluated_images(task, options)) for task in tasks)
    return FeatureStore(images, options.feature_memory, note)


@torch.no_grad()
def _measure(
    method: Method,
    task: Task,
    spaces: Sequence[Sequence[Task]],
    options: EvaluationOptions,
    store: FeatureStore,
    reader: RowReader,
    number: int,
    dealt: _Dealt,
    novelty: NoveltyTally | None = None,
) -> list[Measured]:
    """:func:`measure` in several label spaces; the task's images are the reader's source ``number``."""
    if not dealt.batches:
        raise ValueError(f"evaluation.split: task {task.name} has no {options.split} images")
    scored = spaces if novelty is None else [*spaces, novelty.scored]
    device, asked = method.backbone.device, list({id(one): one for space in scored for one in space}.values())
    tallies = [Tally.of(task, candidates, device) for candidates in spaces]
    images = EvaluationImages(reader, number, name=task.name, device=device, store=store, dealt=dealt.own)
    with ranks.alone(), store.parts.within(method.backbone):
        for batch, labels in images:
            found = store.parts.work(method.backbone, len(batch), partial(_scores, method, batch, asked))
            scores = dict(zip(map(id, asked), found, strict=True))
            for tally, candidates in zip(tallies, spaces, strict=True):
                tally.add(torch.cat([scores[id(candidate)] for candidate in candidates], dim=1), labels)
            if novelty is not None:
                novelty.look(method, number, batch, scores)
    for tally in tallies:
        tally.collect(dealt.batches, dealt.start)
    if novelty is not None:
        novelty.collect(number, dealt.batches, dealt.start)
    if any(bool(tally.invalid) for tally in tallies):
        raise ValueError(f"logits of {method.name} on {task.name}: some are NaN; the weights have diverged")
    return [tally.measured() for tally in tallies]


def _scores(method: Method, images: ImageBatch, tasks: Sequence[Task]) -> list[Tensor]:
    found = method.scores(images, tasks)
    for scores, task in zip(found, tasks, strict=True):
        expected = (len(images), len(task.class_names))
        if scores.shape != expected:
            raise ValueError(f"logits of {method.name} on {task.name}: expected {expected}, got {tuple(scores.shape)}")
    return found
