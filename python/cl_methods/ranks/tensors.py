"""What all processes exchange: rows of a batch, sums, answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from cl_methods.ranks.group import count, exchange, share

T = TypeVar("T")


def gather_rows(own: Tensor, total: int) -> Tensor:
    """All rows of a batch of which every process has its :func:`share`.

    The backward pass needs no communication: every process has computed the same loss from the same rows.

    Args:
        own: (n, …), the rows of ``share(total)``, on the CPU or the process's GPU.
        total: rows in all processes together.

    Returns:
        (total, …); its gradient reaches ``own`` multiplied by N (see above).

    Raises:
        OtherRankError: a process is gone.
    """
    if count() == 1:
        return own
    if own.requires_grad and torch.is_grad_enabled():
        gathered = _Gather.apply(own, total)
        assert isinstance(gathered, Tensor)
        return gathered
    return _gathered(own.detach(), total)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, total: int) -> Tensor:
        ctx.rows, ctx.ranks = share(total), count()
        return _gathered(own, total)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0][ctx.rows.start : ctx.rows.stop] * ctx.ranks, None


def _gathered(own: Tensor, total: int) -> Tensor:
    ranks = count()
    most = -(-total // ranks)
    padded = own.new_zeros(most, *own.shape[1:])
    padded[: len(own)] = own
    parts = [torch.empty_like(padded) for _ in range(ranks)]
    with exchange():
        dist.all_gather(parts, padded)
    return torch.cat([part[: len(share(total, number))] for number, part in enumerate(parts)])


def sum_(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over all processes, in place; one exchange for each dtype.

    Args:
        tensors: of any shapes, the same (…) in every process.

    Raises:
        OtherRankError: a process is gone.
    """
    if count() == 1 or not tensors:
        return
    for kind in dict.fromkeys((one.dtype, one.device) for one in tensors):
        same = [one for one in tensors if (one.dtype, one.device) == kind]
        flat = torch.cat([one.detach().reshape(-1) for one in same])
        with exchange():
            dist.all_reduce(flat)
        for one, total in zip(same, flat.split([one.numel() for one in same]), strict=True):
            one.detach().copy_(total.view(one.shape))


def start_sum(tensor: Tensor) -> Any:
    """Begin to replace ``tensor`` by its sum over all processes, in place.

    Args:
        tensor: any shape, contiguous, the same in every process; nobody may touch it before ``wait()`` of the result returns.

    Raises:
        OtherRankError: a process is gone; ``wait()`` inside :func:`exchange` says so too.
    """
    with exchange():
        return dist.all_reduce(tensor, async_op=True)


def everyone(value: bool) -> bool:
    """Whether ``value`` is true in every process; all go on from here together."""
    return all(gather_values(value))


def anyone(value: bool) -> bool:
    """Whether ``value`` is true in some process; all go on from here together, and no GPU waits."""
    if count() == 1:
        return value
    flag = torch.tensor(int(value))
    with exchange():
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)


def gather_batches(own: Sequence[T], batches: int, start: int = 0) -> list[T]:
    """What every process found in the batches that were dealt to it, in the order of the batches; for small things.

    Args:
        own: one value for each of the batches of this process.
        batches, start: as for :func:`~cl_methods.ranks.dealt`.
    """
    streams = [iter(values) for values in gather_values(list(own))]
    return [next(streams[(number + start) % len(streams)]) for number in range(batches)]


def gather_values(value: T) -> list[T]:
    """``value`` of every process, in order of rank; for small things."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    with exchange():
        dist.all_gather_object(values, value)
    return values
