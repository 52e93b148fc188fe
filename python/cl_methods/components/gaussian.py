"""Gaussian densities of tasks in a feature space, evaluated by one product with a cached whitening matrix for each."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

_CHUNK = 1024


def fit_gaussian(features: Tensor, ridge: float = 1e-7, shrinkage: float = 0.0) -> tuple[Tensor, Tensor]:
    """Mean (d,) and covariance (d, d) of ``features`` (N, d) in float64: ``(1 - α) Σ + α (tr Σ / d) I``, Σ unbiased + ridge I.

    With fewer rows than dimensions Σ has only the ridge in the directions that the rows leave out, so that the log density of any
    other feature is as low as ``-r² / (2 ridge)``, r being its distance from the rows' span; a little α takes that away.

    Args:
        features: at least two rows.
        ridge: added to the diagonal.
        shrinkage: α in [0, 1).

    Raises:
        ValueError: fewer than two rows, ``ridge`` is not positive, or ``shrinkage`` not in [0, 1).
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features: expected (N, d) with at least two rows, got {tuple(features.shape)}")
    if not ridge > 0:
        raise ValueError(f"ridge: expected a number > 0, got {ridge}")
    if not 0 <= shrinkage < 1:
        raise ValueError(f"shrinkage: expected 0 <= value < 1, got {shrinkage}")
    features = features.double()
    mean = features.mean(dim=0)
    centred = features - mean
    covariance = centred.T @ centred / (len(features) - 1)
    covariance.diagonal().add_(ridge)
    level = shrinkage * covariance.diagonal().mean()
    covariance *= 1 - shrinkage
    covariance.diagonal().add_(level)
    return mean, covariance


def whiten(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """``W = L⁻¹`` (d, d) and ``log det Σ``, a scalar, for ``Σ = L Lᵀ``, the ``covariance`` (d, d); in float64.

    ``(f - μ)ᵀ Σ⁻¹ (f - μ) = ||W (f - μ)||²``.

    Raises:
        ValueError: Σ is not positive definite.
    """
    factor, failed = torch.linalg.cholesky_ex(covariance.double())
    if failed:
        raise ValueError("covariance: not positive definite; a larger ridge makes it so")
    identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
    return inverse, 2 * factor.diagonal().log().sum()


class TaskGaussians(nn.Module):
    """``e_t(f) = log N(f; μ_t, Σ_t)`` for any number of tasks, added one by one.

    Each covariance is factorised once, when its task is added; what is stored is its inverse factor.

    Attributes:
        means: (T, d) float32.
        factors: (T, d, d) float32, the whitening matrices W_t.
        peaks: (T,) float32, the log densities at the means, ``-(d log 2π + log det Σ_t) / 2``.
        typical: (T, 2) float32, mean and standard deviation of the log density over held-out images of each task, or (0, 1).

    Args:
        device: where they are kept.
    """

    means: Tensor
    factors: Tensor
    peaks: Tensor
    typical: Tensor

    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__()
        self.register_buffer("means", torch.zeros(0, 0, device=device))
        self.register_buffer("factors", torch.zeros(0, 0, 0, device=device))
        self.register_buffer("peaks", torch.zeros(0, device=device))
        self.register_buffer("typical", torch.zeros(0, 2, device=device))

    def __len__(self) -> int:
        return len(self.means)

    def add(self, mean: Tensor, covariance: Tensor) -> None:
        """One more task with ``mean`` (d,) and ``covariance`` (d, d).

        Raises:
            ValueError: the covariance is not positive definite, or d differs from that of the tasks before.
        """
        if len(self) and mean.shape != self.means[0].shape:
            raise ValueError(f"mean: expected {tuple(self.means[0].shape)}, got {tuple(mean.shape)}")
        inverse, log_determinant = whiten(covariance)
        peak = -0.5 * (len(mean) * math.log(2 * math.pi) + log_determinant)
        unknown = torch.tensor([0.0, 1.0])
        for name, value in (("means", mean), ("factors", inverse), ("peaks", peak), ("typical", unknown)):
            row = value.float()[None].to(self.means.device)
            setattr(self, name, torch.cat([getattr(self, name), row]) if len(getattr(self, name)) else row)

    def calibrate(self, features: Tensor) -> None:
        """Set what is typical of the latest task from held-out ``features`` (N, d) of it, at least two."""
        found = self.log_prob(features)[:, -1]
        self.typical[-1] = torch.stack([found.mean(), found.std().clamp(min=1e-6)])

    @torch.no_grad()
    def log_prob(self, features: Tensor) -> Tensor:
        """Log densities (B, T) in nats of ``features`` (B, d): one batched product for up to 1,024 of them."""
        return torch.cat([self._log_prob(rows) for rows in features.float().split(_CHUNK)])

    def _log_prob(self, features: Tensor) -> Tensor:
        centred = features - self.means[:, None]
        whitened = torch.bmm(centred, self.factors.mT)
        return (self.peaks[:, None] - 0.5 * whitened.square().sum(dim=-1)).T

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore ``state_dict()``, whatever the number of tasks.

        Raises:
            RuntimeError: tensors are missing or too many.
        """
        expected = dict(self.named_buffers())
        if state.keys() != expected.keys():
            raise RuntimeError(f"state: expected {', '.join(expected)}, got {', '.join(state) or 'nothing'}")
        for name, value in expected.items():
            setattr(self, name, state[name].to(value.device, torch.float32))
