"""AdamW whose moments take 8 bits, and the bytes that it needs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

STEP = 4
"""Bytes of a parameter's step count."""
_BLOCK, _SMALLEST = 256, 4096
"""Scalars that share a scale in torchao's 8-bit state, and scalars below which it keeps 32 bits."""
_PIECE = 1 << 20
"""Scalars that the 8-bit optimiser updates at once."""
_UPDATE = 64
"""Bytes for each of them: moments and step in fp32, and the tables of indices by which they are coded."""
_ADAMW_ONLY = ("foreach", "maximize", "capturable", "differentiable", "fused", "decoupled_weight_decay", "amsgrad")


def eight_bit_state_bytes(sizes: Iterable[int]) -> int:
    """Bytes of the state for parameters of so many scalars.

    A byte for each scalar and moment, a scale of 4 bytes for each 256, and a table of 1 KiB for each moment of at most 2²⁰ scalars;
    pieces below 4096 scalars, or that 256 does not divide, stay in 32 bits.
    """
    pieces = (min(_PIECE, size - start) for size in sizes for start in range(0, size, _PIECE))
    return sum(STEP + 2 * _moment(size) for size in pieces)


def _moment(size: int) -> int:
    coded = size >= _SMALLEST and size % _BLOCK == 0
    return size + 4 * (size // _BLOCK) + 4 * _BLOCK if coded else 4 * size


def update_bytes(sizes: Iterable[int]) -> int:
    """Bytes that are needed beside the state while the largest of parameters of so many scalars is updated."""
    return _UPDATE * min(_PIECE, max(sizes, default=0))


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
