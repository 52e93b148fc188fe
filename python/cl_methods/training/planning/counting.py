"""FLOPs and bytes of a run before it starts: one step of every stage of every task, on tensors that have shapes and no data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch

from cl_methods.backbone import Backbone, load_backbone
from cl_methods.backbone.open_clip_loading import untrained_open_clip
from cl_methods.datasets.images import ImageSource
from cl_methods.datasets.task import Reference, Task
from cl_methods.methods.base import Batch, Method, Stage
from cl_methods.methods.find import find_method
from cl_methods.scenarios.base import Scenario
from cl_methods.training.config import RunConfig
from cl_methods.training.planning.flop_count import FlopCount
from cl_methods.training.planning.reference_draws import ReferenceDraws
from cl_methods.training.planning.without_data import BlankImages, without_data

_META = torch.device("meta")
_SHORT = {"iterations": 1, "generic_iterations": 1, "fisher_samples": 2}


@dataclass(frozen=True)
class StageCosts:
    """Training FLOPs of one stage of one task.

    Attributes:
        task, stage: their names.
        steps: optimiser steps, or batches of the one pass.
        first: FLOPs of a step whose reference images no frozen model has seen yet.
        again: of one whose images earlier tasks have shown, but not this one: some teachers remember them, some are new themselves.
        step: FLOPs of every other step.
        images: reference images of a step; 0 without.
        new_images, old_images: of all steps, those met for the first time in the run, and in the task.
    """

    task: str
    stage: str
    steps: int
    first: int
    again: int
    step: int
    images: int = 0
    new_images: int = 0
    old_images: int = 0

    @property
    def flops(self) -> int:
        """Of all steps. What a teacher does grows with the images that it has not seen."""
        if not self.images:
            return self.steps * self.step
        new, again = (self.first - self.step) * self.new_images, (self.again - self.step) * self.old_images
        return self.steps * self.step + (new + again) // self.images


@dataclass
class RunCosts:
    """What a run computes and stores, as far as shapes decide it.

    Attributes:
        image: FLOPs of the image encoder for one image, without what the method adds.
        texts: FLOPs of the text encoder for the class embeddings of all tasks.
        later_encodings: of every evaluation image in every row after the first, fewest and most.
        keeps_texts: class embeddings are computed once per run, not once per evaluation.
        weights: bytes of the model.
        stages: of every task, in the order of training.
        state: bytes of a checkpoint after the last task; ``optimizer``: what one inside a task has besides, at most.
        trainable: parameters that the optimiser changes, at most.
        uncounted: why training steps could not be counted; None if they were.
    """

    image: int
    texts: int
    later_encodings: tuple[int, int]
    keeps_texts: bool
    weights: int
    stages: list[StageCosts] = field(default_factory=list)
    state: int = 0
    optimizer: int = 0
    trainable: int = 0
    uncounted: str | None = None


def count_run(config: RunConfig, scenario: Scenario) -> RunCosts:
    """Count a run without doing it: nothing is read but class names and the configuration of the model.

    Matrix products, convolutions and attention count, a multiplication and an addition as two. Hooks between tasks
    (memories, detectors, closed-form heads) do not: their cost depends on the data.

    Raises:
        ValueError: the model is unknown, or the method's settings are wrong.
    """
    backbone = blank_backbone(config.model, config.pretrained)
    reference = None
    if scenario.reference is not None:
        reference = Reference(BlankImages(len(scenario.reference.images), 1), scenario.reference.captions)
    with without_data():
        method = find_method(config.method)(backbone, short_fits(config.effective_settings()), reference)
        side = backbone.eval_transform(torch.zeros(3, 1, 1, dtype=torch.uint8)).shape
        image = _flops(lambda: backbone.encode_images(torch.empty(1, *side, device=_META)))
        method.expect(scenario.tasks)
        texts = _flops(lambda: method.embed_classes(scenario.tasks))
        method._classifiers = dict.fromkeys([("probe",)], torch.empty(0))
        method.before_evaluation()
        costs = RunCosts(
            image,
            texts,
            later_encodings=method.later_encodings(),
            keeps_texts=bool(method._classifiers),
            weights=_bytes(dict(backbone.model.state_dict())),
        )
        method._classifiers = {}
        try:
            _train(method, scenario.tasks if config.learns(method) else (), costs, ReferenceDraws(config.seed))
        except Exception as error:  # noqa: BLE001  # a method may need data for anything; the plan says which number it lacks
            line = (str(error).splitlines() or [""])[0]
            costs.uncounted = f"{type(error).__name__}: {line[:200]}"
    return costs


def blank_backbone(model: str, pretrained: str | None = None) -> Backbone:
    """The model on the device ``meta``; its transforms give images of the right shape.

    Raises:
        ValueError: the model is unknown.
    """
    if model == "mini" or model.startswith("local-dir:"):
        real = load_backbone(model, pretrained)
        network, tokenize, evaluate = real.model, real.tokenize, real.eval_transform
    else:
        network, tokenize, _, evaluate = untrained_open_clip(model, device="meta")
    shape = evaluate(torch.zeros(3, 32, 32, dtype=torch.uint8)).shape
    return Backbone(network, tokenize, *[lambda _: torch.empty(shape, device=_META)] * 2, name=model, device=_META)


def _train(method: Method, tasks: tuple[Task, ...], costs: RunCosts, draws: ReferenceDraws) -> None:
    if not tasks:
        return
    blank = [dataclasses.replace(task, **_blank_images(task)) for task in tasks]
    for index, task in enumerate(blank[:1] if method.joint else blank):
        method.before_task(index, task)
        if method.closed_form:
            steps, batch = method.steps(tasks[index]), _batch(method, task, method.config.batch_size, 0, 0)
            cost = _flops(lambda batch=batch: method.learn(batch))
            costs.stages.append(StageCosts(task.name, "pass", steps, cost, cost, cost))
            continue  # the head's solution needs the labels
        draws.begin_task()
        first_step = 0
        for stage, planned in zip(method.stages(task), method.stages(tasks[index]), strict=True):
            found = dataclasses.replace(_stage(method, index, task, stage, costs), steps=planned.steps)
            source = method.reference_source(tasks[index]) if found.images else None
            if source is not None:
                new, old = draws.draw(len(source), found.images, index, first_step, planned.steps)
                found = dataclasses.replace(found, new_images=new, old_images=old)
            costs.stages.append(found)
            first_step += planned.steps
        method.stage = None
        method.after_task(index, task)
    costs.state = _bytes(method.state_dict())


def _stage(method: Method, index: int, task: Task, stage: Stage, costs: RunCosts) -> StageCosts:
    """One step with images of each kind; how often there are such is the caller's."""
    method.stage = stage
    method.before_stage(stage)
    optimizer = method.optimizer()
    trainable = [value for _, value in method.trainable()]
    costs.trainable = max(costs.trainable, sum(value.numel() for value in trainable))

    def look(step: int, place: int, *, whole: bool = False) -> tuple[int, int]:
        """FLOPs of a loss, and with the rest of its step if the ``whole`` is taken."""
        batch = _batch(method, task, stage.batch_size, step, place)
        with torch.random.fork_rng(devices=[]), FlopCount() as counter:
            torch.manual_seed(0)  # texts that a step draws are the same in all, so that steps can be compared
            loss = method.loss(batch)["loss"]
            forward = counter.total
            if whole:
                loss.backward()
                method.before_step(batch)
            return forward, counter.total

    optimizer.zero_grad(set_to_none=True)
    shown = _reference_size(method, task, stage.batch_size)
    again = look(0, index - 1)[0] if shown and index and _stays(method, method.reference_source(task)) else None
    first = look(0, index)[0] if shown else None
    known, step = look(1, index, whole=True)
    with FlopCount():  # which knows operations that ran before
        optimizer.step()  # whose moments are wanted
        for done in range(2):
            method.after_step(done)
    # What a frozen model has not seen yet costs no gradient: steps differ in their losses alone.
    first = step if first is None else step + first - known
    again = first if again is None else step + again - known
    moments = (value for state in optimizer.state.values() for value in state.values())
    costs.optimizer = max(costs.optimizer, sum(_size(value) for value in moments if isinstance(value, torch.Tensor)))
    return StageCosts(task.name, stage.name, 0, first, again, step, shown)


