"""Calling a model to see what it computes, and leaving no trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

COUNTERS = ("choose_map_image", "choose_map_text")
"""Attributes, (E,), in which blocks of MoE-Adapters4CL count their activations."""


@contextmanager
def undisturbed(model: nn.Module, like: Tensor) -> Iterator[None]:
    """In evaluation mode, without gradients, from the same random numbers; modes, counts and torch's generators come back after.

    Args:
        model: what is going to be called.
        like: a parameter of it, any shape.
    """
    modes = [(module, module.training) for module in model.modules()]
    counts = [(vars(m)[name], vars(m)[name].clone()) for m in model.modules() for name in COUNTERS if name in vars(m)]
    try:
        model.eval()
        with torch.no_grad(), torch.random.fork_rng([like.device] if like.is_cuda else []):
            torch.manual_seed(0)
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for counter, value in counts:
            counter.copy_(value)
        for module in model.modules():
            for pending in vars(module).get("_pending", {}).values():
                pending.clear()


def relative_difference(a: Tensor, b: Tensor) -> float:
    """The largest difference of two tensors of the same shape over the largest magnitude; infinite for other shapes."""
    if a.shape != b.shape:
        return float("inf")
    return float((a - b).abs().max() / a.abs().max())
