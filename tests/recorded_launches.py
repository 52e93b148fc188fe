"""Launches of Triton kernels as a GPU would get them, on a machine without one: bound, specialised, and written down.

Tensors are on the meta device, so shapes may be as large as users have them. Everything up to the driver's own call is Triton's.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from cl_kernels import testing
from cl_kernels.distill_kl import triton_launch as distillation
from cl_kernels.moe_adapter import triton_launch as adapters

PROCESSORS = 132
_devices = itertools.count(1000)  # Triton keeps what it compiled by device


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel's name and programs, its arguments by name, and what it was compiled for."""

    name: str
    grid: tuple[int, int, int]
    arguments: dict[str, Any]
    kernel: Kernel


@dataclass(frozen=True, eq=False)
class Kernel:
    """A specialisation that Triton asks its compiler for."""

    function: Any
    signature: dict[str, str]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    options: Any

    def shared_memory(self, target: str) -> int:
        """Bytes that it needs, from compiling it."""
        source = ASTSource(self.function, self.signature, self.constants, self.attributes)
        return triton.compile(source, target=_gpu(target), options=self.options.__dict__).metadata.shared


@dataclass
class Recording:
    """What was launched and compiled, in order, and on which tensors' device each launch went."""

    launches: list[Launch] = field(default_factory=list)
    kernels: list[Kernel] = field(default_factory=list)
    guards: list[torch.Tensor] = field(default_factory=list)


def _gpu(target: str) -> GPUTarget:
    return GPUTarget("cuda", int(target.removeprefix("sm_")), 32)


@contextmanager
def recorded(target: str = "sm_90") -> Iterator[Recording]:
    """Inside, kernels are launched nowhere and written down; ``target`` is the GPU that launchers see, with 132 processors."""
    found, device = Recording(), next(_devices)

    @contextmanager
    def device_of(tensor: torch.Tensor) -> Iterator[None]:
        found.guards.append(tensor)
        yield
        found.guards.pop()

    def compiled(
        self: Any, key: Any, signature: Any, device: Any, constants: Any, options: Any, attributes: Any, _: Any
    ):
        kernel = Kernel(self, signature, constants, attributes, options)
        found.kernels.append(kernel)

        def run(x: int, y: int, z: int, *rest: Any) -> None:
            assert found.guards, f"{self.__name__} is launched on whatever device is current"
            arguments = dict(zip(self.arg_names, rest[6:], strict=True))
            found.launches.append(Launch(self.__name__, (x, y, z), arguments, kernel))

        made = SimpleNamespace(run=run, function=None, packed_metadata=None, launch_metadata=lambda *_: None)
        self.device_caches[device][0][key] = made
        return made

    driver = SimpleNamespace(
        get_current_target=lambda: _gpu(target), get_current_device=lambda: device, get_current_stream=lambda _: 0
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "device_of", device_of)
        patch.setattr(JITFunction, "_do_compile", compiled)
        patch.setattr(adapters, "shared_memory", lambda _: testing.SHARED_MEMORY[target])
        patch.setattr(distillation, "_device", lambda _: (target, PROCESSORS))
        patch.setattr(triton.runtime.driver, "_active", driver)
        yield found
