"""An optimiser that keeps its state, and takes its steps, on the host."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class HostOptimizer(torch.optim.Optimizer):
    """The steps of an optimiser, taken on the host: weights and gradients are copied there, new weights back.

    The device holds none of the state. Gradients are fetched when the step is taken, not in the backward pass, because what has a
    closed form is added to them in between. State dicts are those of the optimiser itself, so that checkpoints
    with and without this fit each other.

    Args:
        optimizer: AdamW, Adam or SGD, which has not taken a step; it is taken over.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._host = optimizer
        self._buffers: dict[Tensor, Tensor] = {}
        groups = [dict(group) for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["params"] = [self._copy_of(value) for value in group["params"]]
            group["fused"], group["foreach"] = True, False  # one pass over weight, gradient and state
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient.

        Raises:
            ValueError: there is a closure.
        """
        if closure is not None:
            raise ValueError("closure: not supported, expected None")
        moved: list[tuple[Tensor, Tensor]] = []
        for group, host_group in zip(self.param_groups, self._host.param_groups, strict=True):
            own = {"params": host_group["params"], "fused": True, "foreach": False}
            host_group.update({**group, **own})
            for value, copy in zip(group["params"], host_group["params"], strict=True):
                copy.grad = None if value.grad is None else self._buffer_of(copy)
                if value.grad is not None:
                    copy.grad.copy_(value.grad, non_blocking=True)
                    copy.copy_(value, non_blocking=True)  # averaging may have moved it since the last step
                    moved.append((value, copy))
        for device in {value.device for value, _ in moved if value.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
        self._host.step()
        for value, copy in moved:
            value.copy_(copy, non_blocking=True)

    def state_dict(self) -> dict[str, Any]:
        """That of the optimiser itself."""
        state = self._host.state_dict()
        groups = [
            {**group, "fused": own["fused"], "foreach": own["foreach"]}
            for group, own in zip(state["param_groups"], self.param_groups, strict=True)
        ]
        return {**state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`, also one of the same optimiser beside its weights."""
        self._host.load_state_dict(state_dict)

    def _copy_of(self, value: Tensor) -> nn.Parameter:
        return nn.Parameter(torch.empty_like(value, device="cpu", pin_memory=value.is_cuda))

    def _buffer_of(self, copy: Tensor) -> Tensor:
        if copy not in self._buffers:
            self._buffers[copy] = torch.empty_like(copy, pin_memory=copy.is_pinned())
        return self._buffers[copy]
