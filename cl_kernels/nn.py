"""Modules around the operations: a mixture of adapters with its routers, the distillation loss, an average of a model's weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from cl_kernels.averager import BetaWeights, WeightAverager
from cl_kernels.distill_kl import distill_kl
from cl_kernels.routed import routed_adapter

__all__ = ["AdapterExperts", "BetaWeights", "DistillKL", "MoEAdapter", "WeightAverager"]


class AdapterExperts(nn.Module):
    """The experts of a mixture of adapters, ``A_e(x) = dropout(relu(x W_down[e]ᵀ + b_down[e])) W_up[e]ᵀ + b_up[e]``.

    Experts start as zero functions: ``W_down`` Kaiming-uniform with a = √5, the rest 0. Routers belong to whoever mixes them.

    Attributes:
        down_weight (E, R, D), down_bias (E, R), up_weight (E, D, R), up_bias (E, D): the experts.
        usage: (E,) int64, a count for whoever mixes them.

    Args:
        width: D, the tokens' features.
        experts: E.
        bottleneck: R.
        k: experts per sample.
        scale: factor on every expert's output.
        dropout: probability of zeroing a bottleneck element in training.

    Raises:
        ValueError: k is not in 1 … experts.

    Source: MoE-Adapters (Yu et al., CVPR 2024), section 3.2 and its public code for the initial values.
    """

    usage: Tensor

    def __init__(self, width: int, experts: int, bottleneck: int, k: int, scale: float, dropout: float) -> None:
        super().__init__()
        if not 1 <= k <= experts:
            raise ValueError(f"k: got {k}, expected 1 to {experts} experts")
        self.k, self.scale, self.dropout = k, scale, dropout
        bound = 1 / math.sqrt(width)  # what Kaiming-uniform with a = √5 comes to
        self.down_weight = nn.Parameter(torch.empty(experts, bottleneck, width).uniform_(-bound, bound))
        self.down_bias = nn.Parameter(torch.zeros(experts, bottleneck))
        self.up_weight = nn.Parameter(torch.zeros(experts, width, bottleneck))
        self.up_bias = nn.Parameter(torch.zeros(experts, width))
        self.register_buffer("usage", torch.zeros(experts, dtype=torch.int64))

    @property
    def experts(self) -> list[nn.Parameter]:
        """The four stacked tensors, experts along dimension 0."""
        return [self.down_weight, self.down_bias, self.up_weight, self.up_bias]

    def mix(
        self,
        x: Tensor,
        residual: Tensor | None,
        w_gate: Tensor,
        w_noise: Tensor,
        *,
        training: bool,
        noisy: bool,
        noise: Tensor | None = None,
        add_input: bool = False,
        seed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``residual + Σ_{e ∈ top-k} g_e · scale · A_e(x)`` with the experts that a router chooses from token 0 of each sample.

        Differentiable in ``x``, ``residual``, the router and the experts. The host never waits for the device.

        Args:
            x: (B, L, D) tokens of each sample.
            residual: (B, L, D), what the output is added to, or None.
            w_gate, w_noise: (D, E) the router.
            training: whether dropout is on.
            noisy: whether the gates are noisy.
            noise: (B, E) standard normal for noisy gates; drawn when None.
            add_input: whether ``x`` is added to the residual too.
            seed: of the dropout, see :func:`~cl_kernels.routed.routed_adapter`; drawn when None.

        Returns:
            The mixture (B, L, D), and how many samples chose each expert (E,) int64.

        Raises:
            ValueError: shapes do not fit.
        """
        if noisy and noise is None:
            noise = torch.randn(len(x), w_gate.shape[1], dtype=x.dtype, device=x.device)
        drawn: dict[str, Any] = {} if seed is None else {"seed": seed}
        return routed_adapter(
            x,
            w_gate,
            w_noise if noisy else None,
            *self.experts,
            k=self.k,
            noise=noise if noisy else None,
            scale=self.scale,
            dropout_p=self.dropout if training else 0.0,
            residual=residual,
            add_input=add_input,
            **drawn,
        )


class MoEAdapter(AdapterExperts):
    """A mixture of adapters with one router per task: ``residual + Σ_{e ∈ top-k} g_e · scale · A_e(x)``.

    The router reads token 0 of a sample, whose experts then serve all of its tokens. Routers start at zero. In training mode gates
    are noisy, dropout is on, and :attr:`usage` counts how often each expert was chosen.

    Args:
        width: D, the tokens' features.
        experts: E.
        bottleneck: R.
        k: experts per sample.
        scale: factor on every expert's output.
        dropout: probability of zeroing a bottleneck element in training.
        routers: number of tasks.

    Raises:
        ValueError: k is not in 1 … experts.

    Source: MoE-Adapters (Yu et al., CVPR 2024), section 3.2.
    """

    def __init__(
        self,
        width: int,
        experts: int,
        *,
        bottleneck: int = 64,
        k: int = 2,
        scale: float = 0.1,
        dropout: float = 0.1,
        routers: int = 1,
    ) -> None:
        super().__init__(width, experts, bottleneck, k, scale, dropout)
        self.w_gate = nn.Parameter(torch.zeros(routers, width, experts))
        self.w_noise = nn.Parameter(torch.zeros(routers, width, experts))

    def forward(self, x: Tensor, residual: Tensor | None = None, *, task: int = 0) -> Tensor:
        """The adapters' output for ``x`` (B, L, D), added to ``residual`` (B, L, D) if given; the shape of ``x``.

        Args:
            x: tokens of each sample.
            residual: what the output is added to.
            task: which router.

        Raises:
            ValueError: shapes do not fit.
            IndexError: there is no such router.
        """
        training = self.training
        out, usage = self.mix(x, residual, self.w_gate[task], self.w_noise[task], training=training, noisy=training)
        if training:
            self.usage += usage
        return out


class DistillKL(nn.Module):
    """:func:`cl_kernels.distill_kl` with its options fixed: ``T² · mean Σ_j −p_t[j] log p_s[j]``, ``p = softmax(logits / T)``.

    Args:
        temperature: ``T > 0``.
        dim: the dimension of the softmax.
        target: ``"cross_entropy"`` or ``"kl"``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Source: Hinton et al., 2015; ZSCL (Zheng et al., 2023), section 3.2.
    """

    def __init__(
        self, temperature: float = 2.0, *, dim: int = -1, target: str = "cross_entropy", reduction: str = "mean"
    ) -> None:
        super().__init__()
        self.temperature, self.dim, self.target, self.reduction = temperature, dim, target, reduction

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        """The loss of two tensors of the same shape such as (N, M), differentiable in the student's.

        Args:
            student_logits: any shape.
            teacher_logits: the same shape.
            sample_weight: broadcasts to the shape without ``dim``.

        Raises:
            ValueError: shapes or options do not fit.
            TypeError: a tensor is not floating point.
        """
        return distill_kl(
            student_logits,
            teacher_logits,
            temperature=self.temperature,
            dim=self.dim,
            target=self.target,
            sample_weight=sample_weight,
            reduction=self.reduction,
        )
