"""Hours and memory of a run on hardware that is not at hand, and what limits it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cl_methods.backbone import Backbone, prompt
from cl_methods.backbone.micro_batches import MicroBatches
from cl_methods.forecast.counting import RunWork, count_work
from cl_methods.forecast.hardware import Hardware
from cl_methods.forecast.time_model import Reached, Seconds, seconds
from cl_methods.forecast.tokens import RememberedTokens
from cl_methods.forecast.work import Work
from cl_methods.methods.find import find_method
from cl_methods.scenarios.base import Scenario
from cl_methods.training.building import check_distributed
from cl_methods.training.config import RunConfig
from cl_methods.training.memory.plan import MemoryPlan
from cl_methods.training.memory.planner import MemoryBudgetError, model_shapes, plan_memory
from cl_methods.training.planning.counting import blank_backbone, short_fits

CONTEXT = 600 << 20
"""Bytes that CUDA and its libraries hold besides tensors; assumed."""


@dataclass(frozen=True)
class Prediction:
    """One run on so many GPUs of one kind: predicted, not measured.

    Attributes:
        hardware: each GPU.
        processes: one per GPU.
        precision: of matrix products.
        work: of one process.
        memory: plan of a training step in one process; None for a method without optimiser steps.
        too_large: why no plan fits the GPU; None if one does. Times are then those of everything at once.
        steps: seconds of all steps of each stage, in the order of ``work.stages``.
        between, evaluation: seconds around the tasks, and of all rows.
    """

    hardware: Hardware
    processes: int
    precision: str
    work: RunWork
    memory: MemoryPlan | None
    too_large: str | None
    steps: tuple[Seconds, ...]
    between: Seconds
    evaluation: Seconds

    @property
    def training_hours(self) -> float:
        """Of all optimiser steps, or of the passes of a method in closed form."""
        return sum(one.total for one in self.steps) / 3600

    @property
    def hours(self) -> float:
        """Of the whole run."""
        return self.training_hours + (self.between.total + self.evaluation.total) / 3600

    @property
    def step_seconds(self) -> float:
        """Mean seconds of a step."""
        return 3600 * self.training_hours / max(1, sum(stage.steps for stage in self.work.stages))

    @property
    def memory_bytes(self) -> int | None:
        """Predicted peak of a training step on each GPU, with CUDA's own share."""
        return None if self.memory is None else self.memory.peak + CONTEXT

    @property
    def whole(self) -> Seconds:
        """Where the time of the run goes."""
        parts = (*self.steps, self.between, self.evaluation)
        names = ("products", "memory", "host", "exchange", "reading")
        sums = {name: sum(getattr(one, name) for one in parts) for name in names}
        return Seconds(**sums, ahead=parts[0].ahead, asynchronous=parts[0].asynchronous)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        steps = sum(stage.steps for stage in self.work.stages)
        training = sum((stage.total for stage in self.work.stages), Work())
        return {
            "hardware": self.hardware.name,
            "processes": self.processes,
            "precision": self.precision,
            "hours": self.hours,
            "training_hours": self.training_hours,
            "between_hours": self.between.total / 3600,
            "evaluation_hours": self.evaluation.total / 3600,
            "step_seconds": self.step_seconds,
            "seconds": self.whole.parts,
            "binds": self.whole.binds,
            "steps": steps,
            "flops_per_step": training.flops / max(1, steps),
            "bytes_per_step": training.bytes / max(1, steps),
            "operations_per_step": training.operations / max(1, steps),
            "exchanged_per_step": training.exchanged / max(1, steps),
            "trainable": self.work.trainable,
            "flops_of_a_step": {f"{one.task}, {one.stage}": one.total.flops / one.steps for one in self.work.stages},
            "memory": None if self.memory is None else {**self.memory.as_dict(), "with_context": self.memory_bytes},
            "too_large": self.too_large,
        }


