"""Self-attention of ``nn.MultiheadAttention`` in fewer dispatched operations, and the open_clip blocks that take it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_methods import lazy_open_clip


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


def fuse_attention(model: nn.Module) -> None:
    """Let open_clip's residual blocks inside ``model`` attend by :func:`self_attention` wherever gradients are recorded.

    Nothing but the ``attention`` of these block instances changes: names and parameters stay, and copies of the model are fused
    like it. Without gradients, and where somebody has put a hook on the attention, the blocks run their own code.
    """
    block: Any
    for block in model.modules():
        if type(block) is lazy_open_clip.transformer.ResidualAttentionBlock and takes_self_attention(block.attn):
            block.attention = partial(_attention, block)


def separate_attention(model: nn.Module) -> None:
    """Undo :func:`fuse_attention`."""
    for block in model.modules():
        if type(block) is lazy_open_clip.transformer.ResidualAttentionBlock:
            vars(block).pop("attention", None)


def _attention(
    block: Any, q_x: Tensor, k_x: Tensor | None = None, v_x: Tensor | None = None, attn_mask: Tensor | None = None
) -> Tensor:
    """``block.attention`` of open_clip."""
    module = block.attn
    alone = (k_x is None or k_x is q_x) and (v_x is None or v_x is q_x)
    watched = module._forward_hooks or module._forward_pre_hooks
    if alone and torch.is_grad_enabled() and not watched:
        return self_attention(q_x, module, attn_mask)
    return type(block).attention(block, q_x, k_x, v_x, attn_mask)
