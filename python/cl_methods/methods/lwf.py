"""LwF: the model from before the task teaches its successor on the task's own images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from cl_methods.backbone import Backbone
from cl_methods.datasets.task import Reference
from cl_methods.methods.base import Batch, Facts
from cl_methods.methods.config import TrainConfig
from cl_methods.methods.zscl import ZSCL
from cl_methods.methods.zscl_config import ZSCLConfig


@dataclass(frozen=True)
class LwFConfig(TrainConfig):
    """Settings of :class:`TrainConfig` and of the distillation.

    Attributes:
        reference_batch_size: images per step on which the teacher is asked: the task's own, drawn apart from the batch.
        image_loss, text_loss: distil along the texts of each image, and along the images of each text.
        distillation_weight: factor of both.
        temperature: of the distillation.
        aliased_teacher: let the teacher share the student's memory, as the public class-incremental code of ZSCL does by
            mistake: teacher and student then always agree, no gradient comes of it, and the method is plain fine-tuning.
            For comparisons with numbers that were made this way.
    """

    reference_batch_size: int = 64
    image_loss: bool = True
    text_loss: bool = True
    distillation_weight: float = 1.0
    temperature: float = 2.0
    aliased_teacher: bool = False

    preset: ClassVar[str] = "lwf"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.as_zscl()

    def as_zscl(self) -> ZSCLConfig:
        """The same as switches of ZSCL.

        Raises:
            ValueError: a setting is wrong.
        """
        return ZSCLConfig.relative(self.preset, self)


class LwF(ZSCL):
    """``L = L_CE + KD(Z_t, Z_s) + KD(Z_tᵀ, Z_sᵀ)`` with the model from before the task as teacher, on the task's own images.

    ``Z = s F Uᵀ`` with image features F of student or teacher and the teacher's features U of the task's class texts. Between
    tasks nothing but the model is stored. It is ZSCL's loss with another teacher, other images and texts, and without weight
    consolidation and averaging.

    Source: Li & Hoiem, "Learning without forgetting", TPAMI 2017, in the form for CLIP that is a baseline of ZSCL (Zheng et al.,
    ICCV 2023).
    """

    name: ClassVar[str] = "lwf"
    facts: ClassVar[Facts] = Facts(
        source="Li and Hoiem, TPAMI 2017",
        trains="all of CLIP but the logit scale",
        carries="nothing",
    )
    Config: ClassVar[type[TrainConfig]] = LwFConfig

    def __init__(self, backbone: Backbone, config: LwFConfig, reference: Reference | None = None) -> None:
        super().__init__(backbone, config.as_zscl(), reference)
        self.settings = config

    def teacher_features(self, student: Tensor, batch: Batch) -> Tensor:
        """The teacher's features (N, d); those of the ``student`` itself, and its texts, where the two are aliased."""
        if not self.settings.aliased_teacher:
            return super().teacher_features(student, batch)
        assert self._reference_tokens is not None
        self.teacher.texts = self.backbone.frozen_text_features(self._reference_tokens)
        return student.detach()
