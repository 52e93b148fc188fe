"""QuickGELU, the activation of OpenAI's weights, with half of the memory."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cl_methods import lazy_open_clip

_SLOPE = 1.702


def quick_gelu(x: Tensor) -> Tensor:
    """``x σ(1.702 x)``, the bits of open_clip's module; autograd keeps ``x`` alone, and not the sigmoid beside it.

    Args:
        x: any shape; differentiable once.
    """
    return _QuickGELU.apply(x)


class _QuickGELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.sigmoid(_SLOPE * x).mul_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad, _SLOPE * x)  # of silu(1.702 x) / 1.702


def fuse_quick_gelu(model: nn.Module) -> None:
    """Let open_clip's QuickGELU modules inside ``model`` run as :func:`quick_gelu` wherever gradients are recorded.

    Nothing but the ``forward`` of these instances changes; copies of the model are like it.
    """
    for module in model.modules():
        if type(module) is lazy_open_clip.transformer.QuickGELU:
            module.forward = partial(_forward, module)  # type: ignore[method-assign]


def separate_quick_gelu(model: nn.Module) -> None:
    """Undo :func:`fuse_quick_gelu`."""
    for module in model.modules():
        if type(module) is lazy_open_clip.transformer.QuickGELU:
            vars(module).pop("forward", None)


def _forward(module: nn.Module, x: Tensor) -> Tensor:
    return quick_gelu(x) if torch.is_grad_enabled() else type(module).forward(module, x)
