"""Rehearsing as one of several processes that are not asked: their rows are whatever is in memory, and nothing is exchanged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor

from cl_methods.ranks import group, tensors


class _Silent:
    """In place of ``torch.distributed`` in the last of ``processes`` processes, whose share of a batch is never the smaller."""

    ReduceOp, DistError = dist.ReduceOp, dist.DistError

    def __init__(self, processes: int) -> None:
        self.processes = processes

    def get_world_size(self) -> int:
        return self.processes

    def get_rank(self) -> int:
        return self.processes - 1

    def all_reduce(self, tensor: Tensor, op: Any = None) -> None:
        """Sums are those of this process."""

    def all_gather(self, parts: Sequence[Tensor], own: Tensor) -> None:
        """Rows of others have no data here."""

    def all_gather_object(self, values: list[Any], value: Any) -> None:
        values[:] = [value] * self.processes


@contextmanager
def one_of(processes: int) -> Iterator[None]:
    """Inside, :mod:`cl_methods.ranks` is that of one of ``processes``, whether or not they are there; with 1 nothing changes.

    Work that is done :func:`~cl_methods.ranks.alone` is alone here too; whoever is alone already is not, inside.
    """
    if processes == 1:
        yield
        return
    silent, token = _Silent(processes), group._alone.set(False)
    try:
        with (
            mock.patch.object(group, "dist", silent),
            mock.patch.object(tensors, "dist", silent),
            mock.patch.object(group, "_joined", True),
        ):
            yield
    finally:
        group._alone.reset(token)
