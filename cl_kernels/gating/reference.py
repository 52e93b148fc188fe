"""Top-k gating in plain PyTorch: the definition."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NOISE_EPSILON = 0.01
"""Smallest standard deviation of the gating noise (Shazeer et al., 2017, as MoE-Adapters uses it)."""


def logits(x: Tensor, w_gate: Tensor, w_noise: Tensor | None, noise: Tensor | None) -> Tensor:
    """``x w_gate + noise ⊙ (softplus(x w_noise) + 0.01)``, (B, E), in fp64 for fp64 ``x`` and in fp32 otherwise."""
    compute = compute_dtype(x)
    x = x.to(compute)
    clean = x @ w_gate.to(compute)
    if w_noise is None or noise is None:
        return clean
    return clean + noise.to(compute) * (F.softplus(x @ w_noise.to(compute)) + NOISE_EPSILON)


def top_k_gating(
    x: Tensor, w_gate: Tensor, w_noise: Tensor | None, noise: Tensor | None, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`cl_kernels.top_k_gating`. The sort is stable: of equal logits the lower expert id wins, on every device."""
    experts = w_gate.shape[1]
    ordered, ids = torch.sort(logits(x, w_gate, w_noise, noise), dim=1, descending=True, stable=True)
    gates, expert_ids = torch.softmax(ordered[:, :k], dim=1), ids[:, :k].contiguous()
    return gates, expert_ids, count(expert_ids, experts)


def count(expert_ids: Tensor, experts: int) -> Tensor:
    """How often each expert was chosen, (E,) int64. A sum over a comparison: deterministic, and the host waits for nothing."""
    columns = torch.arange(experts, device=expert_ids.device)
    return (expert_ids.reshape(-1, 1) == columns).sum(0)


def compute_dtype(x: Tensor) -> torch.dtype:
    """fp64 for fp64 input, fp32 otherwise: 16-bit logits would make ties, and ties decide which expert is trained."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
