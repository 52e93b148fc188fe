"""Where an optimiser's state lies and in how many bits: beside the weights in fp32, there in 8 bits, or on the host."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec
from typing import Literal

import torch

from cl_methods.training.memory.eight_bit_optimizer import STEP, EightBitOptimizer, eight_bit_state_bytes
from cl_methods.training.memory.host_optimizer import HostOptimizer

OptimizerState = Literal["fp32", "8bit", "host"]

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
    """Bytes of AdamW's state for parameters of so many scalars, on the device of the weights."""
    if kind == "host":
        return 0
    return eight_bit_state_bytes(sizes) if kind == "8bit" else sum(STEP + 8 * size for size in sizes)
