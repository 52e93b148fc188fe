"""One process that computes its share as if there were others, and notes what it would exchange with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor

from cl_methods.ranks import group, tensors


class Exchanges:
    """Stands in for ``torch.distributed`` in the last of ``processes`` processes, whose share of a batch is never the smaller.

    What others would send is whatever is in memory, so only tensors without data should meet it.

    Attributes:
        summed: bytes of a tensor that is summed over all processes -> how often.
        gathered: bytes of a tensor that is put together from all processes -> how often.
    """

    ReduceOp, DistError = dist.ReduceOp, dist.DistError

    def __init__(self, processes: int) -> None:
        self.processes = processes
        self.summed: Counter[int] = Counter()
        self.gathered: Counter[int] = Counter()

    def get_world_size(self) -> int:
        """Processes of the run."""
        return self.processes

    def get_rank(self) -> int:
        """That of the last process."""
        return self.processes - 1

    def all_reduce(self, tensor: Tensor, op: Any = None, async_op: bool = False) -> Exchanges | None:
        """Note the size of ``tensor``, of any shape, which stays as it is."""
        self.summed[tensor.numel() * tensor.element_size()] += 1
        return self if async_op else None

    def all_gather(self, parts: Sequence[Tensor], own: Tensor) -> None:
        """Note the size of all ``parts`` together, each the same shape as ``own``; they stay as they are."""
        self.gathered[len(parts) * own.numel() * own.element_size()] += 1

    def all_gather_object(self, values: list[Any], value: Any) -> None:
        """Every process has the same ``value``."""
        values[:] = [value] * self.processes

    def wait(self) -> None:
        """Nothing is under way."""


@contextmanager
def simulated(processes: int) -> Iterator[Exchanges]:
    """Inside, this process is the last of ``processes``, whether or not they are there; with 1 nothing changes.

    Work that is done :func:`~cl_methods.ranks.alone` is alone here too; whoever is alone already is not, inside. Holds for the
    whole process, not for a thread.

    Raises:
        ValueError: ``processes`` is less than 1.
    """
    if processes < 1:
        raise ValueError(f"processes: expected a number >= 1, got {processes}")
    noted = Exchanges(processes)
    if processes == 1:
        yield noted
        return
    token = group._alone.set(False)
    try:
        with (
            mock.patch.object(group, "dist", noted),
            mock.patch.object(tensors, "dist", noted),
            mock.patch.object(group, "_joined", True),
        ):
            yield noted
    finally:
        group._alone.reset(token)
