"""Distillation up to the student's gradient, from features in both directions and from logits in each: ours beside its peers.

Peers: the published pattern (logits, soft-max, cross-entropy), torch.compile of it, the plain reference and, on a GPU where it is
installed, Liger-Kernel: its divergences from logits, and the one that includes the linear layer, which computes one direction from
features.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import pytest
import torch
from torch.nn import functional as F

import cl_kernels as clk

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALE, T = 100.0, 2.0
SIZES = [(64, 1000), (64, 15840), (256, 10000), (64, 60000)]  # images, captions; width 512
if DEVICE == "cuda":
    SIZES.append((4096, 100000))
LIGER = DEVICE == "cuda" and find_spec("liger_kernel") is not None


def published_kl(student, teacher, dim=1):
    log_p = F.log_softmax(student / T, dim)
    return F.kl_div(log_p, F.softmax(teacher / T, dim), reduction="none").sum(dim).mean() * T**2


def published_distillation(student, teacher, anchors):
    def kd(a, b):
        return F.cross_entropy(b / T, F.softmax(a / T, dim=1), reduction="mean") * T**2

    z_s, z_t = SCALE * student @ anchors.T, SCALE * teacher @ anchors.T
    return kd(z_t, z_s) + kd(z_t.T, z_s.T)


@cache
def _compiled(function):
    return torch.compile(function, dynamic=False)


def compiled(*inputs, **options):
    return _compiled(published_distillation if len(inputs) == 3 else published_kl)(*inputs, **options)


def reference(*inputs, **options):
    return ours(*inputs, **options, backend="reference")


def liger(student, teacher, dim=1):
    from liger_kernel.transformers import LigerKLDIVLoss

    if dim == 0:
        student, teacher = student.T, teacher.T
    return LigerKLDIVLoss()(F.log_softmax(student / T, 1), F.softmax(teacher / T, 1)) * T**2


def liger_jsd(student, teacher, dim=1):
    """At one end of its range it is the same divergence."""
    from liger_kernel.transformers import LigerJSD

    if dim == 0:
        student, teacher = student.T, teacher.T
    return LigerJSD(beta=0.0)(F.log_softmax(student / T, 1), F.log_softmax(teacher / T, 1)) * T**2


def liger_fused_linear(student, teacher, anchors, rows, columns, target):
    """One direction: each image is a token, the captions are the vocabulary."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    loss = LigerFusedLinearJSD(jsd_beta=0.0, temperature=T)
    weight = SCALE * anchors
    return loss(student, weight, teacher, weight, None) * T**2


def published_direction(student, teacher, anchors, rows, columns, target):
    return published_kl(SCALE * student @ anchors.T, SCALE * teacher @ anchors.T)


def ours(*inputs, **options):
    if len(inputs) == 3:
        return clk.feature_distill_kl(*inputs, logit_scale=SCALE, temperature=T, **options)
    return clk.distill_kl(*inputs, temperature=T, target="kl", **options)


def ours_in_bf16(*features):
    return ours(*features)


def _step(function, inputs, options):
    loss = function(*inputs, **options)
    return [loss.detach(), *torch.autograd.grad(loss, inputs[:1])]


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "{}x{}x512".format(*size))
@pytest.mark.parametrize(
    "implementation",
    [published_distillation, compiled, reference, *([ours_in_bf16] if DEVICE == "cuda" else []), ours],
    ids=lambda function: function.__name__,
)
def bench_feature_distill_kl(measure, implementation, size):
    (N, M), d = size, 512
    generator = torch.Generator().manual_seed(0)
    features = [F.normalize(torch.randn(rows, d, generator=generator), dim=-1).to(DEVICE) for rows in (N, N, M)]
    half = implementation is ours_in_bf16
    if half:
        features = [tensor.bfloat16() for tensor in features]
    exact = [tensor.float() for tensor in features]
    features[0].requires_grad_()
    exact[0].requires_grad_()
    measure(
        lambda: _step(implementation, features, {}),
        _step(published_distillation, exact, {}),
        tolerance=5e-2 if half else 1e-4,
        flops=6 * N * M * d,  # two products for the logits, one for the gradient
        floor_bytes=(2 if half else 4) * (3 * N + M) * d,
        half=half,
    )


@pytest.mark.parametrize("size", SIZES if DEVICE == "cuda" else SIZES[2:3], ids=lambda size: "{}x{}x512".format(*size))
@pytest.mark.parametrize(
    "implementation",
    [published_direction, *([liger_fused_linear] if LIGER else []), ours],
    ids=lambda function: function.__name__,
)
def bench_one_direction(measure, implementation, size):
    """The divergence of the images' distributions over the captions alone, as language models are distilled."""
    (N, M), d = size, 512
    generator = torch.Generator().manual_seed(0)
    features = [F.normalize(torch.randn(rows, d, generator=generator), dim=-1).to(DEVICE) for rows in (N, N, M)]
    features[0].requires_grad_()
    options = {"rows": 1.0, "columns": 0.0, "target": "kl"}
    measure(
        lambda: _step(implementation, features, options),
        _step(published_direction, features, options),
        tolerance=1e-4,
        flops=6 * N * M * d,
        floor_bytes=4 * (3 * N + M) * d,
    )


@pytest.mark.parametrize("dim", [1, 0], ids=["rows", "columns"])
@pytest.mark.parametrize("size", SIZES[:3], ids=lambda size: "{}x{}".format(*size))
@pytest.mark.parametrize(
    "implementation",
    [published_kl, compiled, reference, *([liger, liger_jsd] if LIGER else []), ours],
    ids=lambda function: function.__name__,
)
def bench_distill_kl(measure, implementation, size, dim):
    generator = torch.Generator().manual_seed(0)
    logits = [(4 * torch.randn(size, generator=generator)).to(DEVICE) for _ in range(2)]
    logits[0].requires_grad_()
    options = {"dim": dim}
    measure(
        lambda: _step(implementation, logits, options),
        _step(published_kl, logits, options),
        tolerance=1e-4,
        flops=0,
        floor_bytes=4 * 5 * logits[0].numel(),  # both sides read twice, one gradient written
    )
