"""The training steps along one dimension at a time, built small enough for a CPU, and what is counted of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cl_methods.bench.own_step import OwnStep, own_steps
from cl_methods.bench.world import World, mini_world, open_clip_world
from cl_methods.datasets.specification import DATASETS
from cl_methods.datasets.task import Reference, Task
from cl_methods.datasets.texts import classes
from cl_methods.forecast.counting import StageWork, count_work
from cl_methods.methods import METHODS
from cl_methods.scenarios.base import Scenario
from cl_methods.training.config import RunConfig
from cl_methods.training.planning.without_data import BlankImages

IMAGES = 128
"""Images of a task."""

MILLIONS = {"ViT-S-32-alt": 43, "ViT-S-32": 63, "ViT-M-32": 104, "ViT-B-32": 151}
"""Parameters of the models."""


@dataclass(frozen=True)
class Case:
    """One step.

    Attributes:
        axis, value: which dimension is moved, and where it is.
        method, model, batch, classes, captions, experts: settings; ``experts`` None leaves the method's own number.
        task: the one that is learnt, counted from 1.
        ranks: processes that compute together.
    """

    axis: str
    value: float
    method: str = "zscl"
    model: str = "mini"
    batch: int = 32
    classes: int = 10
    captions: int = 250
    experts: int | None = None
    task: int = 2
    ranks: int = 1

    @property
    def key(self) -> str:
        """Its name."""
        return f"{self.axis}, {self.method}, {self.model}: {self.value:g}"


def cases() -> Iterator[Case]:
    """Every curve. All that share method and model cross at the defaults of :class:`Case`."""
    for method in ("zscl", "moe_adapters", "mulki", "clap4clip"):
        for batch in (8, 32, 128):
            yield Case("batch", batch, method, batch=batch)
    for method in ("zscl", "moe_adapters", "mulki"):
        for batch in (2, 8):
            yield Case("batch", batch, method, "ViT-S-32-alt", batch)
    for method in ("zscl", "moe_adapters"):
        for number in (5, 20, 72):
            yield Case("classes", number, method, classes=number)
    for method in ("clap4clip", "mulki"):
        for task in (1, 2, 4, 8):
            yield Case("task", task, method, classes=10, task=task)
    for experts in (2, 4, 8, 22, 64):
        yield Case("experts", experts, "moe_adapters", experts=experts)
    for captions in (250, 1000, 4000, 15_840):
        yield Case("reference texts", captions, captions=captions)
    for model, millions in MILLIONS.items():
        yield Case("million parameters", millions, model=model, batch=2, classes=5)
    for method in ("zscl", "moe_adapters"):
        for ranks in (1, 2, 4):
            yield Case("processes", ranks, method, ranks=ranks)


def step_of(case: Case) -> OwnStep:
    """A real step of the task, taken once before."""
    steps = own_steps(case.method, _world(case), _settings(case), case.batch, case.task)
    return next(iter(steps.values()))


def counted(case: Case) -> dict[str, Any]:
    """What the time model needs of that step, and what the page says of it; without the exchange of pixels."""
    stage = _stage(case)
    work = stage.step
    # What is timed begins with a batch that is there. Both batches of a mini step are of one size.
    pixels = 4 * 3 * 32 * 32 * -(-case.batch // case.ranks) * case.ranks
    return {
        "flops": work.flops,
        "bytes": work.bytes,
        "operations": work.operations,
        "saved": stage.saved,
        "summed": sorted(work.summed.items()),
        "gathered": sorted((size, times) for size, times in work.gathered.items() if size != pixels),
        "calls": [[*call, times] for call, times in sorted(work.calls.items())],
    }


def _world(case: Case) -> World:
    if case.model == "mini":
        return mini_world(case.captions, task_count=max(2, case.task), class_count=case.classes)
    return open_clip_world(case.model, case.captions, shapes=False, class_count=case.classes)


def _settings(case: Case) -> Any:
    settings = METHODS[case.method].default_config("mini" if case.model == "mini" else "mtil")
    if case.experts is not None:
        settings = dataclasses.replace(settings, experts=case.experts, freeze=0)
    names = [name for name in ("batch_size", "reference_batch_size") if hasattr(settings, name)]
    return dataclasses.replace(settings, **dict.fromkeys(names, case.batch))


def _stage(case: Case) -> StageWork:
    config = RunConfig(case.method, _settings(case), "mini", model=case.model)
    if case.model == "mini":
        world = _world(case)
        tasks, reference = world.tasks, world.reference
    else:
        tasks = tuple(_blank_task(number, case.classes) for number in range(max(2, case.task)))
        texts = tuple(f"a photo of dog number {row}" for row in range(case.captions))
        reference = Reference(BlankImages(IMAGES, 1), texts)
    work = count_work(config, Scenario("world", "I", tasks, reference), case.ranks, lists=False)
    return next(stage for stage in work.stages if stage.task == tasks[case.task - 1].name)


def _blank_task(number: int, count: int) -> Task:
    """As :func:`~cl_methods.bench.world.open_clip_world` makes its two, without images."""
    texts = classes(DATASETS["DTD" if number else "Aircraft"].name, "zscl")
    names = tuple(list(texts.names)[:count])
    return Task(f"task {number}", names, texts.templates, *(BlankImages(IMAGES, count) for _ in range(3)))
