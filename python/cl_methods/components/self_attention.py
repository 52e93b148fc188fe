"""Self-attention of a frozen ``nn.MultiheadAttention`` in a third of its dispatched operations."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


def self_attention(x: Tensor, attention: nn.MultiheadAttention, attn_mask: Tensor | None = None) -> Tensor:
    """``attention(x, x, x)`` without what the module does around its products: batch and length are not exchanged and back,
    and the three projections are one tensor, whose gradient is put together once.

    Args:
        x: (B, L, D), query, key and value.
        attention: batch first, one packed projection, no dropout; its parameters are used as they are.
        attn_mask: (L, L) or (B heads, L, L), added.

    Returns:
        (B, L, D), differentiable in ``x`` and the parameters.
    """
    samples, length, width = x.shape
    projected = F.linear(x, attention.in_proj_weight, attention.in_proj_bias)
    query, key, value = projected.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()
    mask = None if attn_mask is None else attn_mask.to(x.dtype)
    if mask is not None and mask.ndim == 3:
        mask = mask.unflatten(0, (samples, attention.num_heads))
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return attention.out_proj(attended.transpose(1, 2).reshape(samples, length, width))


def takes_self_attention(attention: nn.Module) -> bool:
    """Whether :func:`self_attention` computes what ``attention`` does."""
    return (
        type(attention) is nn.MultiheadAttention
        and attention.batch_first
        and attention.in_proj_weight is not None
        and attention.bias_k is None
        and not attention.add_zero_attn
        and attention.dropout == 0
    )
