"""Bytes of the tensors that are alive, counted operation by operation."""

from __future__ import annotations

import sys
import weakref
from typing import Any, Self
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from cl_methods.sharding import local
from cl_methods.training.planning.repeated import Repeated

_REAL = 1 << 16
"""Numbers that a new tensor may have and be real; where a hook looks at values, it looks at small tensors."""


class TooLongError(RuntimeError):
    """More operations than :attr:`LiveMemory.operations_left` allowed."""


class LiveMemory(TorchDispatchMode):
    """Bytes of the tensors that are alive, and the most at any time: every operation's results until their last reference goes.

    Counts real tensors and fake ones alike; each storage once, with the size that it has after ``resize_``. Of sharded tensors the
    rows that this process holds count. What an operation needs only while it runs is not seen.

    Attributes:
        bytes: alive now, of what was made inside the ``with`` or passed to :meth:`count`.
        peak: the most since it was last set.
        operations_left: how many operations may follow before :class:`TooLongError`; None: any number.

    Args:
        fake: makes large new tensors without data; None: all are real.
        all_empty: whether it makes small ones of ``torch.empty`` too, such as the buffers of sharded weights.
        meta: whether tensors on the device ``meta`` count, with the size that their data would have.
    """

    def __init__(self, fake: FakeTensorMode | None = None, *, all_empty: bool = False, meta: bool = False) -> None:
        super().__init__()
        self._all_empty, self._meta = all_empty, meta
        self.bytes = self.peak = 0
        self.operations_left: int | None = None
        self._fake = fake
        self._repeated = None if fake is None else Repeated(fake)
        self._storages: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}
        resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            resize(storage, size)
            self._resized(storage)
            return storage

        self._resizing = mock.patch.object(torch.UntypedStorage, "resize_", resized)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing inside is compiled, and torch's guard against it would be entered with every operation."""
        return False

    def __enter__(self) -> Self:
        self._resizing.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._resizing.__exit__(*error)

    def count(self, tensor: Tensor) -> None:
        """Count the memory behind ``tensor`` (any shape), unless it is counted already."""
        tensor = local(tensor)
        self._add(tensor.untyped_storage())

    def leave_out(self, tensor: Tensor) -> None:
        """Never count the memory behind ``tensor`` (any shape), unless it is counted already."""
        self._add(tensor.untyped_storage(), 0)

    def _add(self, storage: torch.UntypedStorage, size: int | None = None) -> None:
        key = id(storage)
        known = self._storages.get(key)
        if known is not None and known[0]() is storage:
            return
        size = storage.nbytes() if size is None else size

        def gone(_: Any) -> None:
            self.bytes -= self._storages.pop(key)[1]

        self._storages[key] = weakref.ref(storage, gone), size
        self.bytes += size
        self.peak = max(self.peak, self.bytes)

    def _resized(self, storage: torch.UntypedStorage) -> None:
        known = self._storages.get(id(storage))
        if known is not None and known[0]() is storage:
            self._storages[id(storage)] = known[0], storage.nbytes()
            self.bytes += storage.nbytes() - known[1]
            self.peak = max(self.peak, self.bytes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _distributed(types):
            return NotImplemented  # which asks for the same of its rows
        if self._others():
            return func(*args, **kwargs)
        if func is torch.ops.prim.device.default:
            return args[0].device if self._fake is None else args[0].fake_device
        if self.operations_left is not None:
            self.operations_left -= 1
            if self.operations_left < 0:
                raise TooLongError
        if self._repeated is None:
            made = func(*args, **kwargs)
        else:
            made = self._repeated.run(func, args, kwargs)[0] if _given(args, kwargs) else self._make(func, args, kwargs)
        for value in (made,) if isinstance(made, Tensor) else tree_iter(made):
            if not isinstance(value, Tensor):
                continue
            device = (
                value.fake_device if isinstance(value, FakeTensor) else value.device
            )  # whose device takes a dispatch
            if self._meta or device.type != "meta":
                self.count(value)
        return made

    def _others(self) -> bool:
        """Whether somebody else is looking at shapes, as DTensor does of its results."""
        active = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
        return active is not None and active is not self._fake

    def _make(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The result of an operation that takes no tensor."""
        assert self._fake is not None
        with self._fake:
            made = func(*args, **kwargs)
        smallest = 0 if self._all_empty and func is torch.ops.aten.empty.memory_format else _REAL
        if isinstance(made, Tensor) and made.is_floating_point() and made.numel() > smallest:
            return made
        return func(*args, **kwargs)


def _distributed(types: Any) -> bool:
    """Whether one of them is DTensor's, whose package takes a second to load; where it is not, there are none."""
    package = sys.modules.get("torch.distributed.tensor")
    return package is not None and any(issubclass(kind, package.DTensor) for kind in types)


def _given(args: Any, kwargs: Any) -> bool:
    """Whether there is a tensor among the arguments, mostly the first."""
    first = isinstance(args[0], Tensor) if args else False
    return first or any(isinstance(value, Tensor) for value in tree_iter((args, kwargs)))
