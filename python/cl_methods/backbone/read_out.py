"""The last block of a tower at the positions that are read: of its output CLIP takes one token, so the others lead nowhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_methods import lazy_open_clip
from cl_methods.backbone.self_attention import takes_self_attention


class ReadOut:
    """Where the output of a tower is read.

    Args:
        ends: finds one position of each sample, (B,) int64, when it is asked for; None for token 0.
    """

    def __init__(self, ends: Callable[[], Tensor] | None = None) -> None:
        self._ends = ends

    def of(self, x: Tensor) -> Tensor:
        """Token 0 and the token that is read, which may be the same one: (B, 1 or 2, D) of ``x`` (B, L, D), the latter last."""
        if self.rows is None:
            return x[:, :1]
        return x[torch.arange(len(x), device=x.device)[:, None], self.rows]

    @cached_property
    def rows(self) -> Tensor | None:
        """(B, 2) int64, the positions that :meth:`of` takes; None for token 0 of every sample."""
        if self._ends is None:
            return None
        ends = self._ends()
        return torch.stack([torch.zeros_like(ends), ends], dim=1)


# A context variable, so that activations that are computed again leave out the same.
_read_out: ContextVar[ReadOut | None] = ContextVar("read_out", default=None)


def current_read_out() -> ReadOut | None:
    """Where the output of the tower that is running is read; None where somebody may look at all of it."""
    return _read_out.get()


@contextmanager
def reading(place: ReadOut | None) -> Iterator[None]:
    """Inside, the last block of a tower may leave out what is not at ``place``."""
    token = _read_out.set(place)
    try:
        yield
    finally:
        _read_out.reset(token)


def read_out_of_images(tower: Any) -> ReadOut | None:
    """Token 0 if that is all that ``tower``, of images, takes from its blocks, else None."""
    plain = type(tower) is lazy_open_clip.transformer.VisionTransformer and tower.pool_type == "tok"
    return ReadOut() if plain and tower.attn_pool is None and not tower.output_tokens else None


def leaves_out(block: Any, attn_mask: Tensor | None) -> bool:
    """Whether :func:`read_parts` serves ``block`` with ``attn_mask``: (L, L) or None, not one for each sample and head."""
    plain = type(block) is lazy_open_clip.transformer.ResidualAttentionBlock and takes_self_attention(block.attn)
    return plain and (attn_mask is None or attn_mask.ndim == 2)


def read_parts(block: Any, x: Tensor, attn_mask: Tensor | None, place: ReadOut) -> tuple[Tensor, Tensor]:
    """``x₁ = x + Attn(LN₁ x)`` and ``MLP(LN₂ x₁)`` of a residual block at token 0 and at the token that is read.

    Keys and values are those of all tokens; queries and all that follows are of these two. The same values and, since no gradient
    arrives at other positions, the same gradients up to the rounding of smaller matrix products, for a sixth of the work.

    Args:
        block: open_clip's residual block.
        x: (B, L, D).
        attn_mask: (L, L), added.
        place: where the output is read.

    Returns:
        Two tensors (B, P, D), the token that is read last: P is 1 if that is token 0, else 2.
    """
    tokens = block.ln_1(x)
    x = place.of(x) + block.ls_1(_attention(place, tokens, block.attn, attn_mask))
    return x, block.ls_2(block.mlp(block.ln_2(x)))


def _attention(place: ReadOut, tokens: Tensor, attention: Any, attn_mask: Tensor | None) -> Tensor:
    """Attention (B, P, D) of the tokens at ``place`` to all ``tokens`` (B, L, D)."""
    width, heads = tokens.shape[2], attention.num_heads
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    query = F.linear(place.of(tokens), weight[:width], None if bias is None else bias[:width])
    both = F.linear(tokens, weight[width:], None if bias is None else bias[width:])
    key, value = both.unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4).unbind()
    query = query.unflatten(-1, (heads, -1)).transpose(1, 2)
    mask = attn_mask
    if mask is not None:
        mask = (mask[:1] if place.rows is None else mask[place.rows].unsqueeze(1)).to(tokens.dtype)
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return attention.out_proj(attended.transpose(1, 2).flatten(2))
