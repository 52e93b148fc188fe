"""EWC: weights that earlier tasks depend on are held by springs as stiff as the dependence is strong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from cl_methods.backbone import Backbone
from cl_methods.checks import check_at_least, check_field, check_fraction
from cl_methods.components.fisher import fisher_diagonal
from cl_methods.components.host_weights import HostWeights
from cl_methods.components.weights import consolidation_value, fold_consolidation_gradient, snapshot
from cl_methods.datasets.task import Reference, Task
from cl_methods.methods.base import Batch, Facts
from cl_methods.methods.config import TrainConfig
from cl_methods.methods.finetune import FineTune

_FISHER = "ewc.fisher."


@dataclass(frozen=True)
class EWCConfig(TrainConfig):
    """Settings of :class:`TrainConfig` and of the consolidation. No settings were published for CLIP on MTIL.

    Attributes:
        strength: λ of ``λ/2 Σ F (θ − θ_start)²``.
        decay: factor on the Fisher information of earlier tasks when a new task's is added; 1 adds them all up.
        fisher_samples: images of a task from which its Fisher information is estimated, one backward pass each.
        fisher_labels: whether their labels are ``sampled`` from the model's answer or the ``true`` ones (empirical Fisher).
    """

    strength: float = 1000.0
    decay: float = 1.0
    fisher_samples: int = 512
    fisher_labels: Literal["sampled", "true"] = "sampled"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_field(self, "fisher_labels", ("sampled", "true"))
        check_at_least(self, 0, "strength")
        check_fraction(self, "decay")
        if self.fisher_samples < 1:
            raise ValueError(f"fisher_samples: expected a number of images >= 1, got {self.fisher_samples}")


class EWC(FineTune):
    """``L = L_CE + λ/2 Σ F (θ − θ_start)²`` with the diagonal Fisher information F of all earlier tasks.

    After each task ``F ← γ F + F_task``; the springs pull to the weights that the last task ended with, so that one F and no
    further copy of the model is stored between tasks (online EWC). The first task is plain fine-tuning. The gradient of
    the springs is added in closed form.

    Source: Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017, equation 3; with one anchor
    as in Schwarz et al., "Progress & Compress", ICML 2018, section 3.2 (Huszár, PNAS 2018, shows that one is right).
    """

    name: ClassVar[str] = "ewc"
    facts: ClassVar[Facts] = Facts(
        source="Kirkpatrick et al., PNAS 2017",
        trains="all of CLIP but the logit scale",
        carries="one importance per weight",
    )
    Config: ClassVar[type[TrainConfig]] = EWCConfig
    shards: ClassVar[bool] = False  # one backward pass for each image, dealt out to the processes
    config: EWCConfig

    def __init__(self, backbone: Backbone, config: EWCConfig, reference: Reference | None = None) -> None:
        super().__init__(backbone, config, reference)
        self.fisher: Mapping[str, Tensor] = {}
        self._start: Mapping[str, Tensor] = {}

    def before_task(self, index: int, task: Task) -> None:
        """Note where the springs pull to."""
        super().before_task(index, task)
        if self.fisher and self.offload_anchors:
            self.fisher = HostWeights(self.fisher, self.backbone.device)
            self._start = HostWeights(dict(self.trainable()), self.backbone.device)
        else:
            self._start = snapshot(self.trainable()) if self.fisher else {}

    def anchors(self) -> list[Mapping[str, Tensor]]:
        """Where the springs pull to, and how stiff they are."""
        return [self._start, self.fisher] if self._start else []

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """``{"loss", "cross_entropy", "consolidation"}``, the last already times λ/2; its gradient comes in :meth:`before_step`."""
        cross_entropy = super().loss(batch)["loss"]
        if not self._start:
            return {"loss": cross_entropy}
        value = 0.5 * self.config.strength * consolidation_value(self.trainable(), self._start, self.fisher)
        return {"loss": cross_entropy + value, "cross_entropy": cross_entropy, "consolidation": value}

    def before_step(self, batch: Batch) -> None:
        """Add the springs' gradient ``λ F (θ − θ_start)``."""
        super().before_step(batch)
        if self._start:
            fold_consolidation_gradient(self.trainable(), self._start, 0.5 * self.config.strength, self.fisher)

    def after_task(self, index: int, task: Task) -> None:
        """Estimate the task's Fisher information and add it to that of the earlier ones."""
        super().after_task(index, task)
        assert self._texts is not None
        config, self._start = self.config, {}
        learnt = fisher_diagonal(
            self.backbone,
            self.trainable(),
            task.train,
            self._texts,
            samples=config.fisher_samples,
            labels=config.fisher_labels,
        )
        for name, value in self.fisher.items():
            learnt[name].add_(value.to(learnt[name].device), alpha=config.decay)
        self.fisher = learnt

    def state_dict(self) -> dict[str, Tensor]:
        """The model under its own names; under ``ewc.fisher.`` the Fisher information once a task has been learnt."""
        return {**super().state_dict(), **{_FISHER + name: value for name, value in self.fisher.items()}}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore :meth:`state_dict`; a plain model state is one before the first task.

        Raises:
            RuntimeError: the Fisher information is not that of the trained parameters.
        """
        super().load_state_dict({name: value for name, value in state.items() if not name.startswith(_FISHER)})
        stored = {name[len(_FISHER) :]: value for name, value in state.items() if name.startswith(_FISHER)}
        shapes = {name: value.shape for name, value in self.trainable()}
        if stored and {name: value.shape for name, value in stored.items()} != shapes:
            raise RuntimeError("state: the Fisher information does not fit; was it stored with another backbone?")
        if stored and self._start and self.offload_anchors:
            self.fisher = HostWeights(stored, self.backbone.device)
        else:
            self.fisher = {name: value.to(self.backbone.device, copy=True) for name, value in stored.items()}
