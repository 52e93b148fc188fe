"""ZSCL (github.com/Thunderbeee/ZSCL) and what was forked from it: the functions of its helper modules."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from cl_kernels.drop_in.distillation import distillation as mean_distillation
from cl_kernels.drop_in.patch import Patch
from cl_kernels.drop_in.storage import own_storage
from cl_kernels.squared_distance import compiled, squared_distance
from cl_kernels.weight_average import average_, blend_


def patch_zscl(helpers_module: ModuleType, *, differentiate_teacher: bool = True) -> Patch:
    """Run ``distillation``, ``merge_we``, ``wise_we``, ``moving_avg`` and ``l2_loss`` of this module through the kernels.

    Signatures, results and their dtypes stay; averages are computed in fp32 from the same formulas. Models that share memory with
    the averaged one keep their values, as they do when the published code puts new tensors in the place of the old ones. Calls
    that the kernels do not serve (mixed dtypes or devices, for instance) run the function that was there before.

    ``from helpers import merge_we`` binds the old function for good: patch before such an import, or patch the importing module
    too. The report names the modules that still hold an old function.

    Args:
        helpers_module: ``mtil/src/models/helpers.py``, ``cil/continual_clip/utils.py``, or a module that imported from them.
        differentiate_teacher: whether teacher logits that need a gradient get it, as published. ZSCL's do, for the sake of
            ``logit_scale``, which no optimiser holds: False saves that work, and leaves ``logit_scale.grad`` to the student.

    Returns:
        The patch: ``replaced`` names the functions.

    Raises:
        ValueError: the module has none of these functions, or others under their names.
        TypeError: ``helpers_module`` is not a module.

    Source: ZSCL (Zheng et al., ICCV 2023), sections 3.2 and 3.3 and its public code.
    """
    if not isinstance(helpers_module, ModuleType):
        raise TypeError(
            f"helpers_module: got {type(helpers_module).__name__}, expected the module that holds the functions, not its name"
        )
    patch, where = Patch("patch_zscl"), helpers_module.__name__
    functions: dict[FunctionType, str] = {}
    for name, make in _MAKERS.items():
        if name not in vars(helpers_module):
            continue
        original = getattr(helpers_module, name)
        reason = _why_not(name, original, make)
        if reason is not None:
            patch.left[f"{where}.{name}"] = reason
            continue
        functions[original] = name
        options = (differentiate_teacher,) if name == "distillation" else ()
        patch.change_attribute(f"{where}.{name}", helpers_module, name, make(original, *options))
    for other in list(sys.modules.values()):
        for name, value in list(getattr(other, "__dict__", {}).items()) if other is not helpers_module else ():
            if (
                type(value) is FunctionType and value in functions
            ):  # isinstance would wake objects that warn when looked at
                patch.left[f"{other.__name__}.{name}"] = (
                    "still the old function, imported by name: patch this module too"
                )
    return patch.require(f"functions of ZSCL's helpers ({', '.join(_MAKERS)}) in module {where}")


def _like(original: FunctionType, function: Callable) -> Callable:
    """``function`` under the name and signature of the one that it replaces."""
    function.__name__, function.__qualname__, function.__module__ = (
        original.__name__,
        original.__qualname__,
        original.__module__,
    )
    function._cl_kernels_original = original  # type: ignore[attr-defined]
    return function


def _distillation(original: FunctionType, differentiate_teacher: bool = True) -> Callable:
    def distillation(t: Tensor, s: Tensor, T: float = 2) -> Tensor:
        if not (_same_kind([t, s]) and t.dim() >= 2 and t.shape[1] and isinstance(T, int | float) and T > 0):
            return original(t, s, T)
        autocast = torch.is_autocast_enabled(s.device.type)
        if autocast and s.dtype not in (torch.float32, torch.float64):
            return original(t, s, T)
        return mean_distillation(t if differentiate_teacher else t.detach(), s, float(T))

    return _like(original, distillation)


def _merge_we(original: FunctionType) -> Callable:
    def merge_we(model_0: nn.Module, model_1: nn.Module, sma_count: float) -> nn.Module:
        lists = _parameters(model_1, model_0)
        if not _all_served(lists, sma_count):
            return original(model_0, model_1, sma_count)
        average_(own_storage(lists[0]), lists[1], 1 / (1.0 + sma_count))
        return model_1

    return _like(original, merge_we)


def _wise_we(original: FunctionType) -> Callable:
    def wise_we(
        model_0: nn.Module, model_1: nn.Module, sma_count: float, model_n: nn.Module, alpha: float = 0.95
    ) -> nn.Module:
        lists = _parameters(model_1, model_0, model_n)
        if not _all_served(lists, sma_count, alpha):
            return original(model_0, model_1, sma_count, model_n, alpha)
        blend_(own_storage(lists[0]), lists[1], lists[2], alpha / (1.0 + sma_count), 1 - alpha)
        return model_1

    return _like(original, wise_we)


def _moving_avg(original: FunctionType) -> Callable:
    def moving_avg(model_0: nn.Module, model_1: nn.Module, alpha: float = 0.999) -> None:
        lists = _parameters(model_0, model_1)
        if not _all_served(lists, alpha):
            return original(model_0, model_1, alpha)
        average_(own_storage(lists[0]), lists[1], 1 - alpha)
        return None

    return _like(original, moving_avg)


def _l2_loss(original: FunctionType) -> Callable:
    def l2_loss(model: nn.Module, model_ref: nn.Module) -> Tensor | float:
        lists = _parameters(model, model_ref, data=False)
        served = _all_served(lists) and lists[0][0].dtype in (torch.float32, torch.float64)
        if not served or torch.is_autocast_enabled(lists[0][0].device.type):
            return original(model, model_ref)
        # On a CPU one pass per tensor stays in the cache, and lists of differences do not: without the kernel the loop is faster.
        if lists[0][0].device.type == "cpu" and not compiled([*lists[0], *lists[1]]):
            return original(model, model_ref)
        return squared_distance(*lists)

    return _like(original, l2_loss)


def _parameters(*models: nn.Module, data: bool = True) -> list[list[Tensor]]:
    """Corresponding parameters of the models; the published loops stop with the shortest model.

    Of the averaged one come the parameters themselves, of the others (``data``) what they hold.
    """
    rows = list(zip(*(model.parameters() for model in models), strict=False))
    lists: list[list[Tensor]] = [list(column) for column in zip(*rows, strict=True)] or [[] for _ in models]
    return [lists[0], *([p.data for p in column] for column in lists[1:])] if data else lists


def _all_served(lists: list[list[Tensor]], *numbers: Any) -> bool:
    return (
        len(lists[0]) > 0
        and all(isinstance(n, int | float) for n in numbers)
        and _same_kind([p for column in lists for p in column], shapes=False)
        and all(a.shape == b.shape for column in lists[1:] for a, b in zip(lists[0], column, strict=True))
    )


def _same_kind(tensors: list[Any], shapes: bool = True) -> bool:
    first = tensors[0]
    return (
        all(isinstance(t, Tensor) and t.is_floating_point() and t.layout == torch.strided for t in tensors)
        and all(t.dtype == first.dtype and t.device == first.device for t in tensors)
        and (not shapes or all(t.shape == first.shape for t in tensors))
    )


_MAKERS: dict[str, Callable] = {
    "distillation": _distillation,
    "merge_we": _merge_we,
    "wise_we": _wise_we,
    "moving_avg": _moving_avg,
    "l2_loss": _l2_loss,
}


def _why_not(name: str, original: Any, make: Callable) -> str | None:
    if hasattr(original, "_cl_kernels_original"):
        return "already patched"
    if not isinstance(original, FunctionType):
        return f"it is {type(original).__name__}, not a function"
    ours = make(original)
    given, expected = (list(inspect.signature(f).parameters) for f in (original, ours))
    if given != expected:
        return f"its parameters are {given}, expected {expected}"
    if any(
        not torch.allclose(a, b, rtol=1e-4, atol=1e-5)
        for a, b in zip(_try(name, original), _try(name, ours), strict=True)
    ):
        return "it computes something else than the published function of this name"
    return None


def _try(name: str, function: Callable) -> list[Tensor]:
    """What ``function`` gives, and makes of its arguments, on small ones that are the same every time."""
    generator = torch.Generator().manual_seed(0)
    if name == "distillation":
        return [function(*torch.randn(2, 3, 4, generator=generator), T=3)]
    models = [nn.ParameterList([torch.randn(n, generator=generator) for n in (3, 2)]) for _ in range(3)]
    arguments = {
        "merge_we": (*models[:2], 3),
        "wise_we": (*models[:2], 3, models[2], 0.8),
        "moving_avg": (*models[:2], 0.9),
        "l2_loss": models[:2],
    }
    result = function(*arguments[name])
    return [p.detach() for model in models for p in model] + ([result.detach()] if isinstance(result, Tensor) else [])
