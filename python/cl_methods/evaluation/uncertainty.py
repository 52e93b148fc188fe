"""What a method's uncertainty is worth: calibration, and whether it tells novel data from known data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_methods.components.uncertainty import Uncertainty, uncertainty

_SUM_TOLERANCE = 1e-3


def expected_calibration_error(scores: Tensor, labels: Tensor, bins: int = 15, *, probabilities: bool = False) -> float:
    """``Σ_m |B_m|/N · |accuracy(B_m) − mean confidence(B_m)|`` over equally wide bins ``((m − 1)/M, m/M]`` of the confidence.

    The confidence of an image is its largest class probability. All images are binned together; averaging the error of single
    batches, as the public code of CLAP4CLIP does, gives larger values, because few images fall into each bin of a batch.

    Args:
        scores: (N, C) logits, which are soft-maxed in float64, or probabilities.
        labels: (N,) int64, the right classes.
        bins: M, 15 in most papers.
        probabilities: whether ``scores`` are probabilities already.

    Returns:
        A fraction from 0 to 1.

    Raises:
        ValueError: shapes or dtypes do not fit, there is no image, ``bins`` < 1, a label is no class, a score is NaN, or
            ``probabilities`` are not such.

    Source: Naeini et al., AAAI 2015; in this form Guo et al., "On calibration of modern neural networks", ICML 2017, equation 3.
    """
    if scores.ndim != 2 or not scores.numel() or not scores.is_floating_point():
        raise ValueError(
            f"scores: expected floating point (N, C) with N, C >= 1, got {scores.dtype} {tuple(scores.shape)}"
        )
    if labels.shape != scores.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(f"labels: expected int64 {(len(scores),)}, got {labels.dtype} {tuple(labels.shape)}")
    if int(labels.min()) < 0 or int(labels.max()) >= scores.shape[1]:
        raise ValueError(f"labels: expected 0 to {scores.shape[1] - 1}, got {int(labels.min())} to {int(labels.max())}")
    if bins < 1:
        raise ValueError(f"bins: expected a number >= 1, got {bins}")
    exact = scores.double()
    if exact.isnan().any():
        raise ValueError("scores: expected numbers, some are NaN")
    if not probabilities:
        exact = exact.softmax(dim=1)
    elif exact.min() < 0 or (exact.sum(dim=1) - 1).abs().max() > _SUM_TOLERANCE:
        raise ValueError(
            "scores: expected probabilities that are >= 0 and sum to 1 in each row; or set probabilities=False"
        )
    confidence, predicted = exact.max(dim=1)
    return calibration_error(confidence, predicted == labels.to(predicted.device), bins)


def calibration_error(confidence: Tensor, correct: Tensor, bins: int = 15) -> float:
    """:func:`expected_calibration_error` of what is left of the scores: each image's confidence, and whether it was right.

    Args:
        confidence: (N,) in [0, 1], N >= 1.
        correct: (N,) bool.
        bins: number of bins.
    """
    confidence = confidence.double()
    places = _bins(confidence, bins)
    gaps = confidence.new_zeros(bins).index_add_(0, places, correct.double() - confidence)
    return float(gaps.abs().sum() / len(confidence))


def reliability(confidence: Tensor, correct: Tensor, bins: int = 15) -> dict[str, list[Any]]:
    """What a reliability diagram needs, in the bins of :func:`calibration_error`; sums, so that data sets and seeds can be pooled.

    ``Σ_m |correct_m − confidence_m| / Σ_m count_m`` is the calibration error.

    Args:
        confidence: (N,) in [0, 1].
        correct: (N,) bool.
        bins: number of bins.

    Returns:
        ``{"count", "correct", "confidence"}``, each with one number per bin: images, images that were classified right, and the
        sum of the confidences.
    """
    confidence = confidence.double()
    places = _bins(confidence, bins)
    return {
        "count": places.bincount(minlength=bins).tolist(),
        "correct": places[correct].bincount(minlength=bins).tolist(),
        "confidence": confidence.new_zeros(bins).index_add_(0, places, confidence).tolist(),
    }


def novelty_detection(known: Tensor, novel: Tensor, kind: Uncertainty = "energy") -> dict[str, float]:
    """How well :func:`~cl_methods.components.uncertainty.uncertainty` separates novel from known data; see :func:`separation`.

    Args:
        known: scores (N, C) or draws (F, N, C) for images of classes that the method has learnt.
        novel: scores (N', C) or draws (F, N', C), over the same classes, for images of other ones.
        kind: which uncertainty.
    """
    return separation(-uncertainty(known, kind), -uncertainty(novel, kind))


def separation(known: Tensor, novel: Tensor) -> dict[str, float]:
    """``{"auroc", "aupr", "fpr95"}`` of a score that should be larger for known data; known images are the positive class.

    - ``auroc``: probability that a known image scores above a novel one, ties counting half.
    - ``aupr``: average precision, ``Σ_k (R_k − R_{k−1}) P_k`` over the distinct thresholds; no interpolation.
    - ``fpr95``: share of novel images at or above the highest threshold that keeps at least 95 % of the known ones.

    Equal scores share one threshold, so the order of the images never matters.

    Args:
        known: (N,) scores, any floating dtype.
        novel: (N',) scores.

    Returns:
        Fractions from 0 to 1.

    Raises:
        ValueError: a part is empty, has another shape, or holds NaN.

    Source: the three measures of Hendrycks and Gimpel, ICLR 2017, and Liang et al., ICLR 2018.
    """
    for name, values in (("known", known), ("novel", novel)):
        if values.ndim != 1 or not len(values):
            raise ValueError(f"{name}: expected (N,) with N >= 1, got {tuple(values.shape)}")
        if values.isnan().any():
            raise ValueError(f"{name}: expected numbers, some are NaN")
    scores = torch.cat([known.double(), novel.double().to(known.device)])
    thresholds, places = (-scores).unique(return_inverse=True)
    at_or_above = [
        part.bincount(minlength=len(thresholds)).cumsum(0) for part in places.split([len(known), len(novel)])
    ]
    hits, alarms = at_or_above  # of known and of novel images, by falling threshold; whole numbers
    hits_before, alarms_before = (F.pad(part, (1, 0))[:-1] for part in at_or_above)
    twice_won = ((alarms - alarms_before) * (hits + hits_before)).sum()
    precision = hits.double() / (hits + alarms)
    enough = int((100 * hits >= 95 * len(known)).int().argmax())
    return {
        "auroc": float(twice_won.double() / (2 * len(known) * len(novel))),
        "aupr": float(((hits - hits_before) * precision).sum() / len(known)),
        "fpr95": float(alarms[enough].double() / len(novel)),
    }


def _bins(confidence: Tensor, bins: int) -> Tensor:
    """(N,) number of the bin ``((m − 1)/M, m/M]`` of each confidence; 0 is in the first."""
    return ((confidence * bins).ceil().long() - 1).clamp(0, bins - 1)
