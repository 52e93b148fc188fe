"""LoRanPAC: least squares on very many random features through a truncated SVD that is updated from task to task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_methods.checks import check_at_least
from cl_methods.methods.base import Facts
from cl_methods.methods.random_features import RandomFeatureConfig, RandomFeatureMethod


@dataclass(frozen=True)
class LoRanPACConfig(RandomFeatureConfig):
    """Settings of :class:`LoRanPAC`; the published ones by default, which need a GPU: U alone has 4 GB.

    Attributes:
        rank: most singular vectors that are kept.
        truncated: share of the singular values, the smallest, that is dropped: after n images at most (1 - truncated) n are kept,
            and never more than (1 - truncated) M.
        block: images per update of the SVD; a larger task takes several.
    """

    width: int = 100000
    rank: int = 10000
    truncated: float = 0.25
    block: int = 10000

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, 1, "rank", "block")
        if not 0 <= self.truncated < 1:
            raise ValueError(f"truncated: expected 0 <= value < 1, got {self.truncated}")


class LoRanPAC(RandomFeatureMethod):
    """``W = Qᵀ U S⁻² Uᵀ``: minimum-norm least squares on the truncated SVD ``H_{1:t}ᵀ ≈ U S Vᵀ`` of the random features so far.

    Dropping the smallest singular values takes the ridge's place, so nothing has to be chosen on held-out images. A new block
    changes U and S through the SVD of ``[U S, Hᵀ]``, of which only a core of rank + block rows is decomposed; the prototypes
    ``Q = Σ h yᵀ`` are exact. Costs grow with M times rank instead of M², which allows far more random features than RanPAC has.

    Stored between tasks: U (M, r), S (r,), Q (M, C), the number of images so far, and what :class:`RandomFeatureMethod` stores.
    Task identity is not used at test time, in any label space; classes that were not learnt are scored by the zero-shot text
    classifier (see there).

    Source: Peng et al., "LoRanPAC: Low-rank Random Features and Pre-trained Models for Bridging Theory and Practice in Continual
    Learning", ICLR 2025 (first called ICL-TSVD), without the variant that tunes adapters on the first task. Unlike its public
    code, singular values at rounding error, which duplicate images cause, are dropped whatever ``truncated`` says.
    """

    name: ClassVar[str] = "loranpac"
    facts: ClassVar[Facts] = Facts(
        source="Peng et al., ICLR 2025",
        trains="one linear head, in closed form",
        carries="a truncated factorisation, class sums",
    )
    Config: ClassVar[type[RandomFeatureConfig]] = LoRanPACConfig
    config: LoRanPACConfig
    stores: ClassVar[tuple[str, ...]] = ("vectors", "values", "prototypes", "images")

    def fit(self, features: Tensor, labels: Tensor, classes: int) -> dict[str, Tensor]:
        """Update U, S and Q block by block, then the head. See :meth:`RandomFeatureMethod.fit`."""
        config, width = self.config, self.config.width
        vectors, values, old = self.stored("vectors"), self.stored("values"), self.stored("prototypes")
        images = self.stored("images")
        seen = 0 if images is None else int(images)
        prototypes = features.new_zeros(width, classes)
        if vectors is None or values is None or old is None:
            vectors, values = features.new_zeros(width, 0), features.new_zeros(0)
        else:
            prototypes[:, : old.shape[1]] = old
        for some, wanted in zip(features.split(config.block), labels.split(config.block), strict=True):
            rows = self.lift(some)
            present, places = wanted.unique(return_inverse=True)
            prototypes[:, present] += rows.T @ F.one_hot(places, len(present)).to(rows.dtype)
            seen += len(rows)
            rank = min(round(seen * (1 - config.truncated)), round(width * (1 - config.truncated)), config.rank)
            vectors, values = update_svd(vectors, values, rows, max(rank, 1))
        return {
            "vectors": vectors,
            "values": values,
            "prototypes": prototypes,
            "images": torch.tensor(seen),
            "weight": least_squares(vectors, values, prototypes).T.contiguous(),
        }


def update_svd(vectors: Tensor, values: Tensor, rows: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The largest left singular vectors and values of ``[U S, Hᵀ]``, from those of ``U S`` and new rows H.

    Args:
        vectors: U (M, r), orthonormal columns; r may be 0.
        values: S (r,), descending.
        rows: H (b, M).
        rank: how many to keep at most; fewer where the rest is rounding error.

    Returns:
        The new U (M, r') and S (r',).
    """
    columns = rows.T
    inside = vectors.T @ columns
    outside = columns - vectors @ inside
    rest = (
        vectors.T @ outside
    )  # once more: rounding leaves a part along U, which would spoil the new basis' orthogonality
    inside, outside = inside + rest, outside - vectors @ rest
    basis, triangle = torch.linalg.qr(outside)
    lower = torch.cat([triangle.new_zeros(len(triangle), len(values)), triangle], dim=1)
    core = torch.cat([torch.cat([values.diag(), inside], dim=1), lower])
    left, found, _ = torch.linalg.svd(core, full_matrices=False)
    above = found > found[:1] * torch.finfo(found.dtype).eps * max(len(vectors), core.shape[1])
    rank = min(rank, int(above.sum()))
    return torch.cat([vectors, basis], dim=1) @ left[:, :rank], found[:rank]


def least_squares(vectors: Tensor, values: Tensor, prototypes: Tensor) -> Tensor:
    """``U S⁻² Uᵀ Q`` (M, C): the solution of least norm of ``HᵀH W = Q`` within the span of U.

    Args:
        vectors: U (M, r).
        values: S (r,), positive.
        prototypes: Q (M, C).
    """
    return vectors @ ((vectors.T @ prototypes) / values.square()[:, None])
