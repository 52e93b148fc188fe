"""Work of a piece of code, without a clock: every dispatched operation's FLOPs and bytes, what processes exchange, images read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from cl_kernels.profile.flops import operation_flops
from cl_kernels.profile.recorder import is_view

_ROWS_ONLY = {"aten::embedding", "aten::index", "aten::index_select", "aten::gather"}
"""Operations that read the rows they return and not the whole of their first argument."""

_NOT_READ = {"aten::copy_", "aten::fill_", "aten::zero_"}
"""Operations that overwrite their first argument without reading it."""

_NOTHING = {"aten::empty", "aten::empty_like", "aten::new_empty", "aten::empty_strided", "aten::new_empty_strided"}
"""Operations that touch no memory."""

_DATA_DECIDES = {"aten::nonzero", "aten::_unique2", "aten::masked_select", "aten::_local_scalar_dense"}
"""Operations whose results have shapes that depend on data."""

_RESHAPES = {"aten::resize_", "aten::set_"}
"""Operations that change more of their first argument than data."""

Call = tuple[int, int]
"""FLOPs and bytes of one operation."""


@dataclass(frozen=True)
class Work:
    """What has to be done, of which sums and multiples can be taken.

    Attributes:
        calls: how often an operation with these FLOPs and bytes runs.
        summed: bytes of a tensor that is summed over all processes -> how often.
        gathered: bytes of a tensor that is put together from the shares of all processes -> how often.
        images: read, decoded and transformed on the host.
    """

    calls: Counter[Call] = field(default_factory=Counter)
    summed: Counter[int] = field(default_factory=Counter)
    gathered: Counter[int] = field(default_factory=Counter)
    images: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            _sum(self.calls, other.calls),
            _sum(self.summed, other.summed),
            _sum(self.gathered, other.gathered),
            self.images + other.images,
        )

    def __mul__(self, times: float) -> Work:
        return Work(
            _times(self.calls, times), _times(self.summed, times), _times(self.gathered, times), self.images * times
        )

    def shared_out(self, processes: int) -> Work:
        """Of each operation one of ``processes`` equal shares: what works on rows of sharded weights."""
        shares: Counter[Call] = Counter()
        for (flops, moved), times in self.calls.items():
            shares[round(flops / processes), round(moved / processes)] += times
        return Work(shares, self.summed, self.gathered, self.images)

    @property
    def flops(self) -> float:
        """Of matrix products, convolutions and attention, a multiply-add being two."""
        return sum(flops * n for (flops, _), n in self.calls.items())

    @property
    def bytes(self) -> float:
        """Read and written by all operations, each argument and each result once per operation."""
        return sum(moved * n for (_, moved), n in self.calls.items())

    @property
    def operations(self) -> float:
        """Dispatched operations that are not views."""
        return sum(self.calls.values())

    @property
    def exchanged(self) -> float:
        """Bytes of the tensors that all processes sum or gather, each counted once."""
        return sum(size * n for part in (self.summed, self.gathered) for size, n in part.items())


class WorkCount(TorchDispatchMode):
    """Counts the operations inside a ``with``. Values are never looked at, so tensors need none.

    Attributes:
        calls: the operations, afterwards.

    Args:
        given: tensors of any shape that exist anyway, and do not count as kept for the backward pass.
    """

    def __init__(self, given: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.calls: Counter[Call] = Counter()
        self._given = {value.untyped_storage()._cdata for value in given}
        self._kept: dict[int, tuple[StorageWeakRef, int]] = {}
        self._hooks = saved_tensors_hooks(self._keep, lambda tensor: tensor)

    @property
    def work(self) -> Work:
        """What was counted."""
        return Work(self.calls)

    @property
    def saved(self) -> int:
        """Bytes of the distinct storages that were kept for a backward pass."""
        return sum(size for _, size in self._kept.values())

    def __enter__(self) -> Self:
        self._hooks.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._hooks.__exit__(*error)

    def _keep(self, tensor: Tensor) -> Tensor:
        if tensor.layout is torch.strided:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._given and storage._cdata not in self._kept:
                # The weak reference keeps the address from being given to another storage.
                self._kept[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return tensor

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if is_view(func) or func._schema.name in _NOTHING:
            return func(*args, **kwargs)
        key = _key(func, args, kwargs)
        known = None if key is None else _KNOWN.get(key)
        if known is None:
            found = func(*args, **kwargs)
            call = operation_flops(func, args, kwargs, found), _moved(func._schema, args, kwargs, found)
            if key is not None:
                _remember(key, func, call, args, found)
        else:
            call, shapes = known
            found = func(*args, **kwargs) if shapes is None else _made(shapes, args)
        self.calls[call] += 1
        return found


_Shape = tuple[torch.Size, tuple[int, ...], torch.dtype]
_KNOWN: dict[Any, tuple[Call, _Shape | list[_Shape] | str | None]] = {}
"""What operations on tensors without data cost, and the shapes of what they return where that is new (``"first"``, ``"nothing"``:
their first argument, or nothing): the blocks of a tower repeat the same calls, which torch works through much longer than it takes
to look them up."""

_MOST_KNOWN = 1 << 16


def _key(func: Any, args: Any, kwargs: Any) -> Any:
    """What an operation's cost depends on; None where a tensor has data."""
    parts: list[Any] = [func]
    for value in (*args, *kwargs.items()):
        if isinstance(value, Tensor):
            if not value.is_meta:
                return None
            parts.append((value.shape, value.stride(), value.dtype))
        elif isinstance(value, list | tuple):
            inner = _key(None, value, {})
            if inner is None:
                return None
            parts.append(inner)
        elif isinstance(value, float | int | str | bool | None | torch.dtype | torch.device | torch.layout):
            parts.append((type(value), value))
        else:
            return None
    return tuple(parts)


