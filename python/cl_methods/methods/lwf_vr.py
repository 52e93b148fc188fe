"""LwF-VR: LwF whose teacher is asked about texts of random words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from cl_methods.components.reference_features import random_texts
from cl_methods.datasets.task import Task
from cl_methods.methods.base import Facts
from cl_methods.methods.config import TrainConfig
from cl_methods.methods.lwf import LwF, LwFConfig


@dataclass(frozen=True)
class LwFVRConfig(LwFConfig):
    """Settings of :class:`~cl_methods.methods.lwf.LwFConfig`, and the replayed vocabulary.

    Attributes:
        texts: number of random texts, the same for the whole run.
        words: random tokens in each.
    """

    texts: int = 1000
    words: int = 10

    preset: ClassVar[str] = "lwf_vr"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("texts", "words"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a number >= 1, got {getattr(self, name)}")


class LwFVR(LwF):
    """``L = L_CE + KD(Z_t, Z_s) + KD(Z_tᵀ, Z_sᵀ)`` as LwF, ``Z = s F Uᵀ`` with the teacher's features U of random texts.

    The random texts stand for the vocabulary of pre-training: agreement on them holds what the task's classes do not name.

    Source: Ding et al., "Don't stop learning: towards continual learning for the CLIP model", arXiv 2022, as it is a baseline of
    ZSCL (Zheng et al., ICCV 2023), whose code draws 1,000 texts of 10 tokens.
    """

    name: ClassVar[str] = "lwf_vr"
    facts: ClassVar[Facts] = Facts(
        source="Ding et al., arXiv 2022",
        trains="all of CLIP but the logit scale",
        carries="nothing",
    )
    Config: ClassVar[type[TrainConfig]] = LwFVRConfig
    settings: LwFVRConfig

    def reference_tokens(self, task: Task) -> Tensor:
        """The random texts (M, L), whatever the task.

        Raises:
            ValueError: they do not fit into the backbone's context.
        """
        return random_texts(self.backbone, self.settings.texts, self.settings.words)
