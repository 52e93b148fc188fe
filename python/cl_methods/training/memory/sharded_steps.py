"""What sharded weights (FSDP2) add to a rehearsal: a group that is not there, and exchanges of which only the buffers count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import FSDPModule

from cl_methods.training.memory.live import LiveMemory


class _Exchange:
    """An exchange without data, for ``set_custom_all_gather`` and ``set_custom_reduce_scatter``.

    gloo gathers into a buffer of its own and reduces in a copy, each as large as the tensor of which all processes have a
    share; NCCL needs neither.

    Attributes:
        moved: bytes of the tensor of which all processes have a share -> how often.
    """

    def __init__(self, memory: LiveMemory, fake: FakeTensorMode, copies: bool) -> None:
        self._memory, self._fake, self._copies = memory, fake, copies
        self.moved: Counter[int] = Counter()

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A buffer without data of this ``size``."""
        with self._fake:
            buffer = torch.empty(*size, dtype=dtype, device=device)
        self._memory.count(buffer)
        return buffer

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, *_: Any, **__: Any) -> None:
        """Nothing is sent."""
        whole = max(output_tensor.nbytes, input_tensor.nbytes)
        self.moved[whole] += 1
        if self._copies:
            self._memory.peak = max(self._memory.peak, self._memory.bytes + whole)


def pretend_exchanges(model: nn.Module, memory: LiveMemory, fake: FakeTensorMode, *, copies: bool) -> Counter[int]:
    """Let a sharded ``model`` of tensors without data exchange nothing, and count what that needs.

    Args:
        model: whose parts are sharded.
        memory: counts.
        fake: makes the buffers.
        copies: whether exchanges copy what they send (gloo).

    Returns:
        What is exchanged from now on: bytes of a tensor that is gathered from the shares of all processes, or reduced to them, and
        how often.
    """
    noted = _Exchange(memory, fake, copies)
    exchange: Any = noted
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.set_custom_all_gather(exchange)
            part.set_custom_reduce_scatter(exchange)
    return noted.moved
