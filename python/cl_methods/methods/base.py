"""What a continual-learning method must say: what trains, its loss and hooks, how it classifies, what it carries."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from cl_methods.scenarios.base import Reference, Task

if TYPE_CHECKING:
    from cl_methods.backbone import Backbone


@dataclass(frozen=True)
class Batch:
    """One optimiser step's data, already transformed and on the device.

    Attributes:
        images: (B, 3, H, W) of the current task, training transform.
        labels: (B,) int64.
        reference_images: (B_ref, 3, H, W), evaluation transform; None unless the method asks for them.
        step: 0-based optimiser step within the task.
        reference_indices: (B_ref,) int64 positions in the reference set, by which frozen features can be cached.
        task: the task that the images and labels come from; None where it can only be the current one.
    """

    images: Tensor
    labels: Tensor
    step: int
    reference_images: Tensor | None = None
    reference_indices: Tensor | None = None
    task: Task | None = None


class Method(ABC):
    """A continual-learning method over one backbone; the training loop calls the hooks below in this order.

    ``before_task`` → every step: ``loss`` → backward → ``before_step`` → optimiser → ``after_step`` → ``after_task``.
    Random numbers come from torch's global generators, which the loop seeds per step, so a resumed run repeats them.

    Attributes:
        name: by which the command line and the reports know the method.
        uses_reference: batches carry reference images.
        trains: False for methods that only evaluate.
        config: has ``lr``, ``iterations``, ``warmup``, ``batch_size`` and, if ``uses_reference``, may have
            ``reference_batch_size`` (default: ``batch_size``).
        joint: trained once on all tasks together (an upper bound, not continual): ``before_task`` and ``after_task``
            are called for the first task only, every batch names its task, and step t draws from task ``t mod T``.
    """

    name: ClassVar[str]
    uses_reference: ClassVar[bool] = False
    trains: ClassVar[bool] = True
    joint: ClassVar[bool] = False

    def __init__(self, backbone: Backbone, config: Any, reference: Reference | None = None) -> None:
        self.backbone, self.config, self.reference = backbone, config, reference

    def before_task(self, index: int, task: Task) -> None:  # noqa: B027
        """Prepare for training on ``task``, the ``index``-th (0-based) of the sequence."""

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

    def learning_rate(self, task: Task) -> float:
        """Peak learning rate for ``task``; the configuration's ``lr`` unless a method has rates per dataset."""
        return self.config.lr

    @abstractmethod
    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Scalar terms of the loss; ``"loss"`` is the one to differentiate, the rest is for the log."""

    def before_step(self, batch: Batch) -> None:  # noqa: B027
        """Between backward and the optimiser step: the place for gradients that have a closed form."""

    def after_step(self, step: int) -> None:  # noqa: B027
        """After the optimiser step with 0-based index ``step``."""

    def after_task(self, index: int, task: Task) -> None:  # noqa: B027
        """Turn what was trained into what is evaluated and carried on."""

    def before_evaluation(self) -> None:
        """Before images are scored, whenever weights may have changed: evaluation mode, and no stale cached features.

        Until the next training step weights do not change, so :meth:`logits` may encode each task's prompts once.
        """
        self.backbone.model.eval()

    @abstractmethod
    def logits(self, images: Tensor, task: Task) -> Tensor:
        """(B, classes of ``task``) scores of evaluation images.

        ``task`` gives the label space only; its identity must not reach a router.
        """

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor that a later task or an evaluation needs; also valid in the middle of a task."""
        return dict(self.backbone.model.state_dict())

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore :meth:`state_dict` in a new instance: between tasks, or inside one after its ``before_task``."""
        self.backbone.model.load_state_dict(state)
