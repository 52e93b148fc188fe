"""What a piece of work costs where no clock is needed: operations, FLOPs, bytes saved for backward, waits for the device."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import cl_kernels  # noqa: F401 - defines the operations below
from cl_kernels.profile import HostWaits, OperationCount


@dataclass(frozen=True)
class Counts:
    """Exact costs; the same on every machine for the same versions.

    Attributes:
        operations: dispatched operations that are not views.
        flops: floating-point operations of matrix products, convolutions and attention, a multiply-add being two.
        saved_bytes: bytes of the distinct storages that autograd keeps for the backward pass, without weights and batch.
        synchronisations: places where the host would wait for a GPU.
    """

    operations: int
    flops: int
    saved_bytes: int
    synchronisations: int

    def as_dict(self) -> dict[str, int]:
        """The four by name."""
        return asdict(self)


class Counting:
    """Counts what runs inside a ``with``; ``counts`` holds the result afterwards.

    Args:
        on_device: weights, buffers and the batch, of any shape: what would lie on a GPU, and is not counted as saved for
            backward.
    """

    def __init__(self, on_device: Iterable[Tensor]) -> None:
        given = list(on_device)
        self._own = {_storage(tensor) for tensor in given}
        self._saved: dict[int, tuple[StorageWeakRef, int]] = {}
        self._flops = FlopCounterMode(display=False, custom_mapping=FORMULAS)
        self._operations = OperationCount()
        self._waits = HostWaits(given)
        self._stack = ExitStack()

    @property
    def counts(self) -> Counts:
        """The result."""
        saved = sum(size for _, size in self._saved.values())
        return Counts(self._operations.operations, self._flops.get_total_flops(), saved, self._waits.waits)

    def __enter__(self) -> Self:
        for mode in (self._flops, self._waits, self._operations, saved_tensors_hooks(self._save, _same)):
            self._stack.enter_context(mode)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _save(self, tensor: Tensor) -> Tensor:
        if tensor.layout is torch.strided:
            place = _storage(tensor)
            if place not in self._own and place not in self._saved:
                # The weak reference keeps the address from being given to another storage.
                reference = StorageWeakRef(tensor.untyped_storage())
                self._saved[place] = (reference, tensor.untyped_storage().nbytes())
        return tensor


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _adapter(x: Any, expert_ids: Any, gates: Any, down_weight: Any, *_: Any, **__: Any) -> int:
    """Two products of the (B L, D) tokens with the (D, R) and (R, D) of each of k experts."""
    (batch, length, width), slots, rank = x, expert_ids[1], down_weight[1]
    return 4 * batch * length * slots * width * rank


def _adapter_backward(grad: Any, x: Any, expert_ids: Any, gates: Any, down_weight: Any, *rest: Any, **__: Any) -> int:
    """The gradient of the bottleneck, and as asked for those of x and of both weights."""
    need_x, _, need_experts = rest[-3:]
    return _adapter(x, expert_ids, gates, down_weight) // 2 * (1 + need_x + 2 * need_experts)


def _gating(x: Any, w_gate: Any, w_noise: Any, noise: Any, *_: Any, **__: Any) -> int:
    """A product with the router, and one more for noisy gates."""
    return 2 * x[0] * x[1] * w_gate[1] * (1 if noise is None else 2)


def _feature_distillation(student: Any, teacher: Any, anchors: Any, *rest: Any, **__: Any) -> int:
    """Logits of the student and every teacher, and the products of the gradients that come with the loss.

    These are the products of the formula; a kernel may form one of them twice rather than keep it.
    """
    gradients = sum(rest[9:])  # need_student, need_anchors; trailing defaults are left out of a dispatched call
    products = 2 * student[0] * anchors[0] * student[1] * (1 + gradients)
    return products + 2 * teacher[0] * teacher[1] * anchors[0] * teacher[2]


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


def _whole_attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Four projections of (B, L, D) and the two products of attention."""
    batch, length, width = query
    return 8 * batch * length * width * width + 4 * batch * length * length * width


_ops, _aten = torch.ops.cl_kernels, torch.ops.aten
FORMULAS = {
    _ops.moe_adapter: _adapter,
    _ops.moe_adapter_backward: _adapter_backward,
    _ops.top_k_gating: _gating,
    _ops.feature_distill_kl: _feature_distillation,
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    _aten._native_multi_head_attention: _whole_attention,
}
"""FLOPs from the shapes of an operation's arguments, for our operations and those that torch has no formula for."""
