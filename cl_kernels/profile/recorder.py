"""Everything that is dispatched in one training step, operation by operation: where, how much work, how much memory, how long."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cl_kernels.profile.attribution import ModuleCalls, Stack
from cl_kernels.profile.flops import operation_flops
from cl_kernels.profile.shapes import ShapeMemory
from cl_kernels.profile.waiting import HostWaits, tensors_in

Phase = Literal["forward", "backward", "optimizer"]
PHASES: tuple[Phase, ...] = ("forward", "backward", "optimizer")


@dataclass(frozen=True)
class Operation:
    """One dispatched operation that is not a view (:func:`is_view`).

    Attributes:
        name: of the operator.
        stack: the modules it belongs to, outermost first.
        phase: forward, backward or optimizer.
        flops: 2 for each multiply-add of matrix products and convolutions.
        bytes: what its arguments and results hold, each tensor once.
        waits: whether the host would wait for a GPU here.
        live: bytes of tensors made since the step began that are alive after it.
        start: seconds since the step began.
        seconds: how long it took; 0 for meta tensors.
        shapes: of its tensor arguments.
    """

    name: str
    stack: Stack
    phase: Phase
    flops: int
    bytes: int
    waits: bool
    live: int
    start: float
    seconds: float
    shapes: tuple[tuple[int, ...], ...]


@dataclass
class StepRecord:
    """What a :class:`Recorder` saw.

    Attributes:
        operations: in the order of their dispatch.
        saved: (modules, bytes) of every storage kept for the backward pass, under those that kept it first. Parameters, buffers
            and inputs, which exist anyway, are not among them.
        timed: whether seconds mean anything.
    """

    operations: list[Operation] = field(default_factory=list)
    saved: list[tuple[Stack, int]] = field(default_factory=list)
    timed: bool = False

    @property
    def differentiated(self) -> bool:
        """Whether there was a backward pass."""
        return any(operation.phase == "backward" for operation in self.operations)


class Recorder(TorchDispatchMode):
    """Records a step: ``with Recorder(modules, given) as recorder: …``, setting :attr:`phase` between its parts.

    Args:
        modules: whose calls operations are attributed to, by name.
        given: tensors of any shape that exist before the step and would lie on the GPU: weights, buffers, the batch.
        true_share: for meta tensors, whose numbers nobody knows: which share of a mask's entries ``nonzero`` finds. The counts of
            consecutive calls add up to the share of all of them.

    Attributes:
        phase: under which the next operations are recorded.
        record: the result, complete after the ``with``.
    """

    def __init__(
        self, modules: Mapping[str, nn.Module], given: Iterable[Tensor], *, true_share: float | None = None
    ) -> None:
        super().__init__()
        self._calls = ModuleCalls(modules)
        self._given = [tensor for tensor in given if tensor.layout is torch.strided]
        self._known = {tensor.untyped_storage()._cdata for tensor in self._given}
        self._waits = HostWaits(self._given)
        self._device = next((t.device for t in self._given if t.device.type != "cpu"), torch.device("cpu"))
        self._shapes = ShapeMemory() if self._device.type == "meta" else None
        self._live: dict[int, int] = {}
        self._bytes = 0
        self._kept: set[int] = set()
        self._true_share, self._masked, self._returned = true_share, 0, 0
        self._events: list[tuple[int, Any, Any]] = []
        self._stacked = ExitStack()
        self.phase: Phase = "forward"
        self.record = StepRecord(timed=self._device.type != "meta")

    def __enter__(self) -> Self:
        self._stacked.enter_context(self._calls)
        self._stacked.enter_context(torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor))
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._begun = time.perf_counter()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stacked.close()
        if self._events:
            self._read_events()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if is_view(func):
            found = func(*args, **kwargs)
            self._waits.observe(func, args, kwargs, found)
            return found
        stack = self._calls.current()
        first = self._event()
        start = time.perf_counter()
        found = self._run(func, args, kwargs)
        seconds = time.perf_counter() - start if self.record.timed else 0.0
        if first is not None:
            self._events.append((len(self.record.operations), first, self._event()))
        waits = self._waits.observe(func, args, kwargs, found)
        inputs = list(tensors_in((args, kwargs)))
        self._follow(inputs, found)
        self.record.operations.append(
            Operation(
                func._schema.name, stack, self.phase, operation_flops(func, args, kwargs, found), _size(inputs, found),
                waits, self._bytes, start - self._begun, seconds, tuple(tuple(tensor.shape) for tensor in inputs),
            )
        )  # fmt: skip
        return found

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        if self._true_share is not None and func is torch.ops.aten.nonzero.default and args[0].is_meta:
            self._masked += args[0].numel()
            rows = round(self._masked * self._true_share) - self._returned
            self._returned += rows
            return args[0].new_empty((rows, args[0].dim()), dtype=torch.int64)
        return func(*args, **kwargs) if self._shapes is None else self._shapes.run(func, args, kwargs)

    def _follow(self, inputs: list[Tensor], found: Any) -> None:
        """Count new storages as live until they are freed; what an operation writes to was there before it."""
        before = {tensor.untyped_storage()._cdata for tensor in inputs if tensor.layout is torch.strided}
        for tensor in tensors_in(found):
            if tensor.layout is not torch.strided:
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._live or key in self._known or key in before:
                continue
            self._live[key] = storage.nbytes()
            self._bytes += storage.nbytes()
            weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self._kept.discard(key)
        self._bytes -= self._live.pop(key, 0)

    def _keep(self, tensor: Tensor) -> Tensor:
        """Note what autograd keeps for the backward pass, every storage once."""
        if tensor.layout is torch.strided:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._known and storage._cdata not in self._kept:
                self._kept.add(storage._cdata)
                self.record.saved.append((self._calls.current(), storage.nbytes()))
        return tensor

    def _event(self) -> Any:
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _read_events(self) -> None:
        """On a GPU an operation lasts from event to event, not as long as the host was busy with it."""
        torch.cuda.synchronize(self._device)
        for index, first, last in self._events:
            object.__setattr__(self.record.operations[index], "seconds", first.elapsed_time(last) / 1000)
        self._events.clear()


def is_view(func: Any) -> bool:
    """Whether an operation only looks at memory in another way, which costs no kernel; ``_unsafe_view`` is one that hides it."""
    views = any(arg.alias_info and not arg.alias_info.is_write for arg in func._schema.arguments)
    return views or func._schema.name == "aten::_unsafe_view"


def _size(inputs: list[Tensor], found: Any) -> int:
    tensors = {id(tensor): tensor for tensor in (*inputs, *tensors_in(found))}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
