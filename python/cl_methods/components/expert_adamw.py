"""AdamW that treats the experts of a stacked tensor as parameters of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class ExpertAdamW(torch.optim.Optimizer):
    """AdamW on tensors (E, …) of which only some rows take part in a step.

    A row outside the mask keeps its weights, moments and step count to the bit, as a parameter without gradient does in
    :class:`torch.optim.AdamW`; each row counts its own steps for the bias correction. Tensors without a mask are updated as
    usual. Masks stay on the device: no host synchronisation.

    Args:
        parameters: all parameters.
        masks: parameter -> bool (E,) tensor that is read at every step; the owner writes it between steps.
        lr, betas, eps, weight_decay: as in AdamW (Loshchilov & Hutter, 2019).

    Raises:
        ValueError: a mask does not have one entry per row.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        masks: Mapping[nn.Parameter, Tensor],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        for parameter, mask in masks.items():
            if mask.dtype != torch.bool or mask.shape != parameter.shape[:1]:
                raise ValueError(
                    f"masks: expected bool ({parameter.shape[0]},) for a parameter {tuple(parameter.shape)}, "
                    f"got {mask.dtype} {tuple(mask.shape)}"
                )
        self._masks = dict(masks)
        super().__init__(list(parameters), {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient, row by row where it has a mask."""
        if closure is not None:
            raise ValueError("closure: not supported, expected None")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        mask = self._masks.get(parameter)
        if not state:
            state["step"] = torch.zeros(1 if mask is None else len(mask), device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        steps, mean, square = state["step"], state["exp_avg"], state["exp_avg_sq"]
        shape = (-1,) + (1,) * (parameter.ndim - 1)
        rows = torch.ones_like(steps, dtype=torch.bool) if mask is None else mask
        steps += rows
        # A rate of zero leaves a masked row's moments alone: lerp(m, g, 0) = m + 0 (g - m) = m for finite g.
        share = rows.view(shape).to(parameter.dtype)
        mean.lerp_(gradient, share * (1 - beta1))
        square.lerp_(gradient * gradient, share * (1 - beta2))
        counted = steps.double().clamp(min=1).view(shape)  # 1 - 0.999 in fp32 would be off by 5e-5
        denominator = (square / (1 - beta2**counted).to(square.dtype)).sqrt_().add_(group["eps"])
        update = (mean / (1 - beta1**counted).to(mean.dtype)).div_(denominator)
        if group["weight_decay"]:
            update.add_(parameter, alpha=group["weight_decay"])
        parameter.add_(torch.where(rows.view(shape), update, 0.0), alpha=-group["lr"])
