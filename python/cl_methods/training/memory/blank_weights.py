"""Weights that have shapes and no data: those of a model, those that a method adds, and those that move to a device."""

from __future__ import annotations

import contextlib
import unittest.mock
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.module import register_module_parameter_registration_hook

from cl_methods.training.memory.live import LiveMemory


class BlankWeights:
    """Makes weights without data and has them counted.

    Args:
        fake: makes them.
        memory: counts those that modules get inside :meth:`everywhere`.
    """

    def __init__(self, fake: FakeTensorMode, memory: LiveMemory) -> None:
        self._fake, self._memory = fake, memory

    def shape_of(self, value: Tensor, device: torch.device) -> Any:
        """``value`` (any shape) on ``device``, a parameter if it is one; on a CPU single numbers are real."""
        if value.dim() == 0 or (value.numel() == 1 and device.type == "cpu"):
            number = torch.ones(value.shape, dtype=value.dtype) if value.is_meta else value.detach().clone()
            return nn.Parameter(number, value.requires_grad) if isinstance(value, nn.Parameter) else number
        with self._fake:
            shape = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
            return nn.Parameter(shape, value.requires_grad) if isinstance(value, nn.Parameter) else shape

    @contextlib.contextmanager
    def everywhere(self) -> Iterator[None]:
        """Inside, new parameters of any module lose their data, and what ``module.to`` would copy has none on its device."""

        def to(module: nn.Module, *where: Any, **options: Any) -> nn.Module:
            return self._moved(module, *where, **options)

        with (
            register_module_parameter_registration_hook(self._emptied),  # type: ignore[arg-type]  # what it returns counts
            unittest.mock.patch.object(nn.Module, "to", to),
        ):
            yield

    def _emptied(self, module: nn.Module, name: str, value: nn.Parameter | None) -> nn.Parameter | None:
        """What becomes of a new parameter; None: it stays.

        A small one that is real would be described anew for every operation that has it beside tensors without data.
        """
        if type(value) is not nn.Parameter or value.numel() == 1 or value.is_meta:
            return None
        empty = self.shape_of(value, value.device)
        self._memory.count(empty)
        return empty  # type: ignore[no-any-return]

    def _moved(self, module: nn.Module, *to: Any, **options: Any) -> nn.Module:
        """What ``module.to`` does: nothing to weights that are there, and others have no data on the device."""
        device = torch._C._nn._parse_to(*to, **options)[0]
        for part in module.modules() if device is not None and device.type != "cpu" else ():
            held: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
            for tensors in held:
                for name, value in tensors.items():
                    if value is not None and value.device.type != device.type and value.dim():
                        tensors[name] = self.shape_of(value, device)
                        self._memory.count(tensors[name])
        return module
