"""A routed adapter block at the sizes of ViT-B/16: router, experts and residual, ours beside what people run today.

``published_block`` is the public pattern of MoE-Adapters: a dense (B, E) matrix of gates, a sort of its non-zeros, a Python loop
over all experts, and an index_add of flattened fp32 rows. ``vectorised`` gathers the weights of each sample for batched products.
The matrix products alone have no routing, biases, activation or residual: they are the floor of whoever works with torch.mm.
In bf16, on a GPU, routers choose in fp32 everywhere, and all are checked against the definition in fp32 on the same numbers.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch.nn import functional as F

import cl_kernels as clk
from cl_kernels.routed import routed_adapter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
K, SCALE = 2, 0.1
HALF = "vit_b16_64_bf16"
SHAPES = {  # B, L, D, R, E
    "vit_b16": (32, 197, 768, 64, 22),
    "vit_b16_64": (64, 197, 768, 64, 22),
    **({HALF: (64, 197, 768, 64, 22)} if DEVICE == "cuda" else {}),
    "one_pair": (32, 197, 768, 64, 22),  # every sample chooses the same two experts
    "mini": (64, 17, 96, 64, 22),
}


def inputs(shape, one_pair=False, dtype=torch.float32):
    B, L, D, R, E = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size, scale=1.0):
        return (torch.randn(size, generator=generator) * scale).to(DEVICE, dtype)

    x = normal(B, L, D)
    if one_pair:
        x[:, 0] = x[0, 0].clone()
    weights = normal(E, R, D, scale=D**-0.5), normal(E, R), normal(E, D, R, scale=R**-0.5), normal(E, D)
    return x, normal(D, E, scale=D**-0.5), *weights


def squared_variation(values):
    return values.float().var() / (values.float().mean() ** 2 + 1e-10)


def published_block(x, w_gate, down_weight, down_bias, up_weight, up_bias):
    experts = len(down_weight)
    top, chosen = (x[:, 0].float() @ w_gate.float()).topk(K + 1, dim=1)
    gates = torch.zeros(len(x), experts, device=x.device).scatter(1, chosen[:, :K], top[:, :K].softmax(1))
    squared_variation(gates.sum(0)) + squared_variation((gates > 0).sum(0))  # computed and thrown away
    order, sorted_by_expert = torch.nonzero(gates).sort(0)
    expert = order.split(1, dim=1)[1]
    samples = torch.nonzero(gates)[sorted_by_expert[:, 1], 0]
    sizes = (gates > 0).sum(0).tolist()
    taken = torch.gather(gates[samples], 1, expert)
    outputs = []
    for e, rows in enumerate(x[samples].split(sizes)):
        hidden = F.relu(F.linear(rows, down_weight[e], down_bias[e]))
        outputs.append(F.linear(hidden, up_weight[e], up_bias[e]) * SCALE)
    stitched = torch.cat(outputs, 0).flatten(1) * taken
    combined = torch.zeros(len(x), stitched.shape[1], device=x.device).index_add(0, samples, stitched.float())
    return x + combined.view_as(x)


def route(x, w_gate, backend=None):
    gates, expert_ids, _ = clk.top_k_gating(x[:, 0], w_gate, k=K, backend=backend)
    return expert_ids, gates


def reference(x, w_gate, *weights):
    routes = route(x, w_gate, "reference")
    return clk.moe_adapter(x, *routes, *weights, scale=SCALE, residual=x, backend="reference")


def vectorised(x, w_gate, down_weight, down_bias, up_weight, up_bias):
    top, chosen = (x[:, 0].float() @ w_gate.float()).topk(K, dim=1)
    gates = (top.softmax(1) * SCALE).to(x.dtype)
    hidden = torch.einsum("bld,bkrd->bklr", x, down_weight[chosen]) + down_bias[chosen][:, :, None]
    hidden = F.relu(hidden) * gates[:, :, None, None]
    biases = torch.einsum("bk,bkd->bd", gates, up_bias[chosen])
    return x + torch.einsum("bklr,bkdr->bld", hidden, up_weight[chosen]) + biases[:, None]


@functools.cache
def compiler():
    return torch.compile(vectorised, dynamic=False)


def compiled(*tensors):
    return compiler()(*tensors)


def ours(x, w_gate, *weights):
    return routed_adapter(x, w_gate, None, *weights, k=K, scale=SCALE, residual=x)[0]


def matrix_products(x, w_gate, down_weight, down_bias, up_weight, up_bias):
    """Closure that forms, sample by sample, the products of the forward pass, and with ``step`` those of the backward pass."""
    B, L, D = x.shape
    chosen = route(x, w_gate)[0].tolist()
    down = [down_weight[ids].flatten(0, 1).contiguous() for ids in chosen]  # (k R, D)
    up = [up_weight[ids].transpose(1, 2).flatten(0, 1).contiguous() for ids in chosen]  # (k R, D)
    grad, columns = torch.randn_like(x), down[0].shape[0]
    narrow, wide, weight, transposed = (
        torch.randn(size, device=x.device).to(x.dtype) for size in ((L, columns), (L, D), (columns, D), (D, columns))
    )

    def run(step):
        for b in range(B):
            torch.mm(x[b], down[b].T, out=narrow)
            torch.mm(narrow, up[b], out=wide)
            if step:
                torch.mm(grad[b], up[b].T, out=narrow)
                torch.mm(narrow, down[b], out=wide)
                torch.mm(narrow.T, x[b], out=weight)
                torch.mm(grad[b].T, narrow, out=transposed)
        return []

    return run


PEERS = [published_block, reference, vectorised, compiled, matrix_products, ours]
# Compiling takes longer than all the rest: one shape shows what it brings. Plain sums in bf16 lose a tenth of a bias' gradient.
LEFT_OUT = {(compiled, shape) for shape in SHAPES if shape != "vit_b16"} | {(vectorised, HALF)}
CASES = [(peer, shape) for shape in SHAPES for peer in PEERS if (peer, shape) not in LEFT_OUT]


@pytest.mark.parametrize("step", [False, True], ids=["forward", "step"])
@pytest.mark.parametrize(("implementation", "shape"), [pytest.param(p, s, id=f"{p.__name__}-{s}") for p, s in CASES])
def bench_moe_adapter(measure, implementation, shape, step):
    B, L, D, R, E = SHAPES[shape]
    half = shape == HALF
    tensors = inputs(SHAPES[shape], shape == "one_pair", torch.bfloat16 if half else torch.float32)
    floor = {
        "flops": 4 * B * L * K * D * R * (3 if step else 1),
        "floor_bytes": (2 if half else 4) * (2 * B * L * D + 2 * E * D * R) * (2 if step else 1),
        "half": half,
    }
    if implementation is matrix_products:
        products = matrix_products(*tensors)
        return measure(lambda: products(step), [], tolerance=0.0, **floor)
    for tensor in tensors:
        tensor.requires_grad_(step)
    upstream = torch.randn(B, L, D, generator=torch.Generator().manual_seed(1)).to(DEVICE)

    def run(function=implementation, tensors=tensors):
        out = function(*tensors)
        return [out.detach(), *torch.autograd.grad(out, tensors, upstream.to(out.dtype))] if step else [out]

    exact = [tensor.detach().float().requires_grad_(step) for tensor in tensors]
    measure(run, run(reference, exact), tolerance=5e-2 if half else 1e-4, **floor)
