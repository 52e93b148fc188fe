"""Densities of a task's features: a Gaussian, one whose covariance is of low rank plus noise, or a sum of kernels."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from cl_methods.components.gaussian import fit_gaussian, whiten

_ROWS, _CENTRES = 512, 2048
_BANDWIDTHS = tuple(2.0**exponent for exponent in range(-4, 5))


class Density(nn.Module, ABC):
    """``log p(f)`` of features (B, d), fitted once; all of it are buffers, so that :meth:`load` needs no shapes.

    Attributes:
        typical: (2,), mean and standard deviation of the log density over held-out features of the same task.
    """

    typical: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("typical", torch.zeros(2))

    @abstractmethod
    def _rows(self, features: Tensor) -> Tensor:
        """Log densities (b,) in nats of features (b, d), few enough to compute at once."""

    @torch.no_grad()
    def log_prob(self, features: Tensor) -> Tensor:
        """Log densities (B,) in nats of ``features`` (B, d), any number of them in bounded memory."""
        return torch.cat([self._rows(rows) for rows in features.float().split(_ROWS)])

    def calibrate(self, held_out: Tensor) -> None:
        """Set :attr:`typical` from features ``held_out`` (N, d) that the density was not fitted to, at least two."""
        found = self.log_prob(held_out)
        self.typical = torch.stack([found.mean(), found.std().clamp(min=1e-6)])

    def load(self, state: dict[str, Tensor], device: torch.device) -> None:
        """Restore ``state_dict()``, whatever the sizes.

        Raises:
            RuntimeError: the state is one of another kind of density.
        """
        expected = {name for name, _ in self.named_buffers()}
        if state.keys() != expected:
            raise RuntimeError(f"state: expected {', '.join(sorted(expected))}, got {', '.join(sorted(state))}")
        for name, value in state.items():
            setattr(self, name, value.to(device))

    def _empty(self, *names: str) -> None:
        self._set(**{name: torch.zeros(0) for name in names})

    def _set(self, **buffers: Tensor) -> None:
        for name, value in buffers.items():
            self.register_buffer(name, value.float())


class Gaussian(Density):
    """``log N(f; μ, Σ)``, Σ mixed with a multiple of the identity: ``(1 - α) Σ + α (tr Σ / d) I``.

    Args:
        features: (N, d) to fit to, or None for one that :meth:`Density.load` fills.
        shrinkage: α in [0, 1); above 0 it makes fewer images than dimensions enough.
    """

    mean: Tensor
    factor: Tensor
    peak: Tensor

    def __init__(self, features: Tensor | None = None, shrinkage: float = 0.0) -> None:
        super().__init__()
        self._empty("mean", "factor", "peak")
        if features is not None:
            mean, covariance = fit_gaussian(features, shrinkage=shrinkage)
            factor, log_determinant = whiten(covariance)
            self._set(mean=mean, factor=factor, peak=_peak(len(mean), log_determinant))

    def _rows(self, features: Tensor) -> Tensor:
        return self.peak - 0.5 * ((features - self.mean) @ self.factor.T).square().sum(dim=1)


class LowRankGaussian(Density):
    """A Gaussian with covariance ``V Λ Vᵀ + σ² (I - V Vᵀ)``: the ``rank`` largest variances, and the mean of the others.

    Its maximum-likelihood form; it stores d (r + 1) numbers instead of d².

    Args:
        features: (N, d) to fit to, or None for one that :meth:`Density.load` fills.
        rank: r, below d.
        shrinkage: as for :class:`Gaussian`.

    Raises:
        ValueError: the rank is not below d.

    Source: Tipping and Bishop, "Probabilistic Principal Component Analysis", 1999.
    """

    mean: Tensor
    directions: Tensor
    noise: Tensor
    peak: Tensor

    def __init__(self, features: Tensor | None = None, rank: int = 32, shrinkage: float = 0.0) -> None:
        super().__init__()
        self._empty("mean", "directions", "noise", "peak")
        if features is None:
            return
        if not rank < features.shape[1]:
            raise ValueError(f"rank: expected less than the width of the features, {features.shape[1]}, got {rank}")
        mean, covariance = fit_gaussian(features, shrinkage=shrinkage)
        variances, vectors = torch.linalg.eigh(covariance)
        large, noise = variances[-rank:], variances[:-rank].mean()
        # ||f - μ||²/σ² minus the squares of these products is the squared Mahalanobis distance
        directions = vectors[:, -rank:].T * (1 / noise - 1 / large).clamp(min=0).sqrt()[:, None]
        log_determinant = large.log().sum() + (len(mean) - rank) * noise.log()
        self._set(mean=mean, directions=directions, noise=noise, peak=_peak(len(mean), log_determinant))

    def _rows(self, features: Tensor) -> Tensor:
        centred = features - self.mean
        inside = (centred @ self.directions.T).square().sum(dim=1)
        return self.peak - 0.5 * (centred.square().sum(dim=1) / self.noise - inside)


class KernelDensity(Density):
    """``p(f) = 1/N Σ_i N(f; c_i, h² I)`` around stored features c_i of training images.

    Distances are computed for blocks of rows and centres, and the sums over blocks merged in the log domain, so that memory does
    not grow with their product.

    Args:
        features: (N, d), the centres, or None for one that :meth:`Density.load` fills.
        bandwidth: h; 0 chooses the one with the highest mean log density of ``held_out``, among powers of two times the
            root of the mean squared distance to the nearest centre per dimension.
        held_out: (M, d) features that choose h; needed for ``bandwidth`` 0 only.

    Raises:
        ValueError: ``bandwidth`` is 0 and ``held_out`` is missing.

    Source: Parzen, "On Estimation of a Probability Density Function and Mode", 1962; one estimate per task, of which the highest
    answers: Zhang and Wang, "Density Distribution-based Learning Framework for Addressing Online Continual Learning
    Challenges", arXiv 2311.13623, 2023.
    """

    centres: Tensor
    bandwidth: Tensor

    def __init__(self, features: Tensor | None = None, bandwidth: float = 0.0, held_out: Tensor | None = None) -> None:
        super().__init__()
        self._empty("centres", "bandwidth")
        if features is None:
            return
        self._set(centres=features)
        if bandwidth > 0:
            self.bandwidth = self.centres.new_tensor(bandwidth)
        elif held_out is not None:
            self._choose_bandwidth(held_out.float())
        else:
            raise ValueError("bandwidth: 0 chooses one by held-out features; there are none")

    def _choose_bandwidth(self, held_out: Tensor) -> None:
        nearest = torch.cat([self._nearest(rows) for rows in held_out.split(_ROWS)])
        unit = (nearest.mean() / held_out.shape[1]).clamp(min=1e-12).sqrt()
        likelihoods = []
        for factor in _BANDWIDTHS:
            self.bandwidth = factor * unit
            likelihoods.append(self.log_prob(held_out).mean())
        self.bandwidth = _BANDWIDTHS[int(torch.stack(likelihoods).argmax())] * unit

    def _nearest(self, rows: Tensor) -> Tensor:
        blocks = [_squared_distances(rows, centres).amin(dim=1) for centres in self.centres.split(_CENTRES)]
        return torch.stack(blocks).amin(dim=0)

    def _rows(self, features: Tensor) -> Tensor:
        total = features.new_full((len(features),), -torch.inf)
        for centres in self.centres.split(_CENTRES):
            exponents = _squared_distances(features, centres) / (-2 * self.bandwidth.square())
            total = torch.logaddexp(total, exponents.logsumexp(dim=1))
        count, width = self.centres.shape
        return total - math.log(count) - width * (self.bandwidth.log() + 0.5 * math.log(2 * math.pi))


def _peak(width: int, log_determinant: Tensor) -> Tensor:
    return -0.5 * (width * math.log(2 * math.pi) + log_determinant)


def _squared_distances(rows: Tensor, centres: Tensor) -> Tensor:
    lengths = rows.square().sum(dim=1, keepdim=True) + centres.square().sum(dim=1)
    return torch.addmm(lengths, rows, centres.T, alpha=-2).clamp_(min=0)
