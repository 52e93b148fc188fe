"""Counting on meta tensors, which have shapes and no memory, as if they lay on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@contextmanager
def comparable_attention() -> Iterator[None]:
    """Inside, attention is the same operations with and without gradients, on meta tensors and on others.

    ``nn.MultiheadAttention`` otherwise takes a shortcut in evaluation that training cannot take, and meta tensors, for which
    torch chooses no fused kernel, go through a decomposition of a dozen operations. Holds for the whole process.
    """
    fast, attention = torch.backends.mha.get_fastpath_enabled(), F.scaled_dot_product_attention
    torch.backends.mha.set_fastpath_enabled(False)
    F.scaled_dot_product_attention = _fused(attention)
    try:
        yield
    finally:
        F.scaled_dot_product_attention = attention
        torch.backends.mha.set_fastpath_enabled(fast)


def _fused(attention: Any) -> Any:
    def scaled_dot_product_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        plain = attn_mask is None or (attn_mask.is_floating_point() and not attn_mask.requires_grad)
        if not query.is_meta or dropout_p or enable_gqa or not plain or query.dim() != 4:
            return attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
        )[0]

    return scaled_dot_product_attention
