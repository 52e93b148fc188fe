"""Muon in float32, all matrices of one shape at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """About U Vᵀ of each matrix U S Vᵀ in a batch (N, rows, columns), by a quintic Newton-Schulz iteration.

    Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024.
    """
    a, b, c = _COEFFICIENTS
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x / x.flatten(1).norm(dim=1)[:, None, None].clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Momentum whose step is orthogonalised: W ← W - lr · sqrt(max(1, rows / columns)) · orthogonalise(momentum).

    ``torch.optim.Muon`` iterates in bfloat16, one matrix after another, which is slow on a CPU.

    Args:
        params: tensors with at least two dimensions; more than two are flattened to (first, rest).
            A fused (3 w, w) attention projection is treated as three matrices.
        lr: size of the step.
        momentum: decay of the momentum (Nesterov).
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float = 0.02, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update every parameter from its gradient."""
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(momentum, group["momentum"]).flatten(1)
                weight = parameter.view(len(parameter), -1)
                pieces = 3 if weight.shape[0] == 3 * weight.shape[1] else 1
                for target, piece in zip(weight.chunk(pieces), update.chunk(pieces), strict=True):
                    by_shape[tuple(piece.shape)].append((target, piece))
            for (rows, columns), entries in by_shape.items():
                updates = orthogonalise(torch.stack([piece for _, piece in entries]))
                scale = max(1.0, rows / columns) ** 0.5
                for (target, _), update in zip(entries, updates, strict=True):
                    target.add_(update, alpha=-group["lr"] * scale)
