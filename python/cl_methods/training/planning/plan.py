"""What a run is going to do, before it does anything: tasks, steps, evaluations, FLOPs, bytes."""

from __future__ import annotations

from dataclasses import dataclass

from cl_methods.evaluation.options import evaluated_images
from cl_methods.methods.find import find_method
from cl_methods.scenarios.base import Scenario
from cl_methods.training.building import rows_after_learning
from cl_methods.training.config import RunConfig
from cl_methods.training.planning.counting import RunCosts, count_run
from cl_methods.training.planning.time_bound import readable_duration


@dataclass(frozen=True)
class PlannedTask:
    """One task of the plan.

    Attributes:
        name: of the task.
        classes, train, evaluated, available: how many; images that are evaluated, of those that the split has.
        steps: optimiser steps, or batches of the one pass; 0 where nothing is trained on it alone.
        flops: of these steps; None where they could not be counted.
    """

    name: str
    classes: int
    train: int
    evaluated: int
    available: int
    steps: int
    flops: int | None


@dataclass(frozen=True)
class Plan:
    """A run before it starts.

    Attributes:
        tasks: in order.
        rows: evaluations of all tasks, the zero-shot one included.
        images_encoded: (fewest, most) image encodings of all evaluations; they differ where the images decide.
        costs: what was counted.
        checkpoints: bytes of all checkpoints that stay, and of the largest at one time beside them.
    """

    tasks: tuple[PlannedTask, ...]
    rows: int
    images_encoded: tuple[int, int]
    costs: RunCosts
    checkpoints: tuple[int, int]

    @property
    def training_flops(self) -> int | None:
        """Of all optimiser steps; None if they could not be counted."""
        return None if self.costs.uncounted else sum(stage.flops for stage in self.costs.stages)

    @property
    def evaluation_flops(self) -> tuple[int, int]:
        """Fewest and most of all evaluations: the image encoder, and one classifier for every task from its texts."""
        texts = self.costs.texts * (1 if self.costs.keeps_texts else self.rows)
        fewest, most = (images * self.costs.image + texts for images in self.images_encoded)
        return fewest, most

    def sentences(self) -> list[str]:
        """The plan below its table, one fact a line."""
        costs, images = self.costs, sum(task.evaluated for task in self.tasks)
        fewest, most = self.images_encoded
        some = f"{most:,}" if fewest == most else f"{fewest:,} to {most:,}"
        limited = any(task.evaluated < task.available for task in self.tasks)
        rows = "1 row" if self.rows == 1 else f"{self.rows} rows"
        texts = "once" if costs.keeps_texts or self.rows == 1 else f"{self.rows} times"
        found = [
            f"evaluation: {rows} of {images:,} images{' (limited)' if limited else ''}; {some} image encodings, class texts "
            f"encoded {texts}: {_range(self.evaluation_flops)}"
        ]
        if costs.uncounted:
            found.append(f"training: FLOPs not counted; a step needs data ({costs.uncounted})")
        elif costs.stages:
            found.append(
                f"training: {readable_flops(self.training_flops or 0)}, one step of every task counted on tensors without data; "
                "work between tasks (teachers, memories, detectors, closed-form heads) is not in it"
            )
        found.append(
            f"memory: weights {_bytes(costs.weights)}, trainable {costs.trainable:,} parameters, optimiser "
            f"{_bytes(costs.optimizer)}"
        )
        if not costs.uncounted and costs.stages:
            stay, beside = self.checkpoints
            found.append(f"disk: checkpoints {_bytes(stay)} at the end, up to {_bytes(beside)} more inside a task")
        return found

    def time_sentence(self, speed: float, device: str) -> str:
        """What the counted operations take at least.

        Args:
            speed: FLOP/s that the device reaches.
            device: its name.
        """
        training = self.training_flops
        part = "training and evaluation" if training else "evaluation alone" if training is None else "evaluation"
        seconds = ((training or 0) + self.evaluation_flops[0]) / speed
        return (
            f"time: at least {readable_duration(seconds)} for {part}, if everything ran as fast as large products in float32 on "
            f"{device} do now ({readable_flops(speed)}/s); reading images and what is not counted come on top. `clk plan` with "
            "the same options predicts it for GPUs"
        )


def make_plan(config: RunConfig, scenario: Scenario) -> Plan:
    """Plan a run; nothing is encoded, trained or written.

    Raises:
        ValueError: a setting is wrong, or the model is unknown.
    """
    method, costs, options = find_method(config.method), count_run(config, scenario), config.evaluation
    rows = 1 + rows_after_learning(config, method, len(scenario.tasks))
    tasks = tuple(
        PlannedTask(
            task.name,
            len(task.class_names),
            len(task.train),
            len(evaluated_images(task, options)),
            len(getattr(task, options.split)),
            sum(stage.steps for stage in costs.stages if stage.task == task.name),
            None if costs.uncounted else sum(stage.flops for stage in costs.stages if stage.task == task.name),
        )
        for task in scenario.tasks
    )
    images = sum(task.evaluated for task in tasks)
    fewest, most = (images * (1 + (rows - 1) * again) for again in costs.later_encodings)
    sessions = 1 if method.joint else len(tasks)
    kept = sessions if config.checkpoint.keep == "all" else 1
    inside = costs.state + costs.optimizer if config.checkpoint.every else 0
    return Plan(tasks, rows, (fewest, most), costs, (kept * costs.state, inside))


def readable_flops(value: float) -> str:
    """``35.1 GFLOP``."""
    for unit in ("", "k", "M", "G", "T", "P"):
        if value < 999.5:
            break
        value /= 1000 if unit != "P" else 1
    return f"{value:.3g} {unit}FLOP"


def _range(values: tuple[int, int]) -> str:
    fewest, most = values
    return readable_flops(most) if fewest == most else f"{readable_flops(fewest)} to {readable_flops(most)}"


def _bytes(value: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} TiB"
