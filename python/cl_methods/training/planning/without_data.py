"""Running a method on tensors that have shapes and no data, to count what it would do."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import cl_kernels as clk
from cl_kernels.moe_adapter import reference as adapter_reference
from cl_methods.datasets.images import ImageSource, RawImage

_NOTHING = torch.zeros(3, 1, 1, dtype=torch.uint8)


class BlankImages(ImageSource):
    """Images of which only the labels exist; for transforms that do not look.

    Args:
        count: number of images.
        classes: their labels go around in these.
    """

    def __init__(self, count: int, classes: int) -> None:
        self.labels = torch.arange(count) % classes

    def image(self, index: int) -> RawImage:
        """Always the same empty one."""
        return _NOTHING

    def fingerprint(self) -> str:
        """Of nothing."""
        return ""


class _Answers(TorchDispatchMode):
    """What the host asks of tensors without data gets an answer of the right type: one, zero, zeros, equal, nowhere."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing inside is compiled, and torch's guard against it would be entered with every operation."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs, aten = kwargs or {}, torch.ops.aten
        first = args[0] if args else None
        if isinstance(first, Tensor) and first.is_meta:
            if func is aten._local_scalar_dense.default:
                return 1.0 if first.is_floating_point() else first.dtype is torch.bool or 0
            if func is aten._to_copy.default and torch.device(kwargs.get("device") or "meta").type == "cpu":
                return torch.zeros(first.shape, dtype=kwargs.get("dtype") or first.dtype)
            if func is aten.equal.default:
                return True
            if func is aten.nonzero.default:
                return first.new_empty(0, first.ndim, dtype=torch.int64)
        return func(*args, **kwargs)


def _chosen_experts(
    x: Tensor,  # (B, L, D)
    expert_ids: Tensor,  # (B, k)
    gates: Tensor,  # (B, k)
    down_weight: Tensor,  # (E, R, D)
    down_bias: Tensor,  # (E, R)
    up_weight: Tensor,  # (E, D, R)
    up_bias: Tensor,  # (E, D)
    residual: Tensor | None,  # (B, L, D)
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """The adapters with every sample's experts side by side: the products of the definition, which asks who chose what."""
    hidden = (x[:, None] @ down_weight[expert_ids].mT + down_bias[expert_ids][:, :, None]).relu()
    out = hidden @ up_weight[expert_ids].mT + up_bias[expert_ids][:, :, None]
    mixed = (gates[:, :, None, None] * scale * out).sum(dim=1)
    return (mixed if residual is None else residual + mixed).to(x.dtype)


@contextmanager
def without_data(*, kernels: bool = False) -> Iterator[None]:
    """Inside, tensors on the device ``meta`` may be asked for values, and kernels run as the plain PyTorch that defines them.

    Args:
        kernels: they are dispatched as kernels instead, each one operation.

    Autocast knows no device ``meta``; there is nothing to cast either.
    """
    autocast, enabled = torch.autocast, torch.is_autocast_enabled

    def no_autocast(device_type: str, *args: Any, **options: Any) -> Any:
        return nullcontext() if device_type == "meta" else autocast(device_type, *args, **options)

    def not_enabled(device_type: str | None = None) -> bool:
        if device_type is None:
            return enabled()
        return device_type != "meta" and enabled(device_type)

    with (
        _Answers(),
        nullcontext() if kernels else clk.use_backend("reference"),
        nullcontext() if kernels else mock.patch.object(adapter_reference, "moe_adapter", _chosen_experts),
        mock.patch.object(torch, "autocast", no_autocast),
        mock.patch.object(torch, "is_autocast_enabled", not_enabled),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # what methods say of their settings and data is said by the run itself
        yield
