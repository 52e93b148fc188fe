"""AdamW that treats the experts of a stacked tensor as parameters of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_BUCKET = 1 << 22


class ExpertAdamW(torch.optim.Optimizer):
    """AdamW on tensors (E, …) of which only some rows take part in a step.

    A row outside the mask keeps its weights, moments and step count to the bit, as a parameter without gradient does in
    :class:`torch.optim.AdamW`; each row counts its own steps for the bias correction. Tensors without a mask are updated as
    usual. On a GPU masks stay there: no host synchronisation. On a CPU they are read, and the rows outside are not touched.

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
        self._masks: dict[Tensor, Tensor] = dict(masks.items())
        super().__init__(list(parameters), {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient, row by row where it has a mask."""
        if closure is not None:
            raise ValueError("closure: not supported, expected None")
        for group in self.param_groups:
            parameters = [value for value in group["params"] if value.grad is not None]
            if all(_readable(value) for value in parameters):
                self._update_rows(parameters, group)
                continue
            first = 0
            factors = self._factors(parameters, group) if parameters else []
            for bucket in _buckets(parameters):
                last = first + len(bucket)
                self._update(bucket, [some[first:last] for some in factors], group)
                first = last

    def _update_rows(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        """The rows that take part, each as a parameter of torch's AdamW: one pass over weights, gradients and moments."""
        rows: list[tuple[Tensor, ...]] = []
        for value in parameters:
            state, mask = self._state_of(value), self._masks.get(value)
            assert value.grad is not None
            parts = value, value.grad, state["exp_avg"], state["exp_avg_sq"], state["step"]
            if mask is None or type(mask) is not Tensor or mask.is_meta:  # of tensors without data all rows take part
                rows.append(parts)
            else:
                slices = zip(*map(Tensor.unbind, parts), strict=True)
                rows += [row for row, takes in zip(slices, mask.tolist(), strict=True) if takes]
        if not rows:
            return
        values, gradients, means, squares, steps = (list(column) for column in zip(*rows, strict=True))
        torch._foreach_add_(steps, 1)
        beta1, beta2 = group["betas"]
        rates = {"lr": group["lr"], "beta1": beta1, "beta2": beta2, "weight_decay": group["weight_decay"]}
        torch._fused_adamw_(
            values, gradients, means, squares, [], steps, **rates, eps=group["eps"], amsgrad=False, maximize=False
        )

    def _factors(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> list[list[Tensor]]:
        """Count the step; then what multiplies the rows of every parameter, from one flat tensor for all of them.

        Returns:
            Rates of both averages, the bias corrections of the squares and of the mean, and one or zero for taking part;
            of each a tensor (rows, 1, …) per parameter.
        """
        beta1, beta2 = group["betas"]
        steps = [self._state_of(value)["step"] for value in parameters]
        sizes = [len(step) for step in steps]
        whole = torch.ones(1, dtype=torch.bool, device=steps[0].device)  # a parameter without a mask is one row
        rows = torch.cat([self._masks.get(value, whole) for value in parameters]).to(steps[0].dtype)
        torch._foreach_add_(steps, rows.split(sizes))
        counted = torch.cat(steps).double().clamp_(min=1)  # 1 - 0.999 in fp32 would be off by 5e-5
        single = torch.float64 if parameters[0].dtype == torch.float64 else torch.float32
        corrections = [(1 - beta**counted).to(single) for beta in (beta2, beta1)]
        # A rate of zero leaves a masked row's moments alone: lerp(m, g, 0) = m + 0 (g - m) = m for finite g.
        return [
            [
                part.view((-1,) + (1,) * (value.ndim - 1)).to(value.dtype)
                for part, value in zip(flat.split(sizes), parameters, strict=True)
            ]
            for flat in (rows * (1 - beta1), rows * (1 - beta2), *corrections, rows)
        ]

    def _update(self, parameters: list[Tensor], factors: list[list[Tensor]], group: dict[str, Any]) -> None:
        """Some parameters at once: one operation for each line of AdamW, not one for each line and parameter."""
        mean_rates, square_rates, square_corrections, mean_corrections, rows = factors
        gradients = [value.grad for value in parameters if value.grad is not None]
        states = [self._state_of(value) for value in parameters]
        means, squares = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
        torch._foreach_lerp_(means, gradients, mean_rates)
        torch._foreach_lerp_(squares, torch._foreach_mul(gradients, gradients), square_rates)
        denominators = torch._foreach_div(squares, square_corrections)
        torch._foreach_sqrt_(denominators)
        torch._foreach_add_(denominators, group["eps"])
        updates = torch._foreach_div(means, mean_corrections)
        torch._foreach_div_(updates, denominators)
        del denominators
        if group["weight_decay"]:
            torch._foreach_add_(updates, parameters, alpha=group["weight_decay"])
        torch._foreach_addcmul_(parameters, updates, rows, value=-group["lr"])

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state, mask = self.state[parameter], self._masks.get(parameter)
        if not state:
            state["step"] = torch.zeros(1 if mask is None else len(mask), device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        return state


def _readable(value: Tensor) -> bool:
    """Whether masks beside ``value`` can be read without waiting: it lies on the host, or stands for what does."""
    return value.device.type in ("cpu", "meta") and not hasattr(value, "device_mesh")


def _buckets(parameters: list[nn.Parameter]) -> Iterator[list[Tensor]]:
    """Parameters in lists of at most about 4 million scalars, which bounds temporary memory; cuts depend on sizes only."""
    found: list[Tensor] = []
    size = 0
    for value in parameters:
        if found and size + value.numel() > _BUCKET:
            yield found
            found, size = [], 0
        found.append(value)
        size += value.numel()
    if found:
        yield found
