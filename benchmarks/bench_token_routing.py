"""Adapters with a choice of experts per token: ours beside grouped products over sorted tokens, and beside all experts with masks.

On a GPU with ScatterMoE installed, its sorted products are measured, too; without it there is no such row.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch.nn import functional as F

import cl_kernels as clk

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
D, R, K, SCALE = 768, 64, 2, 0.1
FEW, MANY = 12_608, 200_000
"""Tokens: of 64 images of ViT-B/16, and of a thousand."""

NUMBERS = (2, 4, 8, 16, 22, 32, 64)
EXPERTS = {FEW: NUMBERS, MANY: NUMBERS if DEVICE == "cuda" else (2, 22, 64)}
DENSE_UP_TO = {FEW: 64, MANY: 4}
"""All experts on all tokens: with more of them a call takes many seconds on a CPU; token_scale.py has the patience."""


def inputs(tokens, experts):
    generator = torch.Generator().manual_seed(0)

    def normal(*size, scale=1.0):
        return (torch.randn(size, generator=generator) * scale).to(DEVICE)

    chosen = torch.rand(tokens, experts, generator=generator).argsort(-1)[:, :K].contiguous().to(DEVICE)
    weights = normal(experts, R, D, scale=D**-0.5), normal(experts, R), normal(experts, D, R, scale=R**-0.5)
    return normal(tokens, D), chosen, torch.softmax(normal(tokens, K), -1), *weights, normal(experts, D)


def grouped(x, expert_ids, gates, down_weight, down_bias, up_weight, up_bias):
    flat = expert_ids.flatten()
    order = flat.argsort(stable=True)
    token, expert = order // K, flat[order]
    ends = torch.zeros(len(down_weight), dtype=torch.int64, device=x.device).index_add(0, flat, torch.ones_like(flat))
    ends = ends.cumsum(0).to(torch.int32)
    hidden = F.relu(F.grouped_mm(x[token], down_weight.transpose(1, 2), offs=ends) + down_bias[expert])
    y = F.grouped_mm(hidden, up_weight.transpose(1, 2), offs=ends) + up_bias[expert]
    return x.index_add(0, token, y * (SCALE * gates.flatten()[order, None]))


def dense(x, expert_ids, gates, down_weight, down_bias, up_weight, up_bias):
    experts = len(down_weight)
    weight = torch.zeros(len(x), experts, device=x.device).scatter(1, expert_ids, SCALE * gates)
    hidden = F.relu(F.linear(x, down_weight.flatten(0, 1), down_bias.flatten()))
    hidden = hidden.view(-1, experts, R) * weight[..., None]
    return x + hidden.flatten(1) @ up_weight.transpose(1, 2).flatten(0, 1) + weight @ up_bias


def scattermoe(x, expert_ids, gates, down_weight, down_bias, up_weight, up_bias):
    from scattermoe.parallel_experts import flatten_sort_count, parallel_linear

    experts, scattered, ends = flatten_sort_count(expert_ids, len(down_weight))
    hidden = parallel_linear(x, down_weight.transpose(1, 2), K, experts, scattered, ends, grouped_out=True)
    hidden = F.relu(hidden + down_bias[experts])
    weight = torch.zeros(len(x), len(down_weight), device=x.device).scatter(1, expert_ids, SCALE * gates)
    up = up_weight.transpose(1, 2)
    y = parallel_linear(hidden, up, 1, experts, scattered, ends, grouped_in=True, gates=SCALE * gates)
    return x + y + weight @ up_bias


def ours(x, expert_ids, gates, *weights):
    return clk.moe_adapter(x, expert_ids, gates, *weights, scale=SCALE, residual=x)


PEERS = [grouped, dense, ours]
if DEVICE == "cuda" and importlib.util.find_spec("scattermoe"):
    PEERS.append(scattermoe)
CASES = [
    pytest.param(
        peer, tokens, experts, id=f"{peer.__name__}-{experts}_experts" + ("" if tokens == FEW else f"-{tokens}_tokens")
    )
    for tokens, numbers in EXPERTS.items()
    for experts in numbers
    for peer in PEERS
    if peer is not dense or DEVICE == "cuda" or experts <= DENSE_UP_TO[tokens]
]


@pytest.mark.parametrize("step", [False, True], ids=["forward", "step"])
@pytest.mark.parametrize(("implementation", "tokens", "experts"), CASES)
def bench_token_routing(measure, implementation, tokens, experts, step):
    tensors = inputs(tokens, experts)
    differentiable = [tensor for tensor in tensors if tensor.is_floating_point()]
    for tensor in differentiable:
        tensor.requires_grad_(step)
    upstream = torch.randn(tokens, D, generator=torch.Generator().manual_seed(1)).to(DEVICE)

    def run(function=implementation):
        out = function(*tensors)
        return [out.detach(), *torch.autograd.grad(out, differentiable, upstream)] if step else [out]

    flops = 4 * tokens * K * D * R * (3 if step else 1)
    floor_bytes = 4 * (2 * tokens * D + 2 * experts * D * R) * (2 if step else 1)
    measure(
        run, run(ours if implementation is grouped else grouped), tolerance=1e-4, flops=flops, floor_bytes=floor_bytes
    )
