"""Places where the host would wait for a GPU, found on a machine that has none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

READS = frozenset(
    f"aten::{name}"
    for name in (
        "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim",
        "unique_consecutive", "bincount", "linalg_cholesky_ex", "cholesky", "linalg_eigh", "_linalg_eigh", "_linalg_svd",
        "_linalg_solve_ex", "linalg_lu_factor_ex",
    )
)  # fmt: skip
"""Operations that hand a number, or a shape that depends on numbers, to the host, and factorisations, which check for success."""


class HostWaits(TorchDispatchMode):
    """Counts the operations inside a ``with`` that would make the host wait if ``on_device`` lay on a GPU.

    Whatever is computed from a tensor on the device is on the device too; random numbers and constants that are made from
    nothing are taken for the host's own. Copies from the device to the host cannot be seen, what is then done with them can.

    Args:
        on_device: tensors of any shape that would be on the GPU: weights, buffers, the batch.

    Attributes:
        by_name: the counts, by the operation's name.
    """

    def __init__(self, on_device: Iterable[Tensor]) -> None:
        super().__init__()
        self._device: dict[int, StorageWeakRef] = {}
        self.by_name: dict[str, int] = {}
        for tensor in on_device:
            self.mark(tensor)

    @property
    def waits(self) -> int:
        """All of them."""
        return sum(self.by_name.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        self.observe(func, args, kwargs, found)
        return found

    def observe(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], found: Any) -> bool:
        """Whether the host would have waited in this call of an operation; what it returned is on the device if an input is.

        Args:
            func: the operation.
            args: its arguments.
            kwargs: its keyword arguments.
            found: what it returned.
        """
        if not any(self._marked(tensor) for tensor in tensors_in((args, kwargs))):
            return False
        name = func._schema.name
        waits = name in READS or (name.startswith("aten::index") and self._by_mask(args))
        if waits:
            self.by_name[name] = self.by_name.get(name, 0) + 1
        for tensor in tensors_in(found):
            self.mark(tensor)
        return waits

    def _by_mask(self, args: tuple[Any, ...]) -> bool:
        """Whether an index is a mask, whose number of entries the host has to know."""
        places = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ()
        return any(isinstance(place, Tensor) and place.dtype in (torch.bool, torch.uint8) for place in places)

    def mark(self, tensor: Tensor) -> None:
        """From now on ``tensor``, of any shape, counts as being on the device."""
        if tensor.layout is torch.strided:
            reference = StorageWeakRef(tensor.untyped_storage())
            self._device[reference.cdata] = reference

    def _marked(self, tensor: Tensor) -> bool:
        if tensor.layout is not torch.strided:
            return False
        reference = self._device.get(tensor.untyped_storage()._cdata)
        return reference is not None and not reference.expired()


def tensors_in(values: Any) -> Iterator[Tensor]:
    """Every tensor, of any shape, in nested lists, tuples and dictionaries."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        yield from tensors_in(list(values.values()))
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from tensors_in(value)
