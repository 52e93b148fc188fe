"""``torch.optim.swa_utils.AveragedModel``: its running and exponential means in one pass over the model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import swa_utils

from cl_kernels.drop_in.patch import Patch
from cl_kernels.weight_average import average_


class _Average:
    """A ``multi_avg_fn``: the mean's weight is ``1 / (n + 1)``, or ``1 − decay``."""

    def __init__(self, decay: float | None) -> None:
        self.decay = decay

    def __call__(self, averages: list[Tensor], values: list[Tensor], n: Tensor | int) -> None:
        if not averages[0].is_floating_point():  # integer buffers, which are averaged with use_buffers=True
            single = swa_utils.get_swa_avg_fn() if self.decay is None else swa_utils.get_ema_avg_fn(self.decay)
            for average, value in zip(averages, values, strict=True):
                average.copy_(single(average, value, n))
            return
        average_(averages, values, 1 / (int(n) + 1) if self.decay is None else 1 - self.decay)


def patch_averaged_model(averaged: torch.nn.Module) -> Patch:
    """Let an ``AveragedModel`` update its mean in place with one operation, ``a ← a + w · (v − a)``.

    Serves the default (a running mean), and what ``get_swa_avg_fn``, ``get_swa_multi_avg_fn``, ``get_ema_avg_fn`` and
    ``get_ema_multi_avg_fn`` return. ``update_parameters`` stays torch's own; the patch only sets ``multi_avg_fn``.

    Args:
        averaged: an instance of ``torch.optim.swa_utils.AveragedModel``.

    Returns:
        The patch: ``replaced`` is ``["multi_avg_fn"]``.

    Raises:
        ValueError: the model averages by a function of the user's.
        TypeError: ``averaged`` is not an ``AveragedModel``.

    Source: Izmailov et al., 2018 (running mean).
    """
    if not isinstance(averaged, swa_utils.AveragedModel):
        raise TypeError(f"averaged: got {type(averaged).__name__}, expected torch.optim.swa_utils.AveragedModel")
    patch = Patch("patch_averaged_model")
    function: Any = averaged.multi_avg_fn or averaged.avg_fn
    decay = _decay(function)
    if isinstance(function, _Average):
        patch.left["multi_avg_fn"] = "already patched"
    elif isinstance(decay, str):
        patch.left["avg_fn" if averaged.multi_avg_fn is None else "multi_avg_fn"] = decay
    else:
        patch.change_attribute("multi_avg_fn", averaged, "multi_avg_fn", _Average(decay))
    return patch.require("an average of torch.optim.swa_utils' own")


def _decay(function: Callable | None) -> float | str | None:
    """None for a running mean, the decay of an exponential one, or why neither."""
    if function is None:
        return None
    code = _code(function)
    if code in (_code(swa_utils.get_swa_avg_fn()), _code(swa_utils.get_swa_multi_avg_fn())):
        return None
    if code in (_code(swa_utils.get_ema_avg_fn()), _code(swa_utils.get_ema_multi_avg_fn())):
        return inspect.getclosurevars(inspect.unwrap(function)).nonlocals["decay"]
    return f"{getattr(function, '__qualname__', function)} is not a function of torch.optim.swa_utils"


def _code(function: Callable) -> Any:
    return getattr(inspect.unwrap(function), "__code__", None)
