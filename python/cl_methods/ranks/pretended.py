"""A group of torch.distributed whose other processes are not there: for sharding weights that have no data."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from unittest import mock

import torch.distributed as dist

_NAMES = itertools.count(1 << 30, 1 << 10)


class PretendedGroup:
    """The first of ``processes`` processes, alone; the others send whatever is in memory.

    The first holds the most rows of whatever is cut by rows. The default group of the process, if it has one, stays as it is.

    Raises:
        ValueError: ``processes`` is less than 2.
    """

    def __init__(self, processes: int) -> None:
        if processes < 2:
            raise ValueError(f"processes: expected a number >= 2, got {processes}")
        from torch.testing._internal.distributed.fake_pg import FakeStore  # which registers the backend

        own, world = dist.group.WORLD, dist.distributed_c10d._world
        dist.group.WORLD, named = None, world.group_count
        world.group_count = next(_NAMES)  # the other processes do not count this group
        try:
            with mock.patch("sys.excepthook"):  # which would name a rank from now on
                dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
            self._group: Any = dist.group.WORLD
        finally:
            dist.group.WORLD, world.group_count = own, named
        self._made: list[Any] = [self._group]
        weakref.finalize(self, _forget, self._made)

    @contextmanager
    def as_default(self) -> Iterator[None]:
        """Inside, it is the process's default group, and what is made of its members is pretended too. Holds for the whole process,
        not for a thread.
        """
        own, world = dist.group.WORLD, dist.distributed_c10d._world
        known, named = set(world.pg_map), world.group_count
        dist.group.WORLD, world.group_count = self._group, next(_NAMES)
        try:
            yield
        finally:
            dist.group.WORLD, world.group_count = own, named
            self._made += [group for group in world.pg_map if group not in known]


def _forget(groups: list[Any]) -> None:
    for group in reversed(groups):
        with suppress(ValueError):  # the process has left all its groups, and this one with them
            dist.destroy_process_group(group)
