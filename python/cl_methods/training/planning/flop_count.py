"""FLOPs of everything that is dispatched, as fast as it can be counted: a run is planned while somebody waits."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cl_methods.training.planning.repeated import Repeated

_KNOWN = Repeated(None)
"""Of all counts in this process: what a call costs depends on its shapes alone."""


class FlopCount(TorchDispatchMode):
    """Counts the FLOPs of what runs inside: those of :class:`torch.utils.flop_counter.FlopCounterMode`, and of our kernels.

    Torch's counter asks every operation whether it is made of others, and follows modules to tell theirs apart; a step on ViT-L/14
    dispatches thousands.

    Attributes:
        total: 2 for each multiply-add of matrix products, convolutions and attention.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing here is compiled, and torch's guard against it would be entered with every operation."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _is_made_of_others(func):
            with self:
                return func.decompose(*args, **kwargs)
        found, flops = _KNOWN.run(func, args, kwargs)
        self.total += flops
        return found


@cache
def _is_made_of_others(func: Any) -> bool:
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return isinstance(func, torch._ops.OpOverload) and func.has_kernel_for_dispatch_key(key)
