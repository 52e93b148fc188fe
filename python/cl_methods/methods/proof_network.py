"""What PROOF adds to CLIP: projections that add up over tasks, context prompts, a fusion and a logit scale."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_methods.components.cross_modal_fusion import CrossModalFusion


class SummedProjection(nn.Module):
    """``P(x) = Σ_i (W_i x + b_i)`` over the projections of all tasks so far, as two matrices: those before, and the newest.

    A sum of linear maps is a linear map, so the work and the memory do not grow with the number of tasks.

    Attributes:
        frozen_weight (D, D), frozen_bias (D,): sum of the earlier projections.
        weight (D, D), bias (D,): the one that trains; or the sum of all where all of them train.
        projections: how many there are.

    Source: Zhou et al., PROOF, TPAMI 2025.
    """

    frozen_weight: Tensor
    frozen_bias: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("frozen_weight", torch.zeros(width, width))
        self.register_buffer("frozen_bias", torch.zeros(width))
        self.weight, self.bias = nn.Parameter(torch.zeros(width, width)), nn.Parameter(torch.zeros(width))
        self.projections = 0

    @torch.no_grad()
    def extend(self, *, train_all: bool = False) -> None:
        """Add a projection with the initialisation of ``nn.Linear``, drawn on the CPU.

        Args:
            train_all: go on training the earlier ones. They all have the same gradient, so their sum can stand for them: with r
                times the learning rate and 1/r of the weight decay, SGD with momentum and AdamW move the sum exactly as
                they would move r projections.
        """
        fresh = nn.Linear(self.weight.shape[1], self.weight.shape[0])
        if train_all:
            self.weight.add_(self.frozen_weight).add_(fresh.weight.to(self.weight))
            self.bias.add_(self.frozen_bias).add_(fresh.bias.to(self.bias))
            self.frozen_weight.zero_()
            self.frozen_bias.zero_()
        else:
            self.frozen_weight.add_(self.weight)
            self.frozen_bias.add_(self.bias)
            self.weight.copy_(fresh.weight)
            self.bias.copy_(fresh.bias)
        self.projections += 1

    def forward(self, x: Tensor) -> Tensor:
        """Sum of the projections of ``x`` (..., D), not normalised."""
        return F.linear(x, self.frozen_weight + self.weight, self.frozen_bias + self.bias)


class ProofNetwork(nn.Module):
    """All that PROOF adds to CLIP: two summed projections, the fusion, the prompts and a logit scale.

    Attributes:
        image, text: :class:`SummedProjection` of D features.
        fusion: :class:`~cl_methods.components.cross_modal_fusion.CrossModalFusion`.
        prompts (K, D), frozen_prompts (K', D): the newest task's context prompts, and those of earlier tasks.
        log_scale: of the contrastive loss, a scalar.
    """

    frozen_prompts: Tensor

    def __init__(self, width: int, dropout: float, log_scale: float) -> None:
        super().__init__()
        self.image, self.text = SummedProjection(width), SummedProjection(width)
        self.fusion = CrossModalFusion(width, dropout)
        self.prompts = nn.Parameter(torch.zeros(0, width))
        self.register_buffer("frozen_prompts", torch.zeros(0, width))
        self.log_scale = nn.Parameter(torch.tensor(log_scale))

    def extend(self, prompts: int, *, train_old_texts: bool) -> None:
        """Room for a task: one projection per modality and ``prompts`` prompts ~ N(0, 1); what was there is frozen."""
        self.image.extend()
        self.text.extend(train_all=train_old_texts)
        self.frozen_prompts = torch.cat([self.frozen_prompts, self.prompts.detach()])
        self.prompts = nn.Parameter(torch.randn(prompts, self.prompts.shape[1]).to(self.prompts.device))

    def context(self) -> Tensor:
        """All prompts (K' + K, D)."""
        return torch.cat([self.frozen_prompts, self.prompts])

    def state(self) -> dict[str, Tensor]:
        """Every tensor, and ``projections``, their number."""
        return {**self.state_dict(), "projections": torch.tensor(self.image.projections)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore :meth:`state`, whatever the number of prompts now is.

        Raises:
            RuntimeError: names or widths are others.
        """
        tensors = dict(state)
        self.image.projections = self.text.projections = int(tensors.pop("projections"))
        self.prompts = nn.Parameter(torch.zeros_like(tensors["prompts"], device=self.prompts.device))
        self.frozen_prompts = torch.zeros_like(tensors["frozen_prompts"], device=self.prompts.device)
        self.load_state_dict(tensors)
