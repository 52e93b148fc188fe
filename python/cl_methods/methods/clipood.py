"""CLIPood: fine-tune the image tower against frozen texts, with margins between similar classes and a Beta moving average."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_kernels.nn import BetaWeights, WeightAverager
from cl_methods.backbone import Backbone
from cl_methods.checks import check_at_least
from cl_methods.datasets.task import Reference, Task
from cl_methods.methods.base import Batch, Facts, Method
from cl_methods.methods.config import TrainConfig

_AVERAGE, _TOWER = "average.", "visual."


@dataclass(frozen=True)
class CLIPoodConfig(TrainConfig):
    """Settings of :class:`TrainConfig`, of the margin and of the average; the published ones by default.

    Attributes:
        margin: λ, the margin between classes whose names have nothing in common, as a difference of cosines.
        beta: β of the average's weights: below 1, first and last weights of a task count most; 1 is the plain mean.
    """

    lr: float = 5e-6
    iterations: int = 5000
    batch_size: int = 36
    warmup: int = 0
    label_smoothing: float = 0.0
    weight_decay: float = 0.1
    margin: float = 0.3
    beta: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 0, "margin")
        if not self.beta > 0:
            raise ValueError(f"beta: expected a number > 0, got {self.beta}")


def margin_logits(features: Tensor, texts: Tensor, labels: Tensor, margin: float, scale: float) -> Tensor:
    """``z_c = s (f − λ t_y)·t_c``: the true class y has to win over class c by a margin of ``s λ (1 − t_y·t_c)``.

    The less similar two class names are, the further apart their images have to be.

    Args:
        features: (B, d) normalised image features f.
        texts: (C, d) normalised text features t.
        labels: (B,) int64, y.
        margin: λ.
        scale: s.

    Returns:
        (B, C), differentiable in ``features``.
    """
    return scale * (features - margin * texts[labels]) @ texts.T


class CLIPood(Method):
    """``L = CE(s (f − λ t_y) Tᵀ, y)`` over the image tower; a task ends with ``θ̄ = Σ_k w_k θ_k / Σ_k w_k`` over all its steps.

    The text tower stays as it is, so the class texts T (C, d) are encoded once. ``w_k`` is the density of Beta(β, β) at
    ``(k + ½) / (K + 1)`` for the weights θ_k after k of K steps: start and end count most. Weights train in their own
    precision and the average is kept in float32; the model is in evaluation mode throughout, which holds every statistic of
    its normalisation layers. CLIPood knows one task; here every task starts from the average that the last one ended with.

    Source: Shu et al., "CLIPood: generalizing CLIP to out-of-distributions", ICML 2023, "margin metric softmax" and "Beta moving
    average".
    """

    name: ClassVar[str] = "clipood"
    facts: ClassVar[Facts] = Facts(
        source="Shu et al., ICML 2023",
        trains="the image tower",
        carries="nothing",
    )
    Config: ClassVar[type[TrainConfig]] = CLIPoodConfig
    config: CLIPoodConfig

    def __init__(self, backbone: Backbone, config: CLIPoodConfig, reference: Reference | None = None) -> None:
        super().__init__(backbone, config, reference)
        backbone.model.requires_grad_(False)
        self.average: WeightAverager | None = None
        self._texts: Tensor | None = None
        self._scale = float(backbone.logit_scale)

    def before_task(self, index: int, task: Task) -> None:
        """Encode the class texts, and begin a new average with the weights as they are."""
        super().before_task(index, task)
        self.backbone.model.eval()
        self.backbone.model.visual.requires_grad_(True)
        with torch.no_grad():
            self._texts = self.backbone.encode_texts(self.training_texts(task), trimmed=True)
        self.average = self._new_average(self.steps(task))

    def _new_average(self, steps: int) -> WeightAverager:
        beta = BetaWeights(self.config.beta, steps + 1)
        return WeightAverager(self.backbone.model.visual, beta=beta, on_host=self.offload_averages)

    def averaged_weights(self) -> dict[str, Tensor]:
        """The Beta moving average."""
        return {} if self.average is None else self.average.tensors

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """The image tower."""
        return [(_TOWER + name, value) for name, value in self.backbone.model.visual.named_parameters()]

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """``{"loss"}``: the cross-entropy with margins.

        Raises:
            RuntimeError: ``before_task`` has not been called.
        """
        if self._texts is None:
            raise RuntimeError("clipood: call before_task before the first step")
        features = self.backbone.encode_images(batch.images)
        logits = margin_logits(features, self._texts, batch.labels, self.config.margin, self._scale)
        return {"loss": F.cross_entropy(logits, batch.labels, label_smoothing=self.config.label_smoothing)}

    def after_step(self, step: int) -> None:
        """Take the new weights into the average."""
        super().after_step(step)
        assert self.average is not None
        self.average.update(self.backbone.model.visual)

    def after_task(self, index: int, task: Task) -> None:
        """Go on with the average."""
        super().after_task(index, task)
        assert self.average is not None
        self.average.copy_to(self.backbone.model.visual)
        self.average, self._texts = None, None
        self.backbone.model.requires_grad_(False)

    def forget_classifiers(self) -> None:
        """Nothing to forget: the text tower is frozen, so class embeddings stay what they are."""

    def state_dict(self) -> dict[str, Tensor]:
        """The image tower under ``visual.``; within a task the average under ``average.``. The text tower never changes."""
        state = {_TOWER + name: value for name, value in self.backbone.model.visual.state_dict().items()}
        if self.average is not None:
            progress = self.average.state_dict()
            state.update({f"{_AVERAGE}tensors.{name}": value for name, value in progress["tensors"].items()})
            numbers = [progress[name] for name in ("snapshots", "moves", "mass")]
            state[f"{_AVERAGE}progress"] = torch.tensor(numbers, dtype=torch.float64)
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore :meth:`state_dict`; a state with an average is one inside a task, for after its ``before_task``.

        Raises:
            RuntimeError: the state is not one of this method, or of another backbone.
        """
        unknown = [name for name in state if not name.startswith((_TOWER, _AVERAGE))]
        if unknown:
            raise RuntimeError(f"state: {unknown[0]!r} is no tensor of clipood")
        tower = {name[len(_TOWER) :]: value for name, value in state.items() if name.startswith(_TOWER)}
        self.backbone.model.visual.load_state_dict(tower)
        if f"{_AVERAGE}progress" not in state:
            return
        if self.average is None:
            raise RuntimeError("state: it is one from inside a task; call before_task first")
        snapshots, moves, mass = state[f"{_AVERAGE}progress"].tolist()
        prefix = f"{_AVERAGE}tensors."
        tensors = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
        fresh = self.average.state_dict()
        self.average.load_state_dict(
            {**fresh, "tensors": tensors, "snapshots": int(snapshots), "moves": int(moves), "mass": mass}
        )
