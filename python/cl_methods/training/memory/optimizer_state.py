"""Where an optimiser's state lies and in how many bits: beside the weights in fp32, there in 8 bits, or on the host."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn

OptimizerState = Literal["fp32", "8bit", "host"]

_BLOCK, _SMALLEST = 256, 4096
"""Scalars that share a scale in torchao's 8-bit state, and scalars below which it keeps 32 bits."""
_STEP = 4
"""Bytes of a parameter's step count."""
_PIECE = 1 << 20
"""Scalars that the 8-bit optimiser updates at once."""
_UPDATE = 64
"""Bytes for each of them: moments and step in fp32, and the tables of indices by which they are coded."""
_ADAMW_ONLY = ("foreach", "maximize", "capturable", "differentiable", "fused", "decoupled_weight_decay", "amsgrad")
_ON_HOST = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD)


def require_library(kind: OptimizerState) -> None:
    """Make sure that the package behind a kind of state is installed.

    Raises:
        ValueError: it is not; the message names it.
    """
    if kind == "8bit" and find_spec("torchao") is None:
        raise ValueError(
            "optimizer_state: 8bit takes its optimiser from the package torchao, which is not installed; "
            "pip install 'cl-kernels[8bit]' (or torchao), or expected fp32 or host"
        )


def load_library(kind: OptimizerState) -> None:
    """Import the package behind a kind of state, so that the memory it takes can be seen.

    Raises:
        ValueError: it is not installed.
    """
    require_library(kind)
    if kind == "8bit":
        import_module("torchao.optim")


def with_state(optimizer: torch.optim.Optimizer, kind: OptimizerState) -> torch.optim.Optimizer:
    """An optimiser like ``optimizer``, which has not taken a step, with its state kept as ``kind`` says.

    Args:
        optimizer: fresh; not to be used any more, unless it is what is returned.
        kind: ``fp32``: as it is; ``8bit``: AdamW with moments in 8 bits (torchao); ``host``: state and steps on the host, where
            the weights are on another device.

    Raises:
        ValueError: there is no such form of this optimiser, or the package is missing.
    """
    check_optimizer(optimizer, kind)
    if kind == "8bit":
        require_library(kind)
        return EightBitOptimizer(optimizer)
    device = next(value.device for group in optimizer.param_groups for value in group["params"])
    return HostOptimizer(optimizer) if kind == "host" and device.type != "cpu" else optimizer


def check_optimizer(optimizer: torch.optim.Optimizer, kind: OptimizerState) -> None:
    """Make sure that an optimiser has a form of this ``kind``.

    Raises:
        ValueError: it has none.
    """
    name = type(optimizer).__name__
    if kind == "8bit" and not takes_eight_bits(optimizer):
        raise ValueError(
            f"optimizer_state: 8bit is for AdamW, this method's optimiser is {name}; expected fp32 or host"
        )
    if kind == "host" and type(optimizer) not in _ON_HOST:
        expected = ", ".join(one.__name__ for one in _ON_HOST)
        raise ValueError(
            f"optimizer_state: host is for {expected}, this method's optimiser is {name}, whose state is that of adapters "
            "alone; expected fp32"
        )


