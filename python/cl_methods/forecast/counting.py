"""The work of a whole run on one of several processes, counted on tensors that have shapes and no data."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from cl_kernels.profile.static import comparable_attention
from cl_methods import ranks
from cl_methods.backbone import Backbone
from cl_methods.backbone.micro_batches import MicroBatches
from cl_methods.datasets.task import Reference, Task
from cl_methods.evaluation.options import evaluated_images
from cl_methods.forecast.steps import reference_size
from cl_methods.forecast.tasks import PROBED, TaskWork, count_task
from cl_methods.forecast.work import Work, WorkCount
from cl_methods.methods.base import Method
from cl_methods.methods.find import find_method
from cl_methods.scenarios.base import Scenario
from cl_methods.training.config import RunConfig
from cl_methods.training.planning.counting import blank_backbone, short_fits
from cl_methods.training.planning.reference_draws import ReferenceDraws
from cl_methods.training.planning.without_data import BlankImages, without_data
from cl_methods.training.run import rows_after_learning
from cl_methods.training.task import use_micro_batches

_META = torch.device("meta")


@dataclass(frozen=True)
class StageWork:
    """Work of one stage of one task in one process.

    Attributes:
        task, stage: their names.
        steps: optimiser steps, or batches of the one pass.
        new_steps: those whose reference images no frozen model has seen; steps with some such count in part.
        again_steps: those whose reference images earlier tasks have shown, and this one has not.
        first, again, step: work of a step of the two kinds, and of the others, without averages that are taken every so many steps.
        saved: bytes that a step keeps for its backward pass, without weights and pixels.
    """

    task: str
    stage: str
    steps: int
    new_steps: float
    again_steps: float
    first: Work
    again: Work
    step: Work
    saved: int

    @property
    def total(self) -> Work:
        """Of all steps."""
        rest = self.steps - self.new_steps - self.again_steps
        return self.first * self.new_steps + self.again * self.again_steps + self.step * rest


@dataclass
class RunWork:
    """Work of a run in one of its processes.

    Attributes:
        processes: of the run.
        stages: of every task, in the order of training.
        between: before and after every task: teachers, memories, prototypes. Fits of detectors and closed-form heads are not in it.
        evaluation: of all rows: image encoders in shares, class texts in every process.
        trainable: parameters that the optimiser changes, at most.
    """

    processes: int
    stages: list[StageWork] = field(default_factory=list)
    between: Work = field(default_factory=Work)
    evaluation: Work = field(default_factory=Work)
    trainable: int = 0


def count_work(
    config: RunConfig,
    scenario: Scenario,
    processes: int = 1,
    parts: MicroBatches | None = None,
    *,
    every_task: bool = True,
    lists: bool = True,
    backbone: Backbone | None = None,
    exchanged: Work | None = None,
) -> RunWork:
    """Count one step of every stage, the hooks around every task, and the evaluation, in the last of ``processes``.

    Everything is the method's own code, of which a step is what the training loop does: pixels put together, loss, gradients and
    their mean over the processes, hooks, optimiser.

    Args:
        config: of the run.
        scenario: its tasks; no image is read.
        processes: how many compute together.
        parts: micro-batches of the encoders; None: all at once.
        every_task: False counts the first task, and of the others those with the fewest and the most tokens of class texts; the
            rest lie between these two in proportion to theirs, exact but for attention, which grows with the square of a length.
        lists: optimisers of torch work on lists of tensors, as on a GPU; False: tensor by tensor, as on a CPU.
        backbone: the configured model without data, of which a copy is counted; None makes one.
        exchanged: what a step exchanges of weights of which each process holds some rows, where they are so sharded; None: each
            holds them all.

    Raises:
        ValueError: the model is unknown, the method's settings are wrong, or the method needs data to be counted.
        RuntimeError: several processes would count the same.
    """
    if ranks.joined_count() > 1:
        raise RuntimeError("processes are counted by one process alone; start the command without torchrun")
    backbone = blank_backbone(config.model, config.pretrained) if backbone is None else _copy(backbone)
    reference = None
    if scenario.reference is not None:
        reference = Reference(BlankImages(len(scenario.reference.images), 1), scenario.reference.captions)
    found = RunWork(processes)
    with _counted():
        method = find_method(config.method)(backbone, short_fits(config.effective_settings()), reference)
        try:
            use_micro_batches(method, parts)
            image = _image_work(backbone, config.evaluation.images_together)
            found.evaluation = _evaluation(method, config, scenario, image, processes, sharded=exchanged is not None)
            tasks = scenario.tasks[:1] if method.joint else scenario.tasks
            tokens = [method.training_texts(task).numel() for task in tasks]
            counted: dict[int, TaskWork] = {}
            for index in range(len(tasks)) if every_task else _representatives(tokens):
                counted[index] = count_task(method, len(counted), tasks[index], processes, lists, exchanged is not None)
        except (NotImplementedError, RuntimeError, TypeError) as error:
            line = (str(error).splitlines() or [""])[0]
            raise ValueError(f"{config.method}: a step cannot be counted without data ({line[:200]})") from error
        draws = ReferenceDraws(config.seed)
        for index, task in enumerate(tasks):
            work = counted[index] if index in counted else _between(counted, tokens, index)
            found.trainable = max(found.trainable, work.trainable)
            found.between += work.around + image * (work.encodings * (len(task.train) / processes - PROBED))
            found.stages += _planned(method, index, task, work, draws, exchanged or Work())
    return found


def _copy(backbone: Backbone) -> Backbone:
    """With a network of its own, which methods change."""
    network, transforms = copy.deepcopy(backbone.model), (backbone.train_transform, backbone.eval_transform)
    return Backbone(network, backbone.tokenize, *transforms, name=backbone.name, device=_META)


@contextlib.contextmanager
def _counted() -> Iterator[None]:
    """Inside, kernels and attention are the operations that run on a real device."""
    with without_data(kernels=True), comparable_attention():
        yield


def _representatives(tokens: Sequence[int]) -> list[int]:
    """The first task, and of the others those with the fewest and the most tokens."""
    others = sorted(range(1, len(tokens)), key=lambda index: tokens[index])
    return sorted({0, *others[:1], *others[-1:]})


def _between(counted: Mapping[int, TaskWork], tokens: Sequence[int], index: int) -> TaskWork:
    """What a task costs that was not counted, from the two later ones that were."""
    low, high = sorted((other for other in counted if other), key=lambda other: tokens[other])
    share = (tokens[index] - tokens[low]) / max(1, tokens[high] - tokens[low])
    return counted[low].mixed(counted[high], share)


def _planned(
    method: Method, index: int, task: Task, work: TaskWork, draws: ReferenceDraws, exchanged: Work
) -> Iterator[StageWork]:
    """The stages of a task with as many steps as its real size makes, and as many new reference images as these draw."""
    if method.closed_form:
        (step,) = work.steps
        yield StageWork(task.name, "pass", method.steps(task), 0, 0, step.new, step.again, step.old, step.saved)
        return
    reference = method.reference_source(task) if method.uses_reference else None
    first_step = 0
    draws.begin_task()
    for planned, step in zip(method.stages(task), work.steps, strict=True):
        new = again = 0.0
        if reference is not None and step.new.flops != step.old.flops:
            size = reference_size(method, planned.batch_size)
            met = draws.draw(len(reference), size, index, first_step, planned.steps)
            new, again = (images / size for images in met)
        kinds = (step.new + exchanged, step.again + exchanged, step.old + exchanged)
        yield StageWork(task.name, planned.name, planned.steps, new, again, *kinds, step.saved)
        first_step += planned.steps


def _image_work(backbone: Backbone, batch_size: int) -> Work:
    """Reading and encoding one image without gradient, in batches of evaluation."""
    shape = backbone.eval_transform(torch.zeros(0)).shape
    with WorkCount() as counting, torch.no_grad():
        backbone.encode_images(torch.empty(batch_size, *shape, device=_META))
    return Work(counting.calls, images=batch_size) * (1 / batch_size)


def _evaluation(
    method: Method, config: RunConfig, scenario: Scenario, image: Work, processes: int, *, sharded: bool
) -> Work:
    """All rows of the matrix: images in shares, as often as the method encodes them at most; class texts in every process.

    Sharded weights are made whole for each row, tensor by tensor.
    """
    rows = 1 + rows_after_learning(config, type(method), len(scenario.tasks))
    images = sum(len(evaluated_images(task, config.evaluation)) for task in scenario.tasks)
    method.expect(scenario.tasks)
    with WorkCount() as counting, torch.no_grad():
        method.embed_classes(scenario.tasks)
    method._classifiers = dict.fromkeys([("probe",)], torch.empty(0))
    method.before_evaluation()
    kept = bool(method._classifiers)
    method._classifiers = {}
    times = 1 + (rows - 1) * method.later_encodings()[1]
    whole = Counter(value.numel() * value.element_size() for value in method.backbone.model.parameters() if value.dim())
    gathering = Work(gathered=whole) * (rows if sharded else 0)
    return counting.work * (1 if kept else rows) + image * (images * times / processes) + gathering
