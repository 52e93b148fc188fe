"""SnD: two teachers on unlabelled reference images, and for every image the one that knows more about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from cl_methods.backbone import Backbone
from cl_methods.checks import check_at_least, check_field
from cl_methods.components.dual_teachers import Distance, DualTeachers, discrepancy_gate, feature_distances
from cl_methods.datasets.task import Reference, Task
from cl_methods.methods.base import Batch, Facts
from cl_methods.methods.config import TrainConfig
from cl_methods.methods.finetune import FineTune

_EXTRA = "snd."


@dataclass(frozen=True)
class SnDConfig(TrainConfig):
    """Settings of :class:`TrainConfig` and of the distillation; the defaults are those of the published runs.

    Attributes:
        reference_batch_size: reference images per step.
        previous_weight: factor of the distance to the model from before the task.
        pretrained_weight: factor of the distance to the pre-trained model.
        threshold: distance of the teachers at which they share a sample evenly.
        sharpness: how fast the share changes around the threshold.
        distance: ``squared``, which is what the public code computes, or the ``norm`` itself.
    """

    batch_size: int = 32
    warmup: int = 0
    label_smoothing: float = 0.0
    weight_decay: float = 5e-4
    reference_batch_size: int = 64
    previous_weight: float = 9.0
    pretrained_weight: float = 0.5
    threshold: float = 0.2
    sharpness: float = 6.0
    distance: Distance = "squared"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_field(self, "distance", ("squared", "norm"))
        if self.reference_batch_size < 1:
            raise ValueError(f"reference_batch_size: expected a number of images >= 1, got {self.reference_batch_size}")
        check_at_least(self, 0, "previous_weight", "pretrained_weight", "threshold", "sharpness")


class SnD(FineTune):
    """``L = L_CE + w_1 mean_n γ_n ||f − f_{t−1}||² + w_0 mean_n (1 − γ_n) ||f − f_0||²`` on reference images.

    ``γ_n = σ(6 (||f_0 − f_{t−1}|| − 0.2))``: an image whose feature the earlier tasks have moved looks like theirs, and the model
    from before the task teaches it; the pre-trained model teaches the others. Only the image tower trains, so class texts are
    encoded once, and teacher features of reference images once per image. During the first task both teachers are the same,
    and one is asked.

    Source: Yu et al., "Select and distill: selective dual-teacher knowledge transfer for continual learning on vision-language
    models", ECCV 2024, with the details of its public code.

    Raises:
        ValueError: the scenario has no reference images.
    """

    name: ClassVar[str] = "snd"
    facts: ClassVar[Facts] = Facts(
        source="Yu et al., ECCV 2024",
        trains="the image tower",
        carries="features of the pre-trained model on reference images",
    )
    uses_reference = True
    Config: ClassVar[type[TrainConfig]] = SnDConfig
    config: SnDConfig

    def __init__(self, backbone: Backbone, config: SnDConfig, reference: Reference | None = None) -> None:
        super().__init__(backbone, config, reference)
        if reference is None or not reference.has_images:
            raise ValueError(
                "reference: expected unlabelled images, on which snd distils, got None: this scenario has no reference set "
                "(scenario folders takes it from the folder _reference in data.root)"
            )
        self.teachers = DualTeachers(backbone, reference)
        self._classes: Tensor | None = None

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """The image tower."""
        return [(name, value) for name, value in super().trainable() if name.startswith("visual.")]

    def before_task(self, index: int, task: Task) -> None:
        """Copy the model as the second teacher, and encode the task's class texts for all of its steps."""
        super().before_task(index, task)
        self.teachers.before_task(index, self.backbone)
        assert self._texts is not None
        with torch.no_grad():
            self._classes = self.backbone.encode_texts(self._texts, trimmed=True)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """``{"loss", "cross_entropy", "distillation"}``, as they enter the total.

        Raises:
            ValueError: the batch has no reference images.
            RuntimeError: ``before_task`` has not been called.
        """
        if batch.reference_images is None:
            raise ValueError("batch: expected reference_images, got None")
        if self._classes is None:
            raise RuntimeError(f"{self.name}: call before_task before the first step")
        images = torch.cat([batch.images, batch.reference_images])
        sizes = [len(batch.images), len(batch.reference_images)]
        features, student = self.backbone.encode_images(images).split(sizes)
        teachers = self.teachers.cached_images(batch.reference_images, batch.reference_indices)
        distances = feature_distances(student, teachers, self.config.distance)
        terms = {
            "cross_entropy": self.classification(features, batch.labels, self._classes),
            "distillation": (self.teacher_weights(teachers) * distances).sum() / len(student),
        }
        return {"loss": terms["cross_entropy"] + terms["distillation"], **terms}

    def teacher_weights(self, teachers: Tensor) -> Tensor:
        """Factors (K, N) of the distances to the ``teachers``' features (K, N, d); one row for both while they are the same."""
        config = self.config
        previous = discrepancy_gate(teachers[0], teachers[-1], config.threshold, config.sharpness)
        weights = torch.stack([config.pretrained_weight * (1 - previous), config.previous_weight * previous])
        return weights if len(teachers) == 2 else weights.sum(dim=0, keepdim=True)

    def after_task(self, index: int, task: Task) -> None:
        """Drop what only the task needed."""
        super().after_task(index, task)
        self.teachers.after_task()
        self._classes = None

    def forget_classifiers(self) -> None:
        """Nothing to forget: the text tower keeps its weights."""

    def carried_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The model: features of reference images belong to the run's own reference data."""
        return {name: value for name, value in state.items() if not name.startswith(_EXTRA)}

    def state_dict(self) -> dict[str, Tensor]:
        """The model under its own names; under ``snd.`` the teachers' features of reference images."""
        cached = {_EXTRA + name: value for name, value in self.teachers.state_dict().items()}
        return {**super().state_dict(), **cached}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore :meth:`state_dict`; a plain model state is a state between tasks."""
        super().load_state_dict({name: value for name, value in state.items() if not name.startswith(_EXTRA)})
        self._classifiers.clear()
        self.teachers.load_state_dict(
            {name[len(_EXTRA) :]: value for name, value in state.items() if name.startswith(_EXTRA)}
        )
