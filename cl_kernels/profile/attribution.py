"""Which module an operation belongs to: forward by the calls it runs in, backward by what it differentiates."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

Stack = tuple[str, ...]
"""Names of the modules whose calls are running, outermost first."""


class ModuleCalls:
    """Follows the calls of named modules inside a ``with``.

    Every node of the autograd graph gets a sequence number when the forward pass creates it. Noting that number whenever a call
    begins or ends tells which calls a node was created in, and so whose operations run while it is differentiated, without
    touching a tensor.

    Args:
        modules: by the names they are reported under; a module given twice keeps its first name.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules: dict[int, tuple[str, nn.Module]] = {}
        for name, module in modules.items():
            self._modules.setdefault(id(module), (name, module))
        self._owners = {
            id(parameter): name
            for name, module in self._modules.values()
            for parameter in module.parameters(recurse=False)
        }
        self._stack: list[str] = []
        self._numbers: list[int] = []
        self._stacks: list[Stack] = []
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        self._note()
        for name, module in self._modules.values():
            self._handles.append(module.register_forward_pre_hook(self._entering(name), prepend=True))
            self._handles.append(module.register_forward_hook(self._leaving, always_call=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def current(self) -> Stack:
        """The calls that what runs now belongs to."""
        node = torch._C._current_autograd_node()
        if self._stack or node is None:  # calls inside the backward pass are recomputations, and go before the node
            return tuple(self._stack)
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor):
            owner = self._owners.get(id(variable))
            return () if owner is None else (owner,)
        return self._stacks[max(0, bisect_right(self._numbers, node._sequence_nr()) - 1)]

    def _entering(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            self._stack.append(name)
            self._note()

        return hook

    def _leaving(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._stack:  # a call that began before the with has nothing to end
            self._stack.pop()
            self._note()

    def _note(self) -> None:
        self._numbers.append(torch._C._autograd._get_sequence_nr())
        self._stacks.append(tuple(self._stack))
