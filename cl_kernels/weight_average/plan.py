"""What is worth knowing about lists of tensors more than once: that they fit together, and how they lie in memory.

A training run averages the same tensors again and again. Checking the 302 of ViT-B/16 takes 0.8 ms, comparing their addresses,
dtypes, shapes and strides with those of an earlier call 0.2 ms: a plan holds until one of these changes.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from cl_kernels.weight_average.arguments import RESOLUTION, Lists, check_aliases, check_lists

_KEPT = 8
PLAIN = {Tensor, torch.nn.Parameter, torch.nn.Buffer}
_READ = (Tensor.data_ptr, attrgetter("dtype"), attrgetter("shape"), Tensor.stride)

_AS_IT_IS, _IN_ITS_ORDER, _COPIED = range(3)

_recent: tuple[Plan, ...] = ()  # newest first; replaced, never changed, because threads may look through it


class Plan:
    """Lists that have passed the checks. Holds no tensor of theirs, so nobody's memory lives longer for it.

    Attributes:
        key: what the lists must have in common with those that were checked; None for lists that are checked every time.
        straight: whether every tensor is contiguous.
        halves: the 16-bit dtypes among the averages.
        tables: what the Triton launcher derives from the addresses.
    """

    def __init__(self, key: tuple | None, lists: Lists) -> None:
        check_lists(lists)
        if not torch.compiler.is_compiling():  # addresses exist at run time only
            check_aliases(lists)
        self.key = key
        self.halves = frozenset(a.dtype for a in lists[0] if a.dtype in RESOLUTION)
        self.tables: list[Any] | None = None
        self._rows = [_layout(row) for row in zip(*lists, strict=True)]
        self.straight = all(row == _AS_IT_IS for row in self._rows)

    def flatten(self, lists: Lists) -> Lists:
        """The lists with contiguous tensors only: views where all tensors of a row lie in the same order, else copies."""
        if self.straight:
            return lists
        return tuple([_flat(tensor, row) for tensor, row in zip(tensors, self._rows, strict=True)] for tensors in lists)

    def write_back(self, averages: list[Tensor], flat: list[Tensor]) -> None:
        """Bring what was computed in copies of the averages back to them."""
        if not self.straight:
            for a, f, row in zip(averages, flat, self._rows, strict=True):
                if row == _COPIED:
                    a.copy_(f)


def find(lists: Lists) -> Plan:
    """The plan of these lists, checked now unless they are those of a recent call.

    Raises:
        ValueError, TypeError: see :mod:`cl_kernels.weight_average.arguments`.
    """
    global _recent
    if torch.compiler.is_compiling() or not all(PLAIN.issuperset(map(type, tensors)) for tensors in lists):
        return Plan(None, lists)
    key = tuple(tuple(map(read, tensors)) for tensors in lists for read in _READ)
    for plan in _recent:
        if plan.key == key:
            return plan
    plan = Plan(key, lists)
    if lists[0] and lists[0][0].device.type != "meta":  # whose tensors have no address
        _recent = (plan, *_recent[: _KEPT - 1])
    return plan


def _layout(row: tuple[Tensor, ...]) -> int:
    if all(tensor.is_contiguous() for tensor in row):
        return _AS_IT_IS
    same = all(tensor.stride() == row[0].stride() for tensor in row)
    return _IN_ITS_ORDER if same and _dense(row[0]) else _COPIED


def _dense(tensor: Tensor) -> bool:
    """Whether the elements fill one piece of memory without gaps or repetition, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _flat(tensor: Tensor, layout: int) -> Tensor:
    if layout == _IN_ITS_ORDER:
        return tensor.as_strided((tensor.numel(),), (1,))
    return tensor if layout == _AS_IT_IS else tensor.contiguous()