def takes_eight_bits(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimiser is the AdamW that torchao has in 8 bits."""
    plain = not any(group.get("amsgrad") or group.get("maximize") for group in optimizer.param_groups)
    return type(optimizer) is torch.optim.AdamW and plain


def state_bytes(sizes: Iterable[int], kind: OptimizerState) -> int:
    """Bytes of AdamW's state for parameters of so many scalars, on the device of the weights.

    In 8 bits: a byte for each scalar and moment, a scale of 4 bytes for each 256, and a table of 1 KiB for each moment of at most
    2²⁰ scalars; pieces below 4096 scalars, or that 256 does not divide, stay in 32 bits.
    """
    if kind == "host":
        return 0
    if kind == "fp32":
        return sum(_STEP + 8 * size for size in sizes)
    pieces = (min(_PIECE, size - start) for size in sizes for start in range(0, size, _PIECE))
    return sum(_STEP + 2 * _moment(size) for size in pieces)


def _moment(size: int) -> int:
    coded = size >= _SMALLEST and size % _BLOCK == 0
    return size + 4 * (size // _BLOCK) + 4 * _BLOCK if coded else 4 * size


def update_bytes(sizes: Iterable[int]) -> int:
    """Bytes that the 8-bit AdamW needs beside its state while it updates the largest of parameters of so many scalars."""
    return _UPDATE * min(_PIECE, max(sizes, default=0))


class HostOptimizer(torch.optim.Optimizer):
    """The steps of an optimiser, taken on the host: weights and gradients are copied there, new weights back.

    The device holds none of the state. Gradients are fetched when the step is taken, not in the backward pass, because what has a
    closed form is added to them in between. State dicts are those of the optimiser itself, so that checkpoints
    with and without this fit each other.

    Args:
        optimizer: AdamW, Adam or SGD, which has not taken a step; it is taken over.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._host = optimizer
        self._buffers: dict[Tensor, Tensor] = {}
        groups = [dict(group) for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["params"] = [self._copy_of(value) for value in group["params"]]
            group["fused"], group["foreach"] = True, False  # one pass over weight, gradient and state
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient.

        Raises:
            ValueError: there is a closure.
        """
        if closure is not None:
            raise ValueError("closure: not supported, expected None")
        moved: list[tuple[Tensor, Tensor]] = []
        for group, host_group in zip(self.param_groups, self._host.param_groups, strict=True):
            own = {"params": host_group["params"], "fused": True, "foreach": False}
            host_group.update({**group, **own})
            for value, copy in zip(group["params"], host_group["params"], strict=True):
                copy.grad = None if value.grad is None else self._buffer_of(copy)
                if value.grad is not None:
                    copy.grad.copy_(value.grad, non_blocking=True)
                    copy.copy_(value, non_blocking=True)  # averaging may have moved it since the last step
                    moved.append((value, copy))
        for device in {value.device for value, _ in moved if value.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
        self._host.step()
        for value, copy in moved:
            value.copy_(copy, non_blocking=True)

    def state_dict(self) -> dict[str, Any]:
        """That of the optimiser itself."""
        state = self._host.state_dict()
        groups = [
            {**group, "fused": own["fused"], "foreach": own["foreach"]}
            for group, own in zip(state["param_groups"], self.param_groups, strict=True)
        ]
        return {**state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`, also one of the same optimiser beside its weights."""
        self._host.load_state_dict(state_dict)

    def _copy_of(self, value: Tensor) -> nn.Parameter:
        return nn.Parameter(torch.empty_like(value, device="cpu", pin_memory=value.is_cuda))

    def _buffer_of(self, copy: Tensor) -> Tensor:
        if copy not in self._buffers:
            self._buffers[copy] = torch.empty_like(copy, pin_memory=copy.is_pinned())
        return self._buffers[copy]


class EightBitOptimizer(torch.optim.Optimizer):
    """AdamW whose moments take 8 bits: blocks of 256 scalars with a scale, by the package torchao.

    torchao updates one tensor at a time in fp32; tensors of more than 2²⁰ scalars are given to it in pieces, which bounds what that
    takes. Learning rates are numbers, as elsewhere, and state dicts hold plain tensors, which loading never has to run code for.

    Args:
        optimizer: AdamW, which has not taken a step; its parameters and settings are taken over.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        from torchao.optim import AdamW8bit
        from torchao.optim.subclass_8bit import OptimState8bit

        groups = [
            {name: value for name, value in group.items() if name not in _ADAMW_ONLY}
            for group in optimizer.param_groups
        ]
        super().__init__(groups, {})
        self._coded = OptimState8bit
        self._pieces = [[list(_pieces(value)) for value in group["params"]] for group in self.param_groups]
        self._inner: Any = AdamW8bit(
            [
                {**group, "params": [piece for pieces in found for piece in pieces]}
                for group, found in zip(self.param_groups, self._pieces, strict=True)
            ]
        )
        self._rates = [group["lr"] for group in self._inner.param_groups]  # scalar tensors, as torchao wants them
        self._on_host = all(value.device.type == "cpu" for group in self.param_groups for value in group["params"])

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient.

        Raises:
            ValueError: there is a closure.
        """
        if closure is not None:
            raise ValueError("closure: not supported, expected None")
        for group, inner, rate in zip(self.param_groups, self._inner.param_groups, self._rates, strict=True):
            rate.fill_(float(group["lr"]))
            inner["lr"] = rate
        for group, found in zip(self.param_groups, self._pieces, strict=True):
            for value, pieces in zip(group["params"], found, strict=True):
                for piece, gradient in zip(pieces, _cut(value.grad, len(pieces)), strict=True):
                    piece.grad = gradient
        # Compiling a kernel for every size is worth it on a GPU alone.
        with torch.compiler.set_stance("force_eager" if self._on_host else "default"):
            self._inner.step()
        for found in self._pieces:
            for pieces in found:
                for piece in pieces:
                    piece.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors and numbers; of coded moments ``codes`` (n,) uint8, ``scale`` (n / 256,) and whether they are signed."""
        state = self._inner.state_dict()
        return {**state, "state": {key: self._plain(entry) for key, entry in state["state"].items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        entries = {key: self._code(entry) for key, entry in state_dict["state"].items()}
        self._inner.load_state_dict({**state_dict, "state": entries})

    def _plain(self, entry: dict[str, Any]) -> dict[str, Any]:
        return {
            name: {"codes": value.codes, "scale": value.scale, "signed": value.signed}
            if isinstance(value, self._coded)
            else value
            for name, value in entry.items()
        }

    def _code(self, entry: dict[str, Any]) -> dict[str, Any]:
        return {name: self._restored(value) if isinstance(value, dict) else value for name, value in entry.items()}

    def _restored(self, stored: dict[str, Any]) -> Tensor:
        codes = stored["codes"]
        state = self._coded.zeros(codes.shape, stored["signed"], _BLOCK, codes.device, dtype=torch.float32)
        state.codes.copy_(codes)
        state.scale.copy_(stored["scale"])
        return state


def _pieces(value: Tensor) -> Sequence[Any]:
    """``value`` (any shape) itself, or views of its consecutive scalars, each a leaf."""
    whole = not value.is_contiguous() or hasattr(value, "device_mesh")  # sharded over processes
    return _cut(value.detach(), 1 if whole else -(-value.numel() // _PIECE))


def _cut(value: Tensor | None, count: int) -> Sequence[Tensor | None]:
    if value is None:
        return [None] * count
    return [value] if count == 1 else value.reshape(-1).split(_PIECE)