class Predictor:
    """A run, to be predicted on any hardware; what was counted once is counted for all. Nothing is read, encoded or written.

    Args:
        config: of the run; ``workers`` are those of each process.
        scenario: its tasks.

    Raises:
        ValueError: the run shards its weights, and the method needs whole ones.
    """

    def __init__(self, config: RunConfig, scenario: Scenario) -> None:
        check_distributed(config)
        self.config, self.scenario = config, scenario
        self._works: dict[tuple[int, MicroBatches | None], RunWork] = {}
        self._wholes: dict[int, MemoryPlan] = {}
        self._blank: Backbone | None = None

    def predict(
        self,
        hardware: Hardware,
        processes: int = 1,
        *,
        precision: str = "fp32",
        reached: Reached | None = None,
        fits: bool = False,
    ) -> Prediction:
        """What the run would take on so many GPUs.

        Batches go through the encoders as the memory plan for the GPU says, or for the run's memory budget where that is less.

        Args:
            hardware: every GPU.
            processes: one per GPU.
            precision: of matrix products.
            reached: shares of the peaks; assumptions for GPUs by default.
            fits: batches go through the encoders at once, and nobody asks whether the GPU has the memory.

        Raises:
            ValueError: the model is unknown, a setting is wrong, or the hardware has no such precision.
        """
        hardware.peak(precision)
        memory, too_large = (None, None) if fits else self.plan(hardware.memory, processes)
        parts = None if memory is None or too_large else memory.micro_batches
        plan = self._whole(processes) if memory is None and self._shards(processes) else memory
        work = self.work(processes, parts, plan)
        options: dict[str, Any] = {"precision": precision, "workers": self.config.workers, "reached": reached}
        steps = tuple(seconds(stage.total, hardware, processes, **options) for stage in work.stages)
        between, evaluation = (seconds(one, hardware, processes, **options) for one in (work.between, work.evaluation))
        return Prediction(hardware, processes, precision, work, memory, too_large, steps, between, evaluation)

    def work(self, processes: int = 1, parts: MicroBatches | None = None, plan: MemoryPlan | None = None) -> RunWork:
        """:func:`~cl_methods.forecast.counting.count_work` of one of the processes.

        Args:
            processes: that compute together.
            parts: micro-batches of the encoders.
            plan: of a step with these; where weights are sharded it knows what of them is exchanged.
        """
        key = processes, parts
        if key not in self._works:
            if self._blank is None:
                self._blank = blank_backbone(self.config.model, self.config.pretrained)
                self._blank.tokenize = self._tokens(self._blank.tokenize)
            self._works[key] = count_work(
                self.config,
                self.scenario,
                processes,
                parts,
                every_task=False,
                backbone=self._blank,
                exchanged=_exchanged(plan) if plan is not None and self._shards(processes) else None,
            )
        return self._works[key]

    def plan(self, memory: int, processes: int = 1) -> tuple[MemoryPlan | None, str | None]:
        """The memory plan of one of several processes on a GPU, and why none fits.

        Args:
            memory: bytes of the GPU.
            processes: how many compute together.

        Returns:
            The plan (of everything at once if none fits; None for a method without optimiser steps), and the sentence that says
            what would fit, or None.
        """
        method = find_method(self.config.method)
        if not method.trains or method.closed_form:
            return None, None
        whole = self._whole(processes)
        available = min(memory, self.config.memory_bytes or memory) - CONTEXT
        if whole.fits(available):
            return whole, None
        try:
            return self._rehearse(available, processes), None
        except MemoryBudgetError as error:
            return whole, str(error)

    def _shards(self, processes: int) -> bool:
        return self.config.distributed == "fsdp" and processes > 1

    def _whole(self, processes: int) -> MemoryPlan:
        """The plan of everything at once."""
        if processes not in self._wholes:
            self._wholes[processes] = self._rehearse(None, processes)
        return self._wholes[processes]

    def _tokens(self, tokenize: Callable[[Sequence[str]], Tensor]) -> RememberedTokens:
        """With everything that a run surely asks for."""
        known = RememberedTokens(tokenize)
        reference = self.scenario.reference
        known(() if reference is None else reference.captions)
        for task in self.scenario.tasks:
            known([prompt(template, name) for name in task.class_names for template in task.templates])
        return known

    def _rehearse(self, budget: int | None, processes: int) -> MemoryPlan:
        config, scenario = self.config, self.scenario
        settings = short_fits(config.effective_settings())
        tasks, reference = scenario.tasks, scenario.reference
        method = find_method(config.method)
        shapes = model_shapes(config, torch.device("cpu"))
        return plan_memory(
            method,
            settings,
            shapes,
            tasks,
            reference,
            budget,
            levers=config.levers,
            processes=processes,
            sharded=self._shards(processes),
            on_gpu=True,
            evaluated=config.evaluation.images_together,
        )


def _exchanged(plan: MemoryPlan) -> Work:
    """What a step exchanges of sharded weights. A reduced tensor is sent as often as a gathered one; both are copied once."""
    if not plan.exchanges:
        return Work()
    size = round(plan.exchanged / plan.exchanges)
    return Work(calls=Counter({(0, 2 * size): plan.exchanges}), gathered=Counter({size: plan.exchanges}))
