"""Floating-point operations of dispatched operations, from their shapes: torch's own formulas, and those of our operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.flop_counter import flop_registry

Formula = Callable[..., int]


def operation_flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], found: Any) -> int:
    """FLOPs of one call, 2 for each multiply-add of its matrix products and convolutions; what is elementwise counts as none.

    Args:
        func: the dispatched operation.
        args: its arguments.
        kwargs: its keyword arguments.
        found: what it returned.
    """
    if func._schema.name in _FORMULAS:
        return _FORMULAS[func._schema.name](*args, **kwargs)
    formula = flop_registry.get(func._overloadpacket)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=found))


def _attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    batch, heads, length, width = q.shape
    return 2 * batch * heads * length * k.shape[2] * (width + v.shape[3])


def _attention_backward(grad: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    """The scores once more, and the gradients of scores, values, queries and keys: five products for two."""
    batch, heads, length, width = q.shape
    return 2 * batch * heads * length * k.shape[2] * (3 * width + 2 * v.shape[3])


def _whole_attention(query: Any, key: Any, value: Any, embed_dim: int, *_: Any, **__: Any) -> int:
    """Projections of query, key and value, attention, and the projection of its result."""
    batch, length, width = query.shape
    return 8 * batch * length * width * embed_dim + 4 * batch * length * key.shape[1] * embed_dim


def _adapter(x: Any, expert_ids: Any, gates: Any, down_weight: Any, *_: Any, **__: Any) -> int:
    return 4 * _expert_elements(x, expert_ids, down_weight)


def _adapter_backward(grad: Any, x: Any, expert_ids: Any, gates: Any, down_weight: Any, *rest: Any, **__: Any) -> int:
    """The gradient of the bottleneck serves gates, input and experts; one product more for the input, two for the experts."""
    need_x, _, need_experts = rest[-3:]
    return 2 * _expert_elements(x, expert_ids, down_weight) * (1 + bool(need_x) + 2 * bool(need_experts))


def _expert_elements(x: Any, expert_ids: Any, down_weight: Any) -> int:
    """Multiply-adds of one of the two products: tokens x experts of each x R x D."""
    _, rank, width = down_weight.shape
    return x.shape[0] * x.shape[1] * expert_ids.shape[1] * rank * width


def _routed_block(
    x: Any, residual: Any, w_gate: Any, w_noise: Any, noise: Any, down_weight: Any, *rest: Any, **__: Any
) -> int:
    """Two products of every chosen expert, and the router's two."""
    k = rest[4]
    return 4 * x.shape[0] * x.shape[1] * k * down_weight[0].numel() + 4 * x.shape[0] * w_gate.numel()


def _routed_block_backward(grad: Any, x: Any, w_gate: Any, *rest: Any, **__: Any) -> int:
    """As of the adapter; of the router only what the kept logits reach."""
    expert_ids, down_weight = rest[3:5]
    need_x, need_router, need_experts = (bool(need) for need in rest[-3:])
    tokens = x.shape[0] * x.shape[1] * expert_ids.shape[1] * down_weight[0].numel()
    router = expert_ids.numel() * x.shape[2] * (need_x or need_router) * (1 + 2 * need_x + 2 * need_router)
    return 2 * tokens * (1 + need_x + 2 * need_experts) + 2 * router


def _gating(x: Any, w_gate: Any, w_noise: Any, noise: Any, *_: Any, **__: Any) -> int:
    return 2 * x.shape[0] * w_gate.numel() * (1 + (noise is not None))


def _gating_backward(grad: Any, x: Any, w_gate: Any, w_noise: Any, noise: Any, *rest: Any, **__: Any) -> int:
    need_x, need_gate, need_noise = (bool(need) for need in rest[-3:])
    noisy = noise is not None
    return 2 * x.shape[0] * w_gate.numel() * (need_x * (1 + noisy) + need_gate + need_noise * noisy + noisy)


def _feature_distillation(student: Any, teacher: Any, anchors: Any, *rest: Any, **named: Any) -> int:
    """Logits of the student and of K teachers; on the CPU, where gradients come with the loss, a product for each of them."""
    own, theirs = _logit_products(student, teacher, anchors)
    wanted = [*rest, named.get("need_student", False), named.get("need_anchors", False)][8:10]
    return own * (1 + sum(bool(need) for need in wanted)) + theirs


def _feature_distillation_backward(grad: Any, student: Any, teacher: Any, anchors: Any, *rest: Any, **__: Any) -> int:
    """All logits once more, and a product for each gradient."""
    own, theirs = _logit_products(student, teacher, anchors)
    need_student, need_anchors, need_scale = (bool(need) for need in rest[-3:])
    return own * (1 + need_student + need_anchors) + theirs if need_student or need_anchors or need_scale else 0


def _logit_products(student: Any, teacher: Any, anchors: Any) -> tuple[int, int]:
    teachers, rows, width = teacher.shape
    return 2 * rows * anchors.shape[0] * student.shape[1], 2 * teachers * rows * anchors.shape[0] * width


_ATEN: dict[str, Formula] = {
    "aten::_scaled_dot_product_flash_attention_for_cpu": _attention,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    "aten::_native_multi_head_attention": _whole_attention,
}
_OURS: dict[str, Formula] = {
    f"{namespace}::{name}": formula
    for namespace in ("cl_kernels", "cl_kernels_triton")
    for name, formula in (
        ("moe_adapter", _adapter),
        ("moe_adapter_backward", _adapter_backward),
        ("routed_block", _routed_block),
        ("routed_block_backward", _routed_block_backward),
        ("top_k_gating", _gating),
        ("top_k_gating_backward", _gating_backward),
        ("feature_distill_kl", _feature_distillation),
        ("feature_distill_kl_backward", _feature_distillation_backward),
    )
}
_FORMULAS = _ATEN | _OURS
"""By the name of the operation; those that torch counts itself are not among them. The operators of distill_kl and average_ are
elementwise."""
