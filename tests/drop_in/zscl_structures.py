"""A module with the functions of ZSCL's helpers, written from their description."""

from __future__ import annotations

from torch.nn import functional as F


def distillation(t, s, T=2):
    return T**2 * F.cross_entropy(s / T, (t / T).softmax(dim=1))


def merge_we(model_0, model_1, sma_count):
    for value, average in zip(model_0.parameters(), model_1.parameters(), strict=False):
        average.data = (sma_count * average.data + value.data) / (sma_count + 1.0)
    return model_1


def wise_we(model_0, model_1, sma_count, model_n, alpha=0.95):
    merge_we(model_0, model_1, sma_count)
    for average, fixed in zip(model_1.parameters(), model_n.parameters(), strict=False):
        average.data = alpha * average.data + (1 - alpha) * fixed.data
    return model_1


def moving_avg(model_0, model_1, alpha=0.999):
    for value, fixed in zip(model_0.parameters(), model_1.parameters(), strict=False):
        value.data = alpha * value.data + (1 - alpha) * fixed.data


def l2_loss(model, model_ref):
    pairs = zip(model.parameters(), model_ref.parameters(), strict=False)
    return sum((F.mse_loss(p, q.detach(), reduction="sum") for p, q in pairs), 0.0)
