"""What a piece of code dispatches, and the memory that it takes beside what is there."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cl_methods.training.memory.live import LiveMemory


class Operations(TorchDispatchMode):
    """Names of what is dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket._qualified_op_name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


def only_new(given: list[Tensor]) -> LiveMemory:
    """Counts what is made beside ``given``."""
    memory = LiveMemory()
    for tensor in given:
        memory.leave_out(tensor)
    return memory