def _remember(key: Any, func: Any, call: Call, args: Any, found: Any) -> None:
    shapes: Any = None
    name = func._schema.name
    if name.endswith("_") and name not in _RESHAPES and (found is None or found is args[0]):
        shapes = "nothing" if found is None else "first"  # there is no data that could change
    results = found if isinstance(found, tuple | list) else [found]
    plain = all(isinstance(one, Tensor) and one.is_meta and one.layout is torch.strided for one in results)
    aliased = any(argument.alias_info is not None for argument in func._schema.arguments)
    if results and plain and not aliased and name not in _DATA_DECIDES:
        every = [(one.shape, one.stride(), one.dtype) for one in results]
        shapes = every if isinstance(found, tuple | list) else every[0]
    if len(_KNOWN) >= _MOST_KNOWN:
        _KNOWN.clear()
    _KNOWN[key] = call, shapes


def _made(shapes: _Shape | list[_Shape] | str, args: Any) -> Any:
    if isinstance(shapes, str):
        return args[0] if shapes == "first" else None
    if isinstance(shapes, list):
        return tuple(_made(one, args) for one in shapes)
    size, stride, dtype = shapes
    return torch.empty_strided(size, stride, dtype=dtype, device="meta")


def _moved(schema: Any, args: Any, kwargs: Any, found: Any) -> int:
    """Bytes that an operation reads and writes."""
    name = schema.name
    changed = [
        args[place] if place < len(args) else kwargs.get(argument.name)
        for place, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    written = {id(value): value for value in _tensors((found, changed))}
    read = {id(value): value for value in _tensors((args, kwargs))}
    total = sum(map(_size, written.values()))
    if name in _ROWS_ONLY:
        return 2 * total
    if name in _NOT_READ and args:
        read.pop(id(args[0]), None)
    return total + sum(map(_size, read.values()))


def _tensors(values: Any) -> Iterator[Tensor]:
    return (value for value in tree_iter(values) if isinstance(value, Tensor))


def _size(value: Tensor) -> int:
    """Bytes of a tensor; those of an expanded one are where they were before."""
    size = value.numel() * value.element_size()
    return size if value.layout is not torch.strided else min(size, value.untyped_storage().nbytes())


def _sum(one: Counter[Any], other: Counter[Any]) -> Counter[Any]:
    total = Counter(one)
    total.update(other)
    return total


def _times(counts: Counter[Any], times: float) -> Counter[Any]:
    return Counter({key: times * count for key, count in counts.items()})  # type: ignore[misc]
