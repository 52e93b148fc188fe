"""Where the results of the adapters lie in memory."""

from __future__ import annotations

from torch import Tensor


def empty_rows(x: Tensor) -> Tensor:
    """Uninitialised (B, L, D) in the memory order of ``x``: (L, B, D) in memory if ``x`` is, else (B, L, D)."""
    if not x.is_contiguous() and x.transpose(0, 1).is_contiguous():
        batch, length, width = x.shape
        return x.new_empty(length, batch, width).transpose(0, 1)
    return x.new_empty(x.shape)
