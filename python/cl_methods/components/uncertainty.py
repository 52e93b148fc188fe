"""How unsure a classifier is of each image, from its scores alone."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from cl_methods.components.exemplars import Selection

Uncertainty = Literal["confidence", "energy", "entropy", "variance"]


def uncertainty(scores: Tensor, kind: Uncertainty = "energy") -> Tensor:
    """One number for each image, larger where the classifier is less sure.

    With p the softmax of the scores, its mean over draws where there are several:

    - ``confidence``: ``1 − max_c p_c`` (Hendrycks and Gimpel, ICLR 2017);
    - ``energy``: ``−logsumexp_c`` of the scores, of their mean over draws where there are several (Liu et al., NeurIPS 2020);
    - ``entropy``: ``−Σ_c p_c log p_c``;
    - ``variance``: ``Σ_c Var_f p_fc``, the unbiased variance over draws: how far the draws disagree.

    Args:
        scores: (N, C) logits, or (F, N, C): F draws of them from a probabilistic method. Any floating dtype; computed in float64.
        kind: which of the four.

    Returns:
        (N,) float64 on the device of ``scores``.

    Raises:
        ValueError: another shape, an unknown ``kind``, or ``variance`` of fewer than two draws.
    """
    if kind not in get_args(Uncertainty):
        raise ValueError(f"kind: expected one of {', '.join(get_args(Uncertainty))}, got {kind!r}")
    if scores.ndim not in (2, 3) or not scores.shape[-1] or not scores.is_floating_point():
        raise ValueError(
            f"scores: expected floating point (N, C) or (F, N, C), got {scores.dtype} {tuple(scores.shape)}"
        )
    draws = scores.double().unflatten(0, (1, -1)) if scores.ndim == 2 else scores.double()
    if len(draws) < (2 if kind == "variance" else 1):
        raise ValueError(
            f"scores: {kind} needs (F, N, C) with F >= {2 if kind == 'variance' else 1} draws, got {tuple(scores.shape)}"
        )
    if kind == "energy":
        return -draws.mean(dim=0).logsumexp(dim=-1)
    probabilities = draws.softmax(dim=-1)
    if kind == "variance":
        return probabilities.var(dim=0).sum(dim=-1)
    mean = probabilities.mean(dim=0)
    return 1 - mean.amax(dim=-1) if kind == "confidence" else torch.special.entr(mean).sum(dim=-1)


def by_uncertainty(values: Tensor, keep: Literal["uncertain", "certain"] = "uncertain") -> Selection:
    """Selection of exemplars by an uncertainty of each; equal ones in the order of the images.

    Args:
        values: (N,) of all images of a task, from :func:`uncertainty`.
        keep: which end comes first.

    Raises:
        ValueError: ``keep`` is neither.
    """
    if keep not in ("uncertain", "certain"):
        raise ValueError(f"keep: expected uncertain or certain, got {keep!r}")
    values = values.detach().cpu()

    def select(rows: Tensor, count: int) -> Tensor:
        return rows[values[rows].argsort(descending=keep == "uncertain", stable=True)[:count]]

    return select
