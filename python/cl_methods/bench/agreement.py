"""Whether two implementations of a step compute the same: without that, neither has a speed."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = 1e-5

Gradients = tuple[Tensor, dict[str, Tensor]]


class CheckError(RuntimeError):
    """An implementation does not compute what it should, so its speed means nothing."""


def compare(case: str, found: Gradients, expected: Gradients) -> dict[str, float]:
    """Relative errors of a loss and its gradients.

    A gradient's error is relative to its own norm, or to a ten-thousandth of the whole gradient's where that is larger: attention's
    key biases have a gradient of rounding errors alone.

    Raises:
        CheckError: one of them exceeds 1e-5, or is not a number.
    """
    (loss, gradients), (expected_loss, wanted) = found, expected
    if gradients.keys() != wanted.keys():
        different = sorted(gradients.keys() ^ wanted.keys())
        raise CheckError(f"{case}: {len(different)} gradients exist on one side only, such as {different[0]}")
    whole = torch.stack([value.double().norm() for value in wanted.values()]).norm()
    errors = {"loss": float((loss - expected_loss).abs() / expected_loss.abs())}
    errors["gradients"] = max(
        float((gradients[name].double() - value.double()).norm() / value.double().norm().clamp(min=1e-4 * whole))
        for name, value in wanted.items()
    )
    for what, error in errors.items():
        if not error <= TOLERANCE:
            raise CheckError(
                f"{case}: {what} differ by {error:.1e}, expected at most {TOLERANCE:.0e}; no speed is reported"
            )
    return errors
