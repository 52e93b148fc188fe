"""Whether two implementations of a step compute the same: without that, neither has a speed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

TOLERANCE = 1e-5
_ROUNDING = 0.1

Gradients = tuple[Tensor, dict[str, Tensor]]


class CheckError(RuntimeError):
    """An implementation does not compute what it should, so its speed means nothing."""


@contextmanager
def full_precision() -> Iterator[None]:
    """Inside, a GPU's convolutions and products of float32 numbers keep all of their digits, as a comparison needs."""
    cudnn: Any = torch.backends.cudnn  # whose parts type checkers do not see
    parts: tuple[Any, ...] = (cudnn.conv, torch.backends.cuda.matmul)
    before = [part.fp32_precision for part in parts]
    try:
        for part in parts:
            part.fp32_precision = "ieee"
        yield
    finally:
        for part, value in zip(parts, before, strict=True):
            part.fp32_precision = value


def compare(
    case: str, found: Gradients, expected: Gradients, exact: Callable[[], Gradients] | None = None
) -> dict[str, float]:
    """Relative errors of a loss and its gradients.

    ``gradient``: of all tensors together, relative to its norm. ``gradients``: the largest of a single tensor, relative to its own
    norm; but errors below a tenth of the dtype's rounding of the whole gradient are rounding, whatever the tensor's norm:
    those of layer norms and biases are sums of large terms that nearly cancel, and attention's key biases have none but
    rounding errors. So in float32 norms count as at least 1.2e-3 of the whole, in float64 as 2e-12.

    Args:
        case: what was computed.
        found, expected: loss and gradients by name, from the two implementations.
        exact: the same in float64. Where the two are further apart, each is compared with that, and what was found may be off by
            twice as much as what was expected.

    Raises:
        CheckError: an error exceeds 1e-5 and is not one of rounding, or is not a number.
    """
    if found[1].keys() != expected[1].keys():
        different = sorted(found[1].keys() ^ expected[1].keys())
        raise CheckError(f"{case}: {len(different)} gradients exist on one side only, such as {different[0]}")
    errors = _errors(found, expected)
    allowed = dict.fromkeys(errors, TOLERANCE)
    if exact is not None and not _within(errors, allowed):
        truth = exact()
        errors, others = _errors(found, truth), _errors(expected, truth)
        allowed = {what: max(TOLERANCE, 2 * error) for what, error in others.items()}
    for what, error in errors.items():
        if not error <= allowed[what]:
            raise CheckError(
                f"{case}: {what} differ by {error:.1e}, expected at most {allowed[what]:.0e}; no speed is reported"
            )
    return errors


def _within(errors: dict[str, float], allowed: dict[str, float]) -> bool:
    return all(error <= allowed[what] for what, error in errors.items())


def _errors(found: Gradients, expected: Gradients) -> dict[str, float]:
    """Norms are those of the expected gradients, rounding is that of the found ones."""
    (loss, gradients), (expected_loss, wanted) = found, expected
    norms = {name: value.double().norm() for name, value in wanted.items()}
    whole = torch.stack(list(norms.values())).norm()
    apart = {name: (gradients[name].double() - value.double()).norm() for name, value in wanted.items()}
    return {
        "loss": float((loss.double() - expected_loss.double()).abs() / expected_loss.abs()),
        "gradient": float(torch.stack(list(apart.values())).norm() / whole),
        "gradients": max(
            float(apart[name] / norm.clamp(min=_ROUNDING * torch.finfo(gradients[name].dtype).eps * whole / TOLERANCE))
            for name, norm in norms.items()
        ),
    }


@contextmanager
def in_double(*modules: nn.Module) -> Iterator[None]:
    """Inside, weights and buffers of float32 modules are float64; what they were comes back exactly."""
    for module in modules:
        module.double()
    try:
        yield
    finally:
        for module in modules:
            module.float()
