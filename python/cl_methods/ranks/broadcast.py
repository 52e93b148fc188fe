"""What one process does for all: its result, or its error, in every one of them."""

from __future__ import annotations

import functools
import io
import pickle
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from cl_methods.ranks.group import OtherRankError, alone, count, exchange, rank

P = ParamSpec("P")
T = TypeVar("T")


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