def _reference_size(method: Method, task: Task, count: int) -> int:
    """Reference images of a step; 0 without."""
    if not method.uses_reference or method.reference_source(task) is None:
        return 0
    return int(getattr(method.config, "reference_batch_size", count))


def _batch(method: Method, task: Task, count: int, step: int, place: int) -> Batch:
    """A batch of ``count`` images; ``place`` counts batches of reference images that have none in common, if there are enough."""
    shape = method.backbone.eval_transform(torch.zeros(0)).shape
    source = task.train if method.closed_form else method.training_images(task)
    reference = method.reference_source(task) if method.uses_reference else None
    size = _reference_size(method, task, count)
    return Batch(
        torch.empty(count, *shape, device=_META),
        torch.empty(count, dtype=torch.int64, device=_META),
        step,
        None if reference is None else torch.empty(size, *shape, device=_META),
        None if reference is None else _places(method, reference, size, place),
        task,
        torch.arange(count) % len(source),
    )


def _places(method: Method, reference: ImageSource, size: int, place: int) -> torch.Tensor:
    """Positions of reference images; of a set that stays they are names and nothing else, and may lie beyond its end."""
    rows = torch.arange(size) + place * size
    return rows if _stays(method, reference) else rows % len(reference)


def _stays(method: Method, reference: ImageSource | None) -> bool:
    """Whether the reference images are the same in every task."""
    return method.reference is not None and reference is method.reference.images


def _blank_images(task: Task) -> dict[str, Any]:
    """Two images of every class, enough for every memory to take its share of each."""
    classes = len(task.class_names)
    return {name: BlankImages(2 * classes, classes) for name in ("train", "validation", "test")}


def short_fits(settings: Any, *, own_features: bool = True) -> Any:
    """Settings without what is fitted between tasks: detectors and penalties get one iteration.

    Args:
        settings: of a method.
        own_features: detectors look at features of the model, and read no weights of another from disk.
    """
    changes: dict[str, Any] = {}
    for entry in dataclasses.fields(settings):
        value = getattr(settings, entry.name)
        if dataclasses.is_dataclass(value):
            names = {inner.name for inner in dataclasses.fields(value)}
            short = {name: number for name, number in _SHORT.items() if name in names}
            if own_features and getattr(value, "features", None) == "alexnet":
                short |= {"features": "backbone", "augment": False}  # type: ignore[dict-item]
            changes[entry.name] = dataclasses.replace(value, **short)  # type: ignore[type-var]
        elif entry.name == "fisher_samples":
            changes[entry.name] = _SHORT["fisher_samples"]
    return dataclasses.replace(settings, **changes)


def _flops(action: Any) -> int:
    with FlopCount() as counter:
        action()
    return counter.total


def _bytes(state: dict[str, torch.Tensor]) -> int:
    return sum(_size(value) for value in state.values())


def _size(value: torch.Tensor) -> int:
    return value.numel() * value.element_size()
