"""The loss of variational adapters: cross-entropy of all draws, divergence from the prior, and draws kept next to their texts."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_methods.methods.variational_adapters import Gaussian, VariationalHead, gaussian


def variational_loss(
    head: VariationalHead,
    features: Tensor,
    labels: Tensor,
    scale: Tensor,
    *,
    every_task: bool,
    noise: tuple[Tensor, ...] | None = None,
) -> dict[str, Tensor]:
    """``CE(s x · (h_c + z_cf)) + λ Σ_i mean_c KL(q_c ‖ p_c) + β Σ_i CE_c(m_c · z̄_c')``, each sum over the tasks i that train.

    The cross-entropy is over all classes of all tasks and the mean over images and draws. In the last term, the regulariser of
    past tasks, rows c and columns c' are classes of one task, m_c is the mean of the template texts of c and z̄_c' the mean of
    the draws of c'; the right column of row c is c. The hierarchical form adds both regularisers for the shared draws,
    over all classes as one task.

    Args:
        head: adapters, and with them all settings.
        features: x (B, d), normalised.
        labels: (B,) int64 among all classes of all tasks.
        scale: s, a scalar.
        every_task: see :meth:`VariationalHead.draw`; the tasks that train are all, or the newest.
        noise: see :meth:`VariationalHead.draw`.

    Returns:
        ``{"loss", "cross_entropy", "kl", "past_task"}``, the last two weighted and left out where their weight is 0.

    Source: CLAP4CLIP (Jha et al., NeurIPS 2024), equations 4 to 8.
    """
    config, layout = head.config, head.layout
    draws = head.draw(features, every_task=every_task, noise=noise)
    texts = (draws.base + draws.samples).flatten(0, 1)
    logits = (scale * features) @ texts.flatten(0, 1).T
    targets = labels.repeat_interleave(len(texts))
    smoothing = config.label_smoothing
    terms = {"cross_entropy": F.cross_entropy(logits.view(-1, texts.shape[1]), targets, label_smoothing=smoothing)}
    own = head.own(every_task)
    shares = layout.shares[own]
    if config.kl_weight:
        context = _context(head, features, trains=not every_task) if config.prior == "data_driven" else None
        posterior = draws.posterior[0][:, own], draws.posterior[1][:, own]
        tasks, weight = len(head.texts) if every_task else 1, config.kl_weight
        divergence = _divergence(posterior, _prior(head, context, every_task), shares, tasks, weight)
        if head.shared is not None and draws.shared is not None:
            prior = None if context is None else gaussian(head.shared(context))
            equal = torch.full_like(layout.shares, 1 / len(layout.shares))
            divergence = divergence + _divergence(draws.shared, prior, equal, 1, weight)
        terms["kl"] = divergence
    if config.past_task_weight:
        mean = draws.samples[:, :, own].mean(dim=(0, 1))
        similar = torch.addmm(layout.mask[own, own], head.mean[own], mean.T)
        apart = F.cross_entropy(similar, layout.targets[: len(similar)], reduction="none") @ shares
        if draws.shared_samples is not None:
            similar = head.mean @ draws.shared_samples.mean(dim=0).T
            apart = apart + F.cross_entropy(similar, layout.targets)
        terms["past_task"] = config.past_task_weight * apart
    return {"loss": torch.stack(tuple(terms.values())).sum(), **terms}


def _prior(head: VariationalHead, context: Tensor | None, every_task: bool) -> Gaussian | None:
    """p for the classes of :meth:`VariationalHead.own`, both (1, n, d); None for the standard normal."""
    if head.config.prior == "language_aware":
        return head.at(head.mean[None], every_task)
    return None if context is None else head.at(context, every_task)


def _context(head: VariationalHead, features: Tensor, *, trains: bool) -> Tensor:
    """h (1, C, d) where the texts have looked at a random part of the batch only."""
    count = math.ceil(head.config.prior_context * len(features))
    rows = torch.randperm(len(features), device=features.device)[:count]
    return head.look(features[rows], trains=trains)[None]


def _divergence(posterior: Gaussian, prior: Gaussian | None, shares: Tensor, total: int, weight: float) -> Tensor:
    """``weight · Σ_c share_c KL(q_c ‖ p_c)``, averaged over draws of the base: a scalar from (K, n, d).

    Args:
        posterior, prior: q and p; the standard normal if None.
        shares: (n,).
        total: their sum, known without looking at them.
        weight: λ.
    """
    mean, deviation = posterior
    draws, _, width = mean.shape
    if prior is None:
        twice = torch.addcmul(mean.square(), deviation, deviation).sub(deviation.log(), alpha=2)
    else:
        ratio, apart = deviation / prior[1], (mean - prior[0]) / prior[1]
        twice = torch.addcmul(apart.square(), ratio, ratio).sub(ratio.log(), alpha=2)
    return (twice.sum(dim=(0, 2)) @ shares - draws * width * total) * (weight / (2 * draws))
