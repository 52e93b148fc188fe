"""Operations on tensors without data that ran before on tensors of the same shapes: their results are not worked out again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.utils._pytree import tree_iter

from cl_kernels.profile.flops import operation_flops

_NAMESPACES = ("aten", "prims", "cl_kernels", "cl_kernels_triton")
"""Of operations whose results are decided by shapes; others may have memories of their own."""

_RESHAPES = {"aten::resize_", "aten::resize_as_", "aten::set_"}
"""Operations that change more of their first argument than data."""

_NUMBERS = (float, int, str, bool, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
_FIRST, _NOTHING, _UNKNOWN = "first", "nothing", "unknown"

_MOST_KNOWN = 1 << 16

_Result = tuple[tuple[int, ...], tuple[int, ...], int, torch.dtype, torch.device]
"""Shape, strides, offset in the storage, dtype and device."""

_Known = tuple[bool, type | None, list[_Result]]
"""Whether results share the memory of the first argument, what they stand in if they are several, and the results."""


class Repeated:
    """Runs operations, and those that are known not again.

    The blocks of a tower repeat the same calls, which torch works through several times longer than it takes to look them up. A
    result is known if it is new memory, or views of the first argument, or the first argument itself, or nothing.

    Args:
        fake: to which the tensors belong; None: they lie on the device ``meta``.
    """

    def __init__(self, fake: FakeTensorMode | None) -> None:
        self._fake = fake
        self._known: dict[Any, tuple[_Known | str, int]] = {}

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, int]:
        """``func(*args, **kwargs)``, and its FLOPs."""
        key = self._key(func, args, kwargs)
        known = None if key is None else self._known.get(key)
        if known is None:
            found = func(*args, **kwargs)
            flops = operation_flops(func, args, kwargs, found)
            if key is not None:
                if len(self._known) >= _MOST_KNOWN:
                    self._known.clear()
                self._known[key] = self._description(func, args, found), flops
            return found, flops
        kind, flops = known
        if isinstance(kind, str):
            return func(*args, **kwargs) if kind is _UNKNOWN else args[0] if kind is _FIRST else None, flops
        view, several, results = kind
        made = self._made(results, args[0].untyped_storage() if view else None)
        return made[0] if several is None else several(made), flops

    def _key(self, func: Any, values: Any, named: dict[str, Any]) -> Any:
        """What a result depends on; None where a tensor has data, or an argument is none that is known here."""
        parts: list[Any] = [func]
        for value in (*values, *named.items()) if named else values:
            if isinstance(value, Tensor):
                if not self._without_data(value):
                    return None
                device = value.fake_device if isinstance(value, FakeTensor) else None
                parts.append((value.shape, value.stride(), value.storage_offset(), value.dtype, device))
            elif isinstance(value, list | tuple):
                inner = self._key(None, value, {})
                if inner is None:
                    return None
                parts.append(inner)
            elif isinstance(value, _NUMBERS):
                parts.append((type(value), value))
            else:
                return None
        return tuple(parts)

    def _without_data(self, value: Tensor) -> bool:
        if isinstance(value, FakeTensor):
            return value.fake_mode is self._fake and value.constant is None
        return self._fake is None and value.is_meta and value.layout is torch.strided

    def _description(self, func: Any, args: tuple[Any, ...], found: Any) -> _Known | str:
        schema = func._schema
        if func.namespace not in _NAMESPACES or schema.name in _RESHAPES:
            return _UNKNOWN
        written = sum(one.alias_info is not None and one.alias_info.is_write for one in schema.arguments)
        if written:
            if found is None:
                return _NOTHING
            return _FIRST if written == 1 and found is args[0] else _UNKNOWN
        results = list(found) if isinstance(found, tuple | list) else [found]
        if not results or not all(isinstance(one, Tensor) and self._is_plain(one) for one in results):
            return _UNKNOWN
        given = [one.untyped_storage() for one in tree_iter(args) if isinstance(one, Tensor)]
        view = isinstance(args[0], Tensor) and all(one.untyped_storage() is given[0] for one in results)
        if not view and not all(_is_new(one, given) for one in results):
            return _UNKNOWN
        every = [(tuple(one.shape), one.stride(), one.storage_offset(), one.dtype, one.device) for one in results]
        return view, type(found) if isinstance(found, tuple | list) else None, every

    def _is_plain(self, value: Tensor) -> bool:
        strided = value.layout is torch.strided and not value.is_complex() and not value.is_neg()
        return strided and self._without_data(value)

    def _made(self, results: list[_Result], storage: torch.UntypedStorage | None) -> list[Tensor]:
        if self._fake is None:
            with torch._C._DisableTorchDispatch():
                return [_on_meta(one, storage) for one in results]
        with in_kernel_invocation_manager(self._fake):
            shaped = [_on_meta(one, storage) for one in results]
        return [FakeTensor(self._fake, one, known[-1]) for one, known in zip(shaped, results, strict=True)]


def _on_meta(known: _Result, storage: torch.UntypedStorage | None) -> Tensor:
    shape, strides, offset, dtype, _ = known
    made = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
    return made if storage is None else made.set_(storage, offset, shape, strides)


def _is_new(value: Tensor, given: list[torch.UntypedStorage]) -> bool:
    """Whether its memory is its own and no larger than it needs."""
    span = sum((size - 1) * step for size, step in zip(value.shape, value.stride(), strict=True)) + 1
    storage = value.untyped_storage()
    needed = (span if value.numel() else 0) * value.element_size()
    return not any(storage is one for one in given) and value.storage_offset() == 0 and storage.nbytes() == needed
