"""Distillation in both directions, from features to the student's gradient: ours against logits, soft-max and cross-entropy."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import cl_kernels as clk

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALE, T = 100.0, 2.0
SHAPES = {"64x1000x512": (64, 1000, 512), "64x15840x512": (64, 15840, 512)}  # images, captions, width


def published_distillation(student, teacher, anchors):
    def kd(a, b):
        return F.cross_entropy(b / T, F.softmax(a / T, dim=1), reduction="mean") * T**2

    z_s, z_t = SCALE * student @ anchors.T, SCALE * teacher @ anchors.T
    return kd(z_t, z_s) + kd(z_t.T, z_s.T)


def reference(student, teacher, anchors):
    return clk.feature_distill_kl(student, teacher, anchors, logit_scale=SCALE, temperature=T, backend="reference")


def ours(student, teacher, anchors):
    return clk.feature_distill_kl(student, teacher, anchors, logit_scale=SCALE, temperature=T)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("implementation", [published_distillation, reference, ours], ids=lambda f: f.__name__)
def bench_feature_distill_kl(measure, implementation, shape):
    N, M, d = shape
    generator = torch.Generator().manual_seed(0)
    features = [F.normalize(torch.randn(rows, d, generator=generator), dim=-1).to(DEVICE) for rows in (N, N, M)]
    features[0].requires_grad_()

    def run(function=implementation):
        loss = function(*features)
        return [loss.detach(), *torch.autograd.grad(loss, features[:1])]

    measure(run, run(published_distillation), tolerance=1e-4, flops=10 * N * M * d, floor_bytes=4 * (2 * N + M) * d * 2)
