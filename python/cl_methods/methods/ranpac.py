"""RanPAC: ridge regression from random features to class indicators, accumulated over tasks in a Gram matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_methods.datasets.task import Task
from cl_methods.methods.base import Facts
from cl_methods.methods.random_features import RandomFeatureConfig, RandomFeatureMethod

_CHUNK = 4096
_EXPONENT = 37  # a ridge is stored in float32


@dataclass(frozen=True)
class RanPACConfig(RandomFeatureConfig):
    """Settings of :class:`RanPAC`; the published ones by default.

    Attributes:
        ridge_exponents: smallest and largest exponent of the ridges 10^e that are tried.
        held_out: share of a task's training images, the last of the pass, that choose the ridge.
    """

    ridge_exponents: tuple[int, int] = (-8, 8)
    held_out: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out: expected 0 < value < 1, got {self.held_out}")
        smallest, largest = self.ridge_exponents
        if not -_EXPONENT <= smallest <= largest <= _EXPONENT:
            raise ValueError(
                f"ridge_exponents: expected a smallest and a largest one from -{_EXPONENT} to {_EXPONENT}, got "
                f"{self.ridge_exponents}"
            )


class RanPAC(RandomFeatureMethod):
    """``W = Qᵀ (G + λI)⁻¹`` with ``G = Σ h hᵀ`` and the class prototypes ``Q = Σ h yᵀ`` summed over every image of every task.

    The order of tasks does not matter but for λ, chosen anew with each task: the power of ten whose head, fitted to the first
    80 % of this task's images alone, has the smallest squared error on the other 20 %. G and Q take in all of them.

    Stored between tasks: G (M, M), Q (M, C), λ, and what :class:`RandomFeatureMethod` stores. Task identity is not used at test
    time, in any label space; classes that were not learnt are scored by the zero-shot text classifier (see there).

    Source: McDonnell et al., "RanPAC: Random Projections and Pre-trained Models for Continual Learning", NeurIPS 2023,
    algorithm 1, phase 2. Phase 1, which tunes adapters on the first task, is left out: CLIP stays frozen, so that tasks to
    come keep their zero-shot accuracy.
    """

    name: ClassVar[str] = "ranpac"
    facts: ClassVar[Facts] = Facts(
        source="McDonnell et al., NeurIPS 2023",
        trains="one linear head, in closed form",
        carries="a Gram matrix, class sums",
    )
    Config: ClassVar[type[RandomFeatureConfig]] = RanPACConfig
    config: RanPACConfig
    stores: ClassVar[tuple[str, ...]] = ("gram", "prototypes", "ridge")

    def check_tasks(self, tasks: Sequence[Task]) -> None:
        """Every task needs images on both sides of ``held_out``."""
        super().check_tasks(tasks)
        for task in tasks:
            fitted_images(len(task.train), self.config.held_out)

    def fit(self, features: Tensor, labels: Tensor, classes: int) -> dict[str, Tensor]:
        """Add the task to G and Q, choose λ, solve. See :meth:`RandomFeatureMethod.fit`."""
        present, places = labels.unique(return_inverse=True)
        targets = F.one_hot(places, len(present)).float()  # other classes would add columns of zeros, which fit exactly
        smallest, largest = self.config.ridge_exponents
        ridges = [10.0**exponent for exponent in range(smallest, largest + 1)]
        ridge = choose_ridge(self.lift, features, targets, ridges, self.config.held_out)
        gram, sums = normal_equations(self.lift, features, targets)
        prototypes = sums.new_zeros(len(sums), classes)
        prototypes[:, present] = sums
        before, old = self.stored("gram"), self.stored("prototypes")
        if before is not None and old is not None:
            gram += before
            prototypes[:, : old.shape[1]] += old
        weight = solve_ridge(gram, prototypes, ridge).T.contiguous()
        return {"gram": gram, "prototypes": prototypes, "ridge": torch.tensor(ridge), "weight": weight}


def normal_equations(lift: Callable[[Tensor], Tensor], features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """``G = HᵀH`` (M, M) and ``Q = HᵀY`` (M, C) with H = lift(features), which is never held as a whole.

    Args:
        lift: (N, d) -> (N, M).
        features: (N, d), N at least 1.
        targets: Y (N, C).
    """
    gram: Tensor | None = None
    for some, wanted in zip(features.split(_CHUNK), targets.split(_CHUNK), strict=True):
        rows = lift(some)
        if gram is None:
            gram, prototypes = rows.T @ rows, rows.T @ wanted
        else:
            gram.addmm_(rows.T, rows)
            prototypes.addmm_(rows.T, wanted)
    assert gram is not None
    return gram, prototypes


def choose_ridge(
    lift: Callable[[Tensor], Tensor],
    features: Tensor,
    targets: Tensor,
    ridges: Sequence[float],
    held_out: float = 0.2,
) -> float:
    """The ridge with the smallest mean squared error on the last rows, fitted to the others; the first of equal ones.

    One eigendecomposition serves all ridges, of the smaller of ``HHᵀ`` (n, n) and ``HᵀH`` (M, M): the head's outputs on rows
    H' are ``H'Hᵀ V (Λ + λ)⁻¹ VᵀY`` or ``H' V (Λ + λ)⁻¹ VᵀHᵀY``. The products are rounded as in the fit that follows, so a ridge
    below their rounding error loses here rather than there; the decomposition is in float64.

    Args:
        lift: (N, d) -> (N, M).
        features: (N, d), N at least 2.
        targets: Y (N, C).
        ridges: what to choose from.
        held_out: share of the rows that choose.

    Raises:
        ValueError: ``held_out`` leaves no row to fit or to choose by.
    """
    count = fitted_images(len(features), held_out)
    rest = lift(features[count:])
    if count <= rest.shape[1]:
        rows = lift(features[:count])
        gram, right, left = rows @ rows.T, targets[:count], rest @ rows.T
    else:
        gram, right = normal_equations(lift, features[:count], targets[:count])
        left = rest
    values, vectors = torch.linalg.eigh(gram.double())
    left, right, wanted = left.double() @ vectors, vectors.T @ right.double(), targets[count:].double()
    errors = torch.stack([(left @ (right / (values + ridge)[:, None]) - wanted).square().mean() for ridge in ridges])
    return ridges[int(errors.nan_to_num(nan=torch.inf).argmin())]


def fitted_images(images: int, held_out: float) -> int:
    """How many of a task's ``images`` the head is fitted to when a share of them chooses the ridge.

    Raises:
        ValueError: one of the two parts is empty.
    """
    count = int(images * (1 - held_out))
    if not 0 < count < images:
        raise ValueError(f"held_out: {held_out} of {images} images leaves {count} to fit the head to; need both parts")
    return count


def solve_ridge(gram: Tensor, prototypes: Tensor, ridge: float) -> Tensor:
    """``(G + λI)⁻¹ Q`` (M, C) in the dtype of ``prototypes``, computed in float64.

    A Gram matrix rounded to float32 may be indefinite when λ is tiny; then a factorisation with pivots replaces Cholesky's.

    Args:
        gram: G (M, M), symmetric.
        prototypes: Q (M, C).
        ridge: λ.
    """
    matrix = gram.double()
    matrix = matrix.clone() if matrix is gram else matrix
    matrix.diagonal().add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        return torch.linalg.solve(matrix, prototypes.double()).to(prototypes.dtype)
    return torch.cholesky_solve(prototypes.double(), factor).to(prototypes.dtype)
