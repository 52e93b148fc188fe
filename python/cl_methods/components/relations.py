"""Distillation of relations: how features stand to anchors, as several teachers see it, in one operation."""

from __future__ import annotations

from torch import Tensor

import cl_kernels as clk


def side_by_side(features: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
    """Features and anchors whose products are those of every teacher with its *own* anchors.

    Teacher k's features fill the k-th of K blocks and are zero elsewhere; the anchors of all teachers stand side by side. So one
    call of :func:`cl_kernels.feature_distill_kl`, which shares anchors among teachers, can serve teachers that differ in them.

    Args:
        features: (K, N, d).
        anchors: (K, M, d).

    Returns:
        Features (K, N, K·d) and anchors (M, K·d).
    """
    K, N, d = features.shape
    if K == 1:
        return features, anchors[0]
    wide = features.new_zeros(K, N, K, d)
    wide.diagonal(dim1=0, dim2=2).copy_(features.permute(1, 2, 0))
    return wide.view(K, N, K * d), anchors.transpose(0, 1).reshape(-1, K * d)


def relation_distillation(
    student: Tensor,
    anchors: Tensor,
    teachers: Tensor,
    teacher_anchors: Tensor,
    weights: Tensor,
    *,
    scale: float,
    temperature: float,
    columns: float = 0.0,
    among_themselves: bool = False,
) -> Tensor:
    """``T² Σ_k 1/N Σ_n w_kn KL(softmax(s f_k A_kᵀ / T) ‖ softmax(s f Aᵀ / T))``, over the anchors of each feature.

    Args:
        student: (N, d) features.
        anchors: (M, d) what they are related to, as the student sees it.
        teachers: (K, N, d) the same features of each teacher.
        teacher_anchors: (K, M, d) what each teacher relates them to; (M, d) if it is the same for all.
        weights: (K, N) of teachers and samples, constant.
        scale: s.
        temperature: T.
        columns: factor of the other direction, over the features of each anchor.
        among_themselves: the anchors are the features themselves, and none is related to itself.

    Returns:
        A scalar, differentiable in ``student`` and ``anchors``.
    """
    if teacher_anchors.dim() == 3:
        teachers, teacher_anchors = side_by_side(teachers, teacher_anchors)
    return clk.feature_distill_kl(
        student,
        teachers,
        anchors,
        teacher_anchors=teacher_anchors,
        sample_weight=weights,
        logit_scale=scale,
        temperature=temperature,
        columns=columns,
        target="kl",
        mask_diagonal=among_themselves,
    )
