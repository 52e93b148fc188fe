"""Distillation between similarity matrices in plain PyTorch: the definition."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cl_kernels import dispatch

CHUNK = 1 << 20
"""Entries of the similarity matrix that :func:`feature_distill_kl` holds together, for each of student and teachers."""

MASKED = -1e4
"""Logit of a masked diagonal entry, before the division by the temperature."""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _terms(log_p_t: Tensor, log_p_s: Tensor, kl: bool) -> Tensor:
    """``p_t (log p_t − log p_s)``, without ``p_t log p_t`` unless ``kl``; 0 where ``p_t`` is 0, whatever the student says."""
    p_t = log_p_t.exp()
    return torch.where(p_t == 0, 0.0, p_t * (log_p_t - log_p_s if kl else -log_p_s))


def distill_kl(student: Tensor, teacher: Tensor, temperature: float, dim: int, kl: bool) -> Tensor:
    """``T² Σ_j p_t (log p_t − log p_s)`` along ``dim``, without the teacher's entropy unless ``kl``; see the public function."""
    dtype = compute_dtype(student.dtype)
    log_p_s = (student.to(dtype) / temperature).log_softmax(dim)
    log_p_t = (teacher.detach().to(dtype) / temperature).log_softmax(dim)
    return temperature**2 * _terms(log_p_t, log_p_s, kl).sum(dim)


def feature_distill_kl(
    student: Tensor,
    teacher: Tensor,
    anchors: Tensor,
    teacher_anchors: Tensor,
    weight: Tensor | None,
    logit_scale: Tensor | float,
    temperature: float,
    rows: float,
    columns: float,
    kl: bool,
    mask_diagonal: bool,
) -> Tensor:
    """See :func:`cl_kernels.feature_distill_kl`; ``teacher`` is (K, N, d) and ``weight`` (K, N) or None.

    The columns are taken in chunks of at most ``CHUNK`` entries (and at least 64 columns). With more than one chunk, each is
    recomputed in the backward pass instead of being saved.
    """
    with torch.autocast(dispatch.autocast_device(student.device), enabled=False):
        dtype = compute_dtype(student.dtype)
        student, anchors = student.to(dtype), anchors.to(dtype)
        teacher, teacher_anchors = teacher.detach().to(dtype), teacher_anchors.detach().to(dtype)
        scale = torch.as_tensor(logit_scale, device=student.device).to(dtype) / temperature
        K, N, _ = teacher.shape
        M, step = anchors.shape[0], max(CHUNK // max(N, 1), 64)
        weight = student.new_ones(K, N) if weight is None else weight.detach().to(dtype)

        def logits(features: Tensor, anchors: Tensor, scale: Tensor, start: int) -> Tensor:
            z = scale * (features @ anchors.mT)  # (..., N, chunk)
            if mask_diagonal:
                column = torch.arange(start, start + z.shape[-1], device=z.device)
                z = z.masked_fill(torch.arange(N, device=z.device)[:, None] == column, MASKED / temperature)
            return z

        # Normalising by the final log-sum-exps from the start keeps large logits from cancelling.
        lse_s, lse_t = student.new_full((N,), -torch.inf), student.new_full((K, N), -torch.inf)
        with torch.no_grad():
            for m in range(0, M, step) if rows else ():
                z_s = logits(student, anchors[m : m + step], scale, m)
                z_t = logits(teacher, teacher_anchors[m : m + step], scale, m)
                lse_s, lse_t = torch.logaddexp(lse_s, z_s.logsumexp(-1)), torch.logaddexp(lse_t, z_t.logsumexp(-1))

        def chunk(student: Tensor, anchors: Tensor, scale: Tensor, m: int) -> tuple[Tensor, Tensor, Tensor]:
            z_s = logits(student, anchors, scale, m)
            z_t = logits(teacher, teacher_anchors[m : m + step], scale.detach(), m)
            mass, row, column = z_s.new_zeros(N), z_s.new_zeros(K, N), z_s.new_zeros(())
            if rows:
                log_p_s = z_s - lse_s[:, None]
                mass, row = log_p_s.exp().sum(-1), _terms(z_t - lse_t[..., None], log_p_s, kl).sum(-1)
            if columns:
                column = (weight * _terms(z_t.log_softmax(-2), z_s.log_softmax(-2), kl).sum(-1)).sum()
            return mass, row, column

        mass, row, column = student.new_zeros(N), student.new_zeros(K, N), student.new_zeros(())
        for m in range(0, M, step):
            inputs = (student, anchors[m : m + step], scale, m)
            part = chunk(*inputs) if step >= M else checkpoint(chunk, *inputs, use_reentrant=False)
            mass, row, column = mass + part[0], row + part[1], column + part[2]
        loss = columns * column / M if columns else 0.0 * (student.sum() + anchors.sum() + scale)  # 0 with a graph
        if rows:
            # log(mass) is 0; its gradient is that of the student's log-sum-exp, of which `row` only saw the value.
            loss = loss + rows * (weight * (row + mass.log())).sum() / N
        return temperature**2 * loss
