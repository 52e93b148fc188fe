"""Whose memory a parameter is in."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def own_storage(parameters: list[Tensor]) -> list[Tensor]:
    """The data of ``parameters``, any shapes, in memory that nothing else refers to, so that writing there changes nothing else.

    Code that assigns ``p.data = result`` leaves whoever shared the old memory (a state dict taken earlier, a model whose
    ``.data`` was assigned from this one) with the old values. A parameter in shared memory is copied out of it first.

    Args:
        parameters: are given new memory where theirs is shared.
    """
    for p in parameters:
        if _references(p) > _alone():
            p.data = p.data.clone()
    return [p.data for p in parameters]


@functools.cache
def _alone() -> int:
    """What :func:`_references` says of memory that one tensor has."""
    return _references(torch.empty(1))


def _references(tensor: Tensor) -> int:
    """How many tensors and others refer to the memory of ``tensor``, up to a constant; a large number where torch does not tell."""
    count = getattr(torch._C, "_storage_Use_Count", None)
    return count(tensor.untyped_storage()._cdata) if count is not None else 1 << 30
