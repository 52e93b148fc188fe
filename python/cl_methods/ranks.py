"""Several processes that compute one thing: which rows of a batch are this one's, and how rows and sums come together.

All processes run the same program with the same random numbers. Only two things are divided: a batch of samples is read and
encoded in shares (:func:`share`), and passes over many images are dealt out batch by batch (:func:`dealt`). Whatever is computed
from gathered rows is computed by every process, so losses may couple the samples of a batch in any way.

Gradients follow the convention of data parallelism: the gradient of a step is the *mean* over processes of what each finds in its
``.grad``. A parameter behind :func:`gather_rows` gets N times its share's part, one that is used elsewhere the whole in every
process; both means are the gradient of the whole batch.
"""

from __future__ import annotations

import contextvars
import functools
import io
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")

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


def gather_values(value: T) -> list[T]:
    """``value`` of every process, in order of rank; for small things."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    with exchange():
        dist.all_gather_object(values, value)
    return values


def from_first(compute: Callable[[], T]) -> T:
    """What ``compute()`` gives in process 0, in all of them; the others do not call it, and it is :func:`alone` meanwhile.

    Args:
        compute: gives what can be pickled; tensors in it are sent one by one and arrive on the CPU.

    Raises:
        Exception: what ``compute`` raised, in every process; an :class:`OtherRankError` where that cannot be sent.
    """
    if count() == 1:
        return compute()
    head: list[Any] = [None]
    tensors: list[Tensor] = []
    result: Any = None
    failure: Exception | None = None
    if rank() == 0:
        try:
            with alone():
                result = compute()
            head, tensors = _packed(result)
        except Exception as error:  # noqa: BLE001  # every kind has to reach the others, who wait for it
            failure, head = error, [_sendable(error)]
    with exchange():
        dist.broadcast_object_list(head, src=0)
    if failure is not None:
        raise failure
    sent = head[0]
    if isinstance(sent, Exception):
        raise sent
    content, shapes = sent
    if rank() > 0:
        tensors = [torch.empty(shape, dtype=dtype) for shape, dtype in shapes]
    for value in tensors:
        if value.numel():
            with exchange():
                dist.broadcast(value.flatten().view(torch.uint8), src=0)
    return result if rank() == 0 else _unpacked(content, tensors)


def by_first(function: Callable[P, T]) -> Callable[P, T]:
    """Decorator: a function that process 0 calls and whose result, or error, all have (:func:`from_first`)."""

    @functools.wraps(function)
    def shared(*arguments: P.args, **options: P.kwargs) -> T:
        return from_first(lambda: function(*arguments, **options))

    return shared


def _packed(value: Any) -> tuple[list[Any], list[Tensor]]:
    """``value`` as bytes without its tensors, with their shapes; and the tensors, contiguous and on the CPU."""
    tensors: list[Tensor] = []

    class Pickler(pickle.Pickler):
        def persistent_id(self, part: Any) -> int | None:
            if not isinstance(part, Tensor):
                return None
            tensors.append(part.detach().cpu().contiguous())
            return len(tensors) - 1

    content = io.BytesIO()
    Pickler(content, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return [(content.getvalue(), [(tuple(one.shape), one.dtype) for one in tensors])], tensors


def _unpacked(content: bytes, tensors: list[Tensor]) -> Any:
    class Unpickler(pickle.Unpickler):
        def persistent_load(self, number: Any) -> Tensor:
            return tensors[number]

    return Unpickler(io.BytesIO(content)).load()


def _sendable(error: Exception) -> Exception:
    """``error`` itself if it survives the way, else its sentence."""
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001  # whatever its class does when it is made again
        return OtherRankError(str(error))
    return copy if str(copy) == str(error) else OtherRankError(str(error))


@contextmanager
def exchange() -> Iterator[None]:
    """Around an exchange, which fails because a process is gone.

    Raises:
        OtherRankError: the exchange failed.
    """
    try:
        yield
    except RuntimeError as error:
        raise OtherRankError(f"the exchange with the other processes broke off ({error})") from error
