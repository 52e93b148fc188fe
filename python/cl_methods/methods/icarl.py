"""iCaRL: a herded memory, distillation on the classes of earlier tasks, and classification by the nearest mean of exemplars."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

import cl_kernels as clk
from cl_methods.backbone import Backbone
from cl_methods.checks import check_at_least, check_field
from cl_methods.components.exemplars import Selection, encode_source, herded
from cl_methods.components.frozen_teacher import FrozenTeacher
from cl_methods.datasets.images import Subset
from cl_methods.datasets.task import Reference, Task
from cl_methods.methods.base import Batch, Facts
from cl_methods.methods.config import TrainConfig
from cl_methods.methods.replay import MemoryConfig, Replay

_EXTRA = "icarl."


@dataclass(frozen=True)
class ICaRLConfig(MemoryConfig):
    """Settings of :class:`~cl_methods.methods.replay.MemoryConfig`, of the distillation and of the classifier.

    Attributes:
        distillation_weight: factor of the distillation.
        temperature: of the distillation.
        classifier: ``exemplar_means`` for tasks that have been learnt (others by their texts); or ``texts`` for all, which
            is what the published MTIL numbers were made with.
        aliased_teacher: let the teacher share the student's memory, as the public class-incremental code of ZSCL does by
            mistake: no gradient comes of the distillation then, and experience replay is left.
    """

    distillation_weight: float = 1.0
    temperature: float = 2.0
    classifier: Literal["exemplar_means", "texts"] = "exemplar_means"
    aliased_teacher: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_field(self, "classifier", ("exemplar_means", "texts"))
        check_at_least(self, 0, "distillation_weight")
        if not self.temperature > 0:
            raise ValueError(f"temperature: expected a number > 0, got {self.temperature}")


class ICaRL(Replay):
    """``L = CE(current) + w CE(memory) + λ KD(Z_t, Z_s)``, then ``argmax_c f(x)·μ_c`` with μ the means of exemplars.

    KD is over ``Z = s F Uᵀ`` of all images of the step, current and stored, with the teacher's features U of the classes of
    earlier tasks; the teacher is the model from before the task. Images are chosen by herding. Between tasks the indices of the
    memory and the means (C, d) are stored. Under the label spaces ``seen`` and ``all`` means of images compete with each
    other, and with texts only for tasks that have not been learnt, whose scores are smaller by nature.

    Source: Rebuffi et al., "iCaRL: incremental classifier and representation learning", CVPR 2017, algorithms 1 to 5, with
    CLIP's softmax against class texts in place of its sigmoid outputs; 10,000 images as in the MTIL baseline of ZSCL
    (Zheng et al., ICCV 2023).
    """

    name: ClassVar[str] = "icarl"
    facts: ClassVar[Facts] = Facts(
        source="Rebuffi et al., CVPR 2017",
        trains="all of CLIP but the logit scale",
        carries="images of earlier tasks, one mean per class",
    )
    Config: ClassVar[type[TrainConfig]] = ICaRLConfig
    config: ICaRLConfig

    def __init__(self, backbone: Backbone, config: ICaRLConfig, reference: Reference | None = None) -> None:
        super().__init__(backbone, config, reference)
        self.means: list[Tensor] = []
        self.task_names: list[str] = []
        self.teacher = FrozenTeacher(backbone.device)
        self._scale = float(backbone.logit_scale.detach())

    def before_task(self, index: int, task: Task) -> None:
        """Copy the model as the teacher and have it encode the class texts of earlier tasks."""
        super().before_task(index, task)
        if self._exemplars is not None and not self.config.aliased_teacher:
            assert self._texts is not None
            self.teacher.becomes(self.backbone)
            self.teacher.encode_texts(self._texts[self._sizes[0] :])

    def further_terms(self, features: Tensor, batch: Batch, classes: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """``{"distillation"}`` of features (B + B_memory, d); the text features ``classes`` (C, d) serve an aliased teacher."""
        if self.config.aliased_teacher:
            teacher, texts = features.detach(), torch.cat(classes[1:]).detach()
        else:
            assert self.teacher.texts is not None
            assert batch.reference_images is not None
            stored = self.teacher.image_features(batch.reference_images, batch.reference_indices)
            teacher, texts = torch.cat([self.teacher.encode_images(batch.images), stored]), self.teacher.texts
        distillation = clk.feature_distill_kl(
            features,
            teacher,
            texts,
            logit_scale=self._scale,
            temperature=self.config.temperature,
            rows=self.config.distillation_weight,
            columns=0.0,
        )
        return {"distillation": distillation}

    def after_task(self, index: int, task: Task) -> None:
        """Fill the memory by herding, and take the means of what every class keeps under the new weights."""
        super().after_task(index, task)
        self.teacher.retires()
        self.means = [
            self._class_means(known, rows) for known, rows in zip(self.memory.tasks, self.memory.indices, strict=True)
        ]
        self.task_names = [known.name for known in self.memory.tasks]

    def selection(self, task: Task) -> Selection:
        """Herding."""
        return herded(self.backbone, task)

    def _class_means(self, task: Task, rows: Tensor) -> Tensor:
        """Normalised means (C, d) of the exemplars' normalised features; zero for a class without images."""
        source = Subset(task.train, rows)
        features = encode_source(self.backbone, source)
        members = F.one_hot(source.labels.to(features.device), len(task.class_names)).to(features.dtype)
        sums = members.T @ features
        return F.normalize(sums, dim=1)

    def classifier(self, task: Task) -> Tensor:
        """Means of exemplars (C, d) for a task that has been learnt, else its class embeddings."""
        means = self._means_of(task)
        return super().classifier(task) if means is None else means

    def reads_texts(self, task: Task) -> bool:
        """Whether means of exemplars do not take their place."""
        return self._means_of(task) is None

    def _means_of(self, task: Task) -> Tensor | None:
        if self.config.classifier == "texts":
            return None
        learnt = zip(self.task_names or [known.name for known in self.memory.tasks], self.means, strict=False)
        return next((means for name, means in learnt if name == task.name), None)

    def state_dict(self) -> dict[str, Tensor]:
        """As for replay; under ``icarl.`` means and names of tasks, and within a task the teacher's features of the memory."""
        means = {f"{_EXTRA}means.{place}": value for place, value in enumerate(self.means)}
        if self.task_names:
            means[f"{_EXTRA}task_names"] = torch.tensor(list(json.dumps(self.task_names).encode()), dtype=torch.uint8)
        images = {f"{_EXTRA}images.{name}": value for name, value in self.teacher.state_dict().items()}
        return {**super().state_dict(), **means, **images}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore :meth:`state_dict`; between tasks :meth:`recall` must follow."""
        super().load_state_dict({name: value for name, value in state.items() if not name.startswith(_EXTRA)})
        extra = {name[len(_EXTRA) :]: value for name, value in state.items() if name.startswith(_EXTRA)}
        names = extra.pop("task_names", None)  # which states of earlier versions lack: recall brings them
        self.task_names = [] if names is None else json.loads(bytes(names.tolist()))
        count = sum(name.startswith("means.") for name in extra)
        self.means = [extra[f"means.{place}"].to(self.backbone.device, copy=True) for place in range(count)]
        images = {name[len("images.") :]: value for name, value in extra.items() if name.startswith("images.")}
        self.teacher.load_state_dict(images)
