"""A mixture-of-adapters branch at the sizes of ViT-B/16 and of the embedded model: ours against the published dispatch pattern.

The published pattern gathers each expert's samples, runs one expert after the other and adds the results back with index_add.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import cl_kernels as clk

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
K, SCALE = 2, 0.1
SHAPES = {"vit_b16": (8, 197, 768, 64, 22), "mini": (64, 17, 96, 64, 22)}  # B, L, D, R, E


def inputs(shape):
    B, L, D, R, E = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size, scale=1.0):
        return (torch.randn(size, generator=generator) * scale).to(DEVICE)

    x = normal(B, L, D)
    experts = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(B)]).to(DEVICE)
    gates = torch.softmax(normal(B, K), dim=-1)
    weights = normal(E, R, D, scale=D**-0.5), normal(E, R), normal(E, D, R, scale=R**-0.5), normal(E, D)
    return x, experts, gates, *weights


def published_dispatch(x, experts, gates, down_weight, down_bias, up_weight, up_bias):
    out = torch.zeros_like(x)
    for e in range(len(down_weight)):
        rows, slots = (experts == e).nonzero(as_tuple=True)
        hidden = F.relu(F.linear(x[rows], down_weight[e], down_bias[e]))
        y = F.linear(hidden, up_weight[e], up_bias[e]) * SCALE
        out = out.index_add(0, rows, y * gates[rows, slots, None, None])
    return x + out


def reference(x, experts, gates, *weights):
    return clk.moe_adapter(x, experts, gates, *weights, scale=SCALE, residual=x, backend="reference")


def ours(x, experts, gates, *weights):
    return clk.moe_adapter(x, experts, gates, *weights, scale=SCALE, residual=x)


@pytest.mark.parametrize("step", [False, True], ids=["forward", "step"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("implementation", [published_dispatch, reference, ours], ids=lambda f: f.__name__)
def bench_moe_adapter(measure, implementation, shape, step):
    tensors = inputs(shape)
    differentiable = [tensor for tensor in tensors if tensor.is_floating_point()]
    for tensor in differentiable:
        tensor.requires_grad_(step)

    def run(function=implementation):
        out = function(*tensors)
        if not step:
            return [out]
        return [out.detach(), *torch.autograd.grad(out.square().sum(), differentiable)]

    B, L, D, R, E = shape
    flops = 4 * B * L * K * D * R * (3 if step else 1)
    floor_bytes = 4 * (2 * B * L * D + 2 * E * D * R)
    measure(run, run(published_dispatch), tolerance=1e-4, flops=flops, floor_bytes=floor_bytes)
