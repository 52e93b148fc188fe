"""Class prototypes: normalised means of image features, how they follow the model, and their alignment with class texts."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def class_prototypes(features: Tensor, labels: Tensor, fallback: Tensor) -> Tensor:
    """``P_c ∝ Σ_{y_n = c} f_n``, of length one.

    Args:
        features: (N, d), without gradient.
        labels: (N,) int64 on their device.
        fallback: (C, d), what a class without images gets.

    Returns:
        (C, d).
    """
    sums, counts = _class_sums(features, labels, len(fallback))
    return torch.where(counts > 0, F.normalize(sums, dim=1), fallback)


def follow(prototypes: Tensor, features: Tensor, labels: Tensor, momentum: float) -> Tensor:
    """``P_c ∝ m P_c + (1 − m) mean_{y_n = c} f_n`` for the classes that a batch shows; the others stay.

    Args:
        prototypes: (C, d).
        features: (B, d).
        labels: (B,) int64 on their device.
        momentum: m, 0 to 1.

    Returns:
        (C, d), a new tensor of unit rows, differentiable in ``features``.
    """
    sums, counts = _class_sums(features, labels, len(prototypes))
    moved = F.normalize(momentum * prototypes + (1 - momentum) * sums / counts.clamp(min=1), dim=1)
    return torch.where(counts > 0, moved, prototypes)


def symmetric_alignment(prototypes: Tensor, texts: Tensor, scale: float) -> Tensor:
    """``−1/(2C) Σ_c [log softmax_c(s P_c · T) + log softmax_c(s T_c · P)]``: each prototype finds its text, and the reverse.

    Args:
        prototypes: (C, d).
        texts: (C, d).
        scale: s.

    Returns:
        A scalar, differentiable in both.
    """
    logits = scale * prototypes @ texts.T
    own = -logits.diagonal() + (logits.logsumexp(dim=0) + logits.logsumexp(dim=1)) / 2
    return own.mean()


def _class_sums(features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Sums (C, d) and numbers (C, 1) by one product, whose order of addition is fixed and which waits for nothing."""
    members = (torch.arange(classes, device=labels.device)[:, None] == labels).to(features.dtype)
    return members @ features, members.sum(dim=1, keepdim=True)
