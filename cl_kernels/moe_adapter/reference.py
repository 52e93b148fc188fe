"""Mixture-of-adapters in plain PyTorch: the definition, and what runs where there is no kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_kernels.moe_adapter import dropout


def moe_adapter(
    x: Tensor,  # (B, L, D)
    expert_ids: Tensor,  # (B, k) int64
    gates: Tensor,  # (B, k)
    down_weight: Tensor,  # (E, R, D)
    down_bias: Tensor,  # (E, R)
    up_weight: Tensor,  # (E, D, R)
    up_bias: Tensor,  # (E, D)
    residual: Tensor | None,  # (B, L, D)
    seed: Tensor | None,  # () or (2,), see dropout.seed_of_part
    scale: float,
    dropout_p: float,
) -> Tensor:
    """``residual + Σ_j gates_j · scale · (dropout(relu(x W_down[e_j]ᵀ + b_down[e_j])) W_up[e_j]ᵀ + b_up[e_j])``, (B, L, D).

    Expert by expert over the samples that chose it, so that memory stays within a few times ``x`` however many experts there are.
    """
    (_, length, _), (slots, rank) = x.shape, (expert_ids.shape[1], down_weight.shape[1])
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = torch.zeros(x.shape, dtype=compute, device=x.device) if residual is None else residual.to(compute, copy=True)
    token = torch.arange(length, device=x.device)
    experts = zip(down_weight.unbind(0), down_bias.unbind(0), up_weight.unbind(0), up_bias.unbind(0), strict=True)
    for e, (w_down, b_down, w_up, b_up) in enumerate(experts):
        sample, slot = (expert_ids == e).nonzero(as_tuple=True)
        hidden = F.relu(F.linear(x[sample], w_down, b_down))
        if dropout_p > 0.0:
            if seed is None:
                raise ValueError(f"seed: got None with dropout_p {dropout_p}, expected an int64 scalar")
            row = ((sample + seed[1] if seed.dim() else sample) * slots + slot)[:, None] * length + token
            hidden = hidden * dropout.keep(seed[0] if seed.dim() else seed, row, rank, dropout_p) / (1.0 - dropout_p)
        expert = F.linear(hidden, w_up, b_up).to(compute)
        out.index_add_(0, sample, gates[sample, slot, None, None] * scale * expert)
    return out.to(x.dtype)
