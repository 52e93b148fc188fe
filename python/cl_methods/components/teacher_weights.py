"""How far each of several teachers is to be believed about a sample: weights that sum to one."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from cl_methods.components.dual_teachers import discrepancy_gate

Weighting = Literal["confidence", "entropy", "discrepancy", "equal"]
WEIGHTINGS: tuple[str, ...] = ("confidence", "entropy", "discrepancy", "equal")


def confidence_weights(logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """``w_k ∝ exp(p_k(y | x) / τ)``: the teacher that knows the right answer better.

    Args:
        logits: (K, N, C) of the teachers.
        labels: (N,) int64.
        temperature: τ; the smaller, the more one teacher decides.

    Returns:
        (K, N).
    """
    right = logits.softmax(dim=-1).gather(-1, labels.expand(len(logits), -1)[..., None]).squeeze(-1)
    return (right / temperature).softmax(dim=0)


def entropy_weights(logits: Tensor, temperature: float) -> Tensor:
    """``w_k ∝ exp(−H(p_k(· | x)) / (τ log C))``: the teacher that is surer of its answer; no label is needed.

    Args:
        logits: (K, N, C) of the teachers.
        temperature: τ; the smaller, the more one teacher decides.

    Returns:
        (K, N).
    """
    chances = logits.log_softmax(dim=-1)
    certainty = (chances.exp() * chances).sum(dim=-1) / math.log(max(logits.shape[-1], 2))
    return (certainty / temperature).softmax(dim=0)


@torch.no_grad()
def teacher_weights(
    kind: Weighting,
    features: Tensor,
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    threshold: float,
    sharpness: float,
) -> Tensor:
    """Weights of the pre-trained and the previous model, by the rule ``kind``; one alone weighs 1.

    Args:
        kind: ``confidence``, ``entropy``, ``discrepancy`` (the gate of SnD) or ``equal``.
        features: (K, N, d) with K at most 2, the pre-trained model first.
        logits: (K, N, C) over the classes of the task.
        labels: (N,) int64.
        temperature: of ``confidence`` and ``entropy``.
        threshold, sharpness: of ``discrepancy``.

    Returns:
        (K, N), columns that sum to one.
    """
    if len(features) == 1 or kind == "equal":
        return features.new_full(features.shape[:2], 1 / len(features))
    if kind == "discrepancy":
        previous = discrepancy_gate(features[0], features[1], threshold, sharpness)
        return torch.stack([1 - previous, previous])
    if kind == "entropy":
        return entropy_weights(logits, temperature)
    return confidence_weights(logits, labels, temperature)
