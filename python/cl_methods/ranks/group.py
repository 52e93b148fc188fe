"""Which process of how many this one is, and which rows and batches are its own."""

from __future__ import annotations

import contextvars
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from cl_methods.worker_death import is_worker_death

_joined = False
_alone: contextvars.ContextVar[bool] = contextvars.ContextVar("alone", default=False)


class OtherRankError(RuntimeError):
    """Another process of the run failed, or is gone; its own sentence says why."""


def joined(value: bool) -> None:
    """Whether the processes of torch.distributed's default group compute together from now on."""
    global _joined  # a process belongs to one group
    _joined = value


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process encodes whole batches by itself: nothing is divided, nothing waits for the others."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def count() -> int:
    """N, processes that share the present work."""
    return dist.get_world_size() if _joined and not _alone.get() else 1


def joined_count() -> int:
    """Processes of the run, also inside :func:`alone`."""
    return dist.get_world_size() if _joined else 1


def rank() -> int:
    """0 … N - 1."""
    return dist.get_rank() if count() > 1 else 0


def first() -> bool:
    """Whether this process is the one that reports and writes; also inside :func:`alone`."""
    return not _joined or dist.get_rank() == 0


def share(total: int, of: int | None = None) -> range:
    """Rows of a batch of ``total`` that belong to process ``of`` (None: this one): contiguous, sizes differ by one at most."""
    number, ranks = rank() if of is None else of, count()
    return range(total * number // ranks, total * (number + 1) // ranks)


def dealt(batches: int, start: int = 0) -> list[int]:
    """Which of ``batches`` whole batches are this process's: every N-th.

    Args:
        batches: how many there are.
        start: moves the beginning, so that many sources of one batch each do not all fall to the first process.
    """
    return [number for number in range(batches) if (number + start) % count() == rank()]


@contextmanager
def exchange() -> Iterator[None]:
    """Around an exchange, which fails because a process is gone.

    Raises:
        OtherRankError: the exchange failed.
    """
    try:
        yield
    except RuntimeError as error:
        if is_worker_death(error):  # of this process, which only happened to wait here
            raise
        reason = re.sub(r"^\[[^]]*\.\w+:\d+\] ", "", str(error)).partition(". ")[
            0
        ]  # without a place in Gloo's sources, and advice
        raise OtherRankError(f"the exchange with the other processes broke off ({reason})") from error


def broke_off(error: Exception) -> bool:
    """Whether ``error`` says that an exchange failed, ours (:class:`OtherRankError`) or one of torch's own, as FSDP2 makes them."""
    own = isinstance(error, (OtherRankError, dist.DistError))
    return own or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())
