"""What a continual-learning method must say: what trains, its loss and hooks, how it classifies, what it carries."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from difflib import get_close_matches
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cl_methods.backbone import Backbone, prompt
from cl_methods.datasets.images import ImageSource
from cl_methods.datasets.task import Reference, Task
from cl_methods.methods.scoring import Scoring
from cl_methods.methods.settings import build_settings, scenario_settings


@dataclass(frozen=True)
class Facts:
    """What to know of a method before choosing it, in short phrases; ``clk methods`` lists them.

    Attributes:
        source: the publication.
        trains: which parameters change.
        carries: what is stored between tasks, besides what trains.
        test_time: what a prediction depends on besides the image and the label space.
    """

    source: str
    trains: str
    carries: str
    test_time: str = "nothing"


@dataclass(frozen=True)
class Stage:
    """Consecutive optimiser steps of one task, with an optimiser and a schedule of their own.

    Attributes:
        name: for logs and for the method to tell its stages apart.
        iterations: T; the stage has T + 1 steps, the last at learning rate zero.
        lr: peak learning rate.
        warmup: warm-up steps.
        batch_size: images per step.
    """

    name: str
    iterations: int
    lr: float
    warmup: int
    batch_size: int

    @property
    def steps(self) -> int:
        """Optimiser steps of the stage."""
        return self.iterations + 1


@dataclass(frozen=True)
class Batch:
    """One optimiser step's data, already transformed and on the device.

    Attributes:
        images: (B, 3, H, W) of :meth:`Method.training_images`, training transform.
        labels: (B,) int64.
        reference_images: (B_ref, 3, H, W), evaluation transform; None unless the method asks for them.
        step: 0-based optimiser step within the task.
        reference_indices: (B_ref,) int64 positions in the reference source, on the CPU, by which frozen features are cached.
        task: the task that the images and labels come from; None where it can only be the current one.
        indices: (B,) int64 positions of the images in their source, on the CPU, by which frozen features are cached.
    """

    images: Tensor
    labels: Tensor
    step: int
    reference_images: Tensor | None = None
    reference_indices: Tensor | None = None
    task: Task | None = None
    indices: Tensor | None = None


class Method(Scoring, ABC):
    """A continual-learning method over one backbone; the training loop calls the hooks below in this order.

    ``before_task`` → every stage: ``before_stage`` → every step: ``loss`` → backward → ``before_step`` → optimiser →
    ``after_step`` → ``after_task``. Most methods have one stage.
    A method in closed form has no optimiser: ``before_task`` → every batch of one pass: ``learn`` → ``after_task``.
    An override of a hook calls the base class's. Random numbers come from torch's global generators, which the loop seeds
    per step, so a resumed run repeats them.

    Attributes:
        name: by which the command line, its file of settings and the reports know the method.
        facts: what to know before choosing it.
        Config: dataclass of its settings; the defaults are the published ones for full-shot MTIL where there are any.
        uses_reference: batches carry reference images, drawn from :meth:`reference_source`.
        trains: False for methods that only evaluate.
        config: has ``lr``, ``task_lr``, ``iterations``, ``warmup``, ``batch_size`` and, if ``uses_reference``, may have
            ``reference_batch_size`` (default: ``batch_size``). A method in closed form needs ``batch_size`` alone.
        closed_form: every image of a task is looked at once, through the evaluation transform, in an order drawn from seed
            and task, and :meth:`learn` replaces the optimiser steps.
        joint: trained once on all tasks together (an upper bound, not continual): ``before_task`` and ``after_task``
            are called for the first task only, every batch names its task, and step t draws from task ``t mod T``.
        shards: works where each process holds some rows of the backbone's weights alone (:mod:`cl_methods.sharding`): it
            changes weights through :mod:`cl_methods.components.weights` only, has no module of its own that trains, and
            encodes with the backbone where all processes do.
        stage: the present stage of the present task; None outside of training.
        offload_averages: averages of weights, which no step reads, are kept in host memory; asked of ``before_task``.
        offload_anchors: so are :meth:`anchors`, which are read from there element by element; asked of ``before_task``.
    """

    name: ClassVar[str]
    facts: ClassVar[Facts]
    Config: ClassVar[type]
    uses_reference: bool = False
    trains: ClassVar[bool] = True
    closed_form: ClassVar[bool] = False
    joint: ClassVar[bool] = False
    shards: ClassVar[bool] = False

    def __init__(self, backbone: Backbone, config: Any, reference: Reference | None = None) -> None:
        super().__init__(backbone)
        self.config, self.reference = config, reference
        self.stage: Stage | None = None
        self.offload_averages = self.offload_anchors = False

    @classmethod
    def default_config(cls, scenario: str) -> Any:
        """Settings for ``scenario`` from the method's file in ``cl_methods/configs``; those of ``Config`` where it says nothing.

        Raises:
            ValueError: the file holds a setting that does not exist or has a wrong value.
        """
        return build_settings(cls.Config, scenario_settings(cls.name, scenario))

    def check_tasks(self, tasks: Sequence[Task]) -> None:
        """Check, before a run begins, that the settings go with the sequence ``tasks``; an override calls the base class's.

        Raises:
            ValueError: a rate is set for a task that does not exist, and whose name is nearly that of one.
        """
        rates, names = getattr(self.config, "task_lr", {}), {task.name for task in tasks}
        for name in rates.keys() - names:
            for meant in get_close_matches(name, names - rates.keys(), n=1, cutoff=0.75):
                raise ValueError(f"task_lr: no task is called {name!r}; did you mean {meant}?")

    def before_task(self, index: int, task: Task) -> None:
        """Prepare for training on ``task``, the ``index``-th (0-based) of the sequence."""
        self.forget_classifiers()

    @classmethod
    def couples(cls, settings: Any) -> bool:
        """Whether, with these ``settings``, an image's scores depend on the images scored with it, and so on the size of a batch.

        By default, whether a setting called ``scope``, of the method or of a part of it, is ``"batch"``.
        """
        nested = [value for value in vars(settings).values() if is_dataclass(value)]
        return any(getattr(one, "scope", None) == "batch" for one in (settings, *nested))

    def stages(self, task: Task) -> tuple[Stage, ...]:
        """Optimiser stages of ``task``, known from the configuration and the task alone; by default one, ``"train"``."""
        config = self.config
        iterations = config.task_iterations(len(task.train))
        return (Stage("train", iterations, self.learning_rate(task), config.warmup, config.batch_size),)

    def before_stage(self, stage: Stage) -> None:
        """``stage`` begins: decide what trains and from which images.

        Not called when a run is resumed in the middle of the stage, so whatever is decided here belongs into
        :meth:`state_dict`; :attr:`stage` is set either way.
        """

    def training_images(self, task: Task) -> ImageSource:
        """Images from which ``Batch.images`` and ``Batch.labels`` of the present stage are drawn: those of ``task``."""
        return task.train

    def steps(self, task: Task) -> int:
        """Batches from which ``task`` is learnt: optimiser steps, or those of one pass over its images in closed form."""
        if not self.trains:
            return 0
        if self.closed_form:
            return -(-len(task.train) // self.config.batch_size)
        return sum(stage.steps for stage in self.stages(task))

    def learning_rate(self, task: Task) -> float:
        """Peak learning rate of ``task``: the configuration's ``task_lr`` by task name, else its ``lr``."""
        return self.config.task_lr.get(task.name, self.config.lr)

    def reference_source(self, task: Task) -> ImageSource | None:
        """Images from which ``Batch.reference_images`` are drawn while ``task`` is learnt; None if not needed."""
        return self.reference.images if self.uses_reference and self.reference is not None else None

    @abstractmethod
    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """Named parameters that the optimiser of the current task updates."""

    def optimizer(self) -> torch.optim.Optimizer:
        """A fresh optimiser for the current task; by default AdamW with the configured ``weight_decay`` and ``betas``.

        The loop sets the learning rate of every group before each step.
        """
        config = self.config
        parameters = [parameter for _, parameter in self.trainable()]
        return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay, betas=config.betas)

    @abstractmethod
    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Scalar terms of the loss; ``"loss"`` is the one to differentiate, the rest is for the log."""

    def learn(self, batch: Batch) -> None:
        """Take in one batch of the only pass over the task; called for methods in closed form instead of :meth:`loss`.

        Raises:
            NotImplementedError: the method has no closed form.
        """
        raise NotImplementedError(f"{self.name} learns by optimiser steps; closed_form is False")

    def before_step(self, batch: Batch) -> None:
        """Between backward and the optimiser step: the place for gradients that have a closed form."""
        self.forget_classifiers()

    def after_step(self, step: int) -> None:
        """After the optimiser step with 0-based index ``step``."""

    def averaged_weights(self) -> dict[str, Tensor]:
        """Averages of weights over the present task, by name: what :attr:`offload_averages` keeps in host memory."""
        return {}

    def anchors(self) -> list[Mapping[str, Tensor]]:
        """Sets of weights, by name, that are compared or mixed with those that train and that nothing else holds or computes with.

        It is what :attr:`offload_anchors` keeps in host memory.
        """
        return []

    def after_task(self, index: int, task: Task) -> None:
        """Turn what was trained into what is evaluated and carried on."""
        self.forget_classifiers()

    def before_evaluation(self) -> None:
        """Before images are scored, whenever weights may have changed: evaluation mode, and no stale cached features."""
        self.backbone.model.eval()
        self.forget_classifiers()

    def training_texts(self, task: Task) -> Tensor:
        """Trimmed token ids of the training prompts, ``templates[0]`` with each class name, on the device."""
        return self.backbone.trim_texts(
            self.backbone.tokenize([prompt(task.templates[0], name) for name in task.class_names])
        )

    def recall(self, tasks: Sequence[Task]) -> None:
        """``tasks`` have been learnt, in this order, by the state that was just loaded.

        A method that keeps examples stores which ones they are; this is how it gets at the images again after a restart.
        """

    def carried_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """What of a state between tasks holds in another run, with other images and reference data: by default all of it."""
        return state

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor that a later task or an evaluation needs; also valid in the middle of a task."""
        return dict(self.backbone.model.state_dict())

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore :meth:`state_dict` in a new instance: between tasks, or inside one after its ``before_task``.

        Raises:
            RuntimeError: names or shapes do not fit this method and backbone.
        """
        self.backbone.model.load_state_dict(state)
        self.forget_classifiers()
