"""Whether two implementations of a step compute the same: without that, neither has a speed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

TOLERANCE = 1e-5
_ROUNDING = 0.1

Gradients = tuple[Tensor, dict[str, Tensor]]


class CheckError(RuntimeError):
    """An implementation does not compute what it should, so its speed means nothing."""


@contextmanager
def full_precision() -> Iterator[None]:
    """Inside, a GPU's convolutions and products of float32 numbers keep all of their digits, as a comparison needs."""
    parts: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [part.allow_tf32 for part in parts]
    try:
        for part in parts:
            part.allow_tf32 = False
        yield
    finally:
        for part, value in zip(parts, before, strict=True):
            part.allow_tf32 = value


def compare(case: str, found: Gradients, expected: Gradients) -> dict[str, float]:
    """Relative errors of a loss and its gradients.

    ``gradient``: of all tensors together, relative to its norm. ``gradients``: the largest of a single tensor, relative to its own
    norm; but errors below a tenth of the dtype's rounding of the whole gradient are rounding, whatever the tensor's norm:
    those of layer norms and biases are sums of large terms that nearly cancel, and attention's key biases have none but
    rounding errors. So in float32 norms count as at least 1.2e-3 of the whole, in float64 as 2e-12.

    Raises:
        CheckError: one of them exceeds 1e-5, or is not a number.
    """
    (loss, gradients), (expected_loss, wanted) = found, expected
    if gradients.keys() != wanted.keys():
        different = sorted(gradients.keys() ^ wanted.keys())
        raise CheckError(f"{case}: {len(different)} gradients exist on one side only, such as {different[0]}")
    whole = torch.stack([value.double().norm() for value in wanted.values()]).norm()
    errors = {"loss": float((loss - expected_loss).abs() / expected_loss.abs())}
    apart = {name: (gradients[name].double() - value.double()).norm() for name, value in wanted.items()}
    errors["gradient"] = float(torch.stack(list(apart.values())).norm() / whole)
    errors["gradients"] = max(
        float(
            apart[name] / value.double().norm().clamp(min=_ROUNDING * torch.finfo(value.dtype).eps * whole / TOLERANCE)
        )
        for name, value in wanted.items()
    )
    for what, error in errors.items():
        if not error <= TOLERANCE:
            raise CheckError(
                f"{case}: {what} differ by {error:.1e}, expected at most {TOLERANCE:.0e}; no speed is reported"
            )
    return errors
