"""Counts of dispatched operations."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class OperationCount(TorchDispatchMode):
    """Counts what is dispatched inside a ``with``: each costs microseconds on the host, and mostly a launch on a GPU.

    Attributes:
        operations: dispatched operations that are not views.
        by_name: the same, by the operation's name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_name: dict[str, int] = {}

    @property
    def operations(self) -> int:
        """Dispatched operations that are not views."""
        return sum(self.by_name.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not any(arg.alias_info and not arg.alias_info.is_write for arg in func._schema.arguments):
            name = func._schema.name
            self.by_name[name] = self.by_name.get(name, 0) + 1
        return func(*args, **(kwargs or {}))
