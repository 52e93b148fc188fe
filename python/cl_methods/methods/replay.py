"""Experience replay: fine-tuning that keeps seeing some images of earlier tasks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from cl_methods.backbone import Backbone, prompt
from cl_methods.checks import check_at_least, check_field
from cl_methods.components.exemplars import ExemplarMemory, Exemplars, Selection, herded
from cl_methods.datasets.images import ImageSource
from cl_methods.datasets.task import Reference, Task
from cl_methods.methods.base import Batch, Facts
from cl_methods.methods.config import TrainConfig
from cl_methods.methods.finetune import FineTune
from cl_methods.methods.keeping_images import KeepsImages

_MEMORY = "memory."


@dataclass(frozen=True)
class MemoryConfig(TrainConfig):
    """Settings of :class:`TrainConfig` and of the memory.

    Attributes:
        memory: images of all earlier tasks together, the same number for every class.
        reference_batch_size: images of the memory per step, evaluation transform.
        replay_weight: factor of their cross-entropy.
    """

    memory: int = 10_000
    reference_batch_size: int = 64
    replay_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("memory", "reference_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a number of images >= 1, got {getattr(self, name)}")
        check_at_least(self, 0, "replay_weight")


@dataclass(frozen=True)
class ReplayConfig(MemoryConfig):
    """Settings of :class:`MemoryConfig`, and how images are chosen.

    Attributes:
        selection: ``random`` images of each class, or those that ``herding`` takes.
    """

    selection: Literal["random", "herding"] = "random"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_field(self, "selection", ("random", "herding"))


class Replay(KeepsImages, FineTune):
    """``L = CE(current) + w CE(memory)``, each image among the classes of its own task.

    The memory holds a bounded number of images of earlier tasks, the same for each class, as indices into the tasks'
    training images: a checkpoint grows by eight bytes an image. The texts of all classes seen so far go through the text
    tower in every step.

    Source: Chaudhry et al., "On tiny episodic memories in continual learning", 2019 (experience replay), with a class-balanced
    memory that is filled after each task.
    """

    name: ClassVar[str] = "replay"
    facts: ClassVar[Facts] = Facts(
        source="baseline",
        trains="all of CLIP but the logit scale",
        carries="images of earlier tasks",
    )
    uses_reference = True
    Config: ClassVar[type[TrainConfig]] = ReplayConfig
    config: MemoryConfig

    def __init__(self, backbone: Backbone, config: MemoryConfig, reference: Reference | None = None) -> None:
        super().__init__(backbone, config, reference)
        self.memory = ExemplarMemory(config.memory)
        self._exemplars: Exemplars | None = None
        self._sizes: list[int] = []

    def before_task(self, index: int, task: Task) -> None:
        """Tokenise the training prompts of this task and of all earlier ones, and get at the images of the memory.

        Raises:
            ValueError: the memory is too small for the classes.
            RuntimeError: a state was loaded without :meth:`recall`.
        """
        self.memory.check(index, task)
        super().before_task(index, task)
        seen = [task, *self.memory.tasks]
        prompts = [prompt(one.templates[0], name) for one in seen for name in one.class_names]
        self._texts = self.backbone.trim_texts(self.backbone.tokenize(prompts))
        self._sizes = [len(one.class_names) for one in seen]
        self._exemplars = self.memory.source() if len(self.memory) else None

    def reference_source(self, task: Task) -> ImageSource | None:
        """The memory; None during the first task."""
        return self._exemplars

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """``{"loss", "cross_entropy", "replay"}``, the last unweighted; the first alone during the first task.

        Raises:
            ValueError: there is a memory and the batch holds nothing of it.
        """
        if self._exemplars is None:
            return super().loss(batch)
        if batch.reference_images is None or batch.reference_indices is None:
            raise ValueError("batch: expected reference_images and reference_indices from the memory, got None")
        assert self._texts is not None
        images = torch.cat([batch.images, batch.reference_images])
        features = self.backbone.encode_images(images)
        classes = self.backbone.encode_texts(self._texts, trimmed=True).split(self._sizes)
        current, stored = features.split([len(batch.images), len(batch.reference_images)])
        terms = {
            "cross_entropy": self.classification(current, batch.labels, classes[0]),
            "replay": self._replayed(stored, batch.reference_indices, classes[1:]),
        }
        total = terms["cross_entropy"] + self.config.replay_weight * terms["replay"]
        more = self.further_terms(features, batch, classes)
        return {"loss": torch.stack([total, *more.values()]).sum(), **terms, **more}

    def further_terms(self, features: Tensor, batch: Batch, classes: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """What a subclass adds to the loss: scalars by name, as they enter the total.

        Args:
            features: (B + B_memory, d) of the batch's images, then of those from the memory.
            batch: the batch.
            classes: text features (C, d) of this task, then of every earlier one.
        """
        return {}

    def _replayed(self, features: Tensor, indices: Tensor, classes: tuple[Tensor, ...]) -> Tensor:
        """Mean cross-entropy of images from the memory, each among the classes of its task."""
        assert self._exemplars is not None
        positions, labels = self._exemplars.positions[indices], self._exemplars.labels[indices]
        parts = []
        for place in positions.unique().tolist():
            rows = (positions == place).nonzero().squeeze(1)
            own = features[rows.to(features.device, non_blocking=True)]
            chosen = labels[rows].to(features.device, non_blocking=True)
            parts.append(self.classification(own, chosen, classes[place]) * (len(rows) / len(indices)))
        return torch.stack(parts).sum()

    def after_task(self, index: int, task: Task) -> None:
        """Shrink what is kept of earlier tasks and keep images of this one."""
        super().after_task(index, task)
        self.memory.add(task, self.selection(task))
        self._exemplars = None

    def selection(self, task: Task) -> Selection:
        """How images of ``task`` are chosen for the memory."""
        assert isinstance(self.config, ReplayConfig)
        if self.config.selection == "herding":
            return herded(self.backbone, task)
        return lambda rows, count: rows[torch.randperm(len(rows))[:count]]

    def state_dict(self) -> dict[str, Tensor]:
        """The model under its own names; under ``memory.`` the indices of each task's images."""
        memory = {_MEMORY + name: rows for name, rows in self.memory.state_dict().items()}
        return {**super().state_dict(), **memory}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore :meth:`state_dict`; between tasks :meth:`recall` must follow."""
        super().load_state_dict({name: value for name, value in state.items() if not name.startswith(_MEMORY)})
        memory = {name[len(_MEMORY) :]: rows for name, rows in state.items() if name.startswith(_MEMORY)}
        self.memory.load_state_dict(memory)
