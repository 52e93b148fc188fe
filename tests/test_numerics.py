"""Every operation against float64: 1e-6 forward, 1e-5 in gradients with fp32; with 16 bits at most twice PyTorch's own error.

PyTorch's own is the same formula in plain operations on tensors of that dtype. Errors are root mean squares over those of the exact
result, taken together over some seeds, so that a lucky number on either side decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import adapter_cases
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import cl_kernels as clk

SEEDS = 3
FORWARD, GRADIENT, TIMES = 1e-6, 1e-5, 2.0
Tensors = dict[str, Tensor]


def adapter(seed: int, small: bool, tokens: bool = False) -> Tensors:
    batch, length, width, rank = (6, 5, 32, 16) if small else (4, 17, 128, 32)
    return adapter_cases.make(
        batch * length if tokens else batch, None if tokens else length, width, rank, 6, 2, seed=seed
    ).tensors


def run_adapter(tensors: Tensors, backend: str | None) -> Tensor:
    if backend:
        return clk.moe_adapter(**tensors, scale=0.1, backend=backend)
    return adapter_cases.naive(**tensors, scale=0.1)


def router(seed: int, small: bool) -> Tensors:
    """With logits so far apart that all choose the same experts."""
    batch, width, experts = (5, 32, 6) if small else (64, 256, 22)
    generator = torch.Generator().manual_seed(seed)
    x, w_gate, w_noise = (
        torch.randn(size, generator=generator) for size in ((batch, width), (width, experts), (width, experts))
    )
    order = torch.rand(batch, experts, generator=generator).argsort(-1)
    return {
        "x": x,
        "w_gate": w_gate * width**-0.5,
        "w_noise": w_noise * width**-0.5,
        "noise": 4.0 * order - 2.0 * experts,
    }


def run_router(tensors: Tensors, backend: str | None) -> Tensor:
    if backend:
        return clk.top_k_gating(**tensors, k=2, backend=backend)[0]
    x, w_gate, w_noise, noise = tensors.values()
    logits = x @ w_gate + noise * (F.softplus(x @ w_noise) + 0.01)
    return logits.topk(2).values.softmax(-1)


def logits(seed: int, small: bool) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    shape = (6, 40) if small else (64, 1000)
    return {name: 4 * torch.randn(shape, generator=generator) for name in ("student_logits", "teacher_logits")}


def run_logits(tensors: Tensors, backend: str | None) -> Tensor:
    if backend:
        return clk.distill_kl(**tensors, target="kl", backend=backend)
    student, teacher = (t / 2.0 for t in tensors.values())
    return 4 * F.kl_div(F.log_softmax(student, 1), F.softmax(teacher, 1), reduction="batchmean")


def features(seed: int, small: bool) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    N, M, d = (6, 40, 32) if small else (64, 1000, 512)
    sizes = {"student": N, "teacher": N, "anchors": M}
    return {name: F.normalize(torch.randn(n, d, generator=generator), dim=1) for name, n in sizes.items()}


def run_features(tensors: Tensors, backend: str | None) -> Tensor:
    if backend:
        return clk.feature_distill_kl(**tensors, logit_scale=100.0, backend=backend)
    student, teacher, anchors = tensors.values()
    z_s, z_t = (100.0 * f @ a.T / 2.0 for f, a in ((student, anchors), (teacher, anchors.detach())))
    return sum(4 * F.cross_entropy(s, F.softmax(t, 1)) for s, t in ((z_s, z_t), (z_s.T, z_t.T)))


OPERATIONS: dict[str, tuple[Callable, Callable, tuple[str, ...]]] = {
    "moe_adapter": (adapter, run_adapter, ("expert_ids",)),
    "moe_adapter by token": (lambda seed, small: adapter(seed, small, tokens=True), run_adapter, ("expert_ids",)),
    "top_k_gating": (router, run_router, ("noise",)),
    "distill_kl": (logits, run_logits, ("teacher_logits",)),
    "feature_distill_kl": (features, run_features, ("teacher",)),
}
"""Inputs, the operation (plain PyTorch where the backend is None), and the inputs that are constants."""


def results(tensors: Tensors, run: Callable, constants: tuple[str, ...], backend: str | None) -> Tensors:
    leaves = {n: t.detach().requires_grad_(n not in constants) for n, t in tensors.items()}
    out = run(leaves, backend)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(11)).to(out)
    wanted = [name for name, leaf in leaves.items() if leaf.requires_grad]
    return {
        "out": out.detach(),
        **dict(zip(wanted, torch.autograd.grad(out, [leaves[n] for n in wanted], upstream), strict=True)),
    }


def errors(name: str, backend: str | None, dtype: torch.dtype, small: bool, device: str) -> dict[str, float]:
    """Relative root mean square error of every result, on inputs that are rounded to ``dtype`` for both."""
    make, run, constants = OPERATIONS[name]
    wrong, size = {}, {}
    for seed in range(1 if small else SEEDS):
        given = {n: t.to(device, dtype if t.is_floating_point() else t.dtype) for n, t in make(seed, small).items()}
        exact = {n: t.double() if t.is_floating_point() else t for n, t in given.items()}
        found, expected = results(given, run, constants, backend), results(exact, run, constants, None)
        for key, value in expected.items():
            wrong[key] = wrong.get(key, 0.0) + float((found[key].double() - value).square().sum())
            size[key] = size.get(key, 0.0) + float(value.square().sum())
    return {key: (wrong[key] / size[key]) ** 0.5 for key in wrong}


def check(name: str, backend: str, dtype: torch.dtype, small: bool = False, device: str = "cpu") -> None:
    found = errors(name, backend, dtype, small, device)
    if dtype == torch.float32:
        limits = {key: FORWARD if key == "out" else GRADIENT for key in found}
    else:
        limits = {key: TIMES * error for key, error in errors(name, None, dtype, small, device).items()}
    too_large = {key: (error, limits[key]) for key, error in found.items() if not error <= limits[key]}
    assert not too_large, f"(error, limit): {too_large}"


@pytest.mark.native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_compiled(name, dtype):
    check(name, "cpu", dtype)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16], ids=str
)  # the interpreter multiplies the bits of bfloat16
@pytest.mark.parametrize("name", OPERATIONS)
def test_triton(name, dtype):
    check(name, "triton", dtype, small=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_on_a_gpu(name, dtype):
    check(name, "triton", dtype, device="cuda")


AVERAGES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.bfloat16),
]


@pytest.mark.parametrize(
    "backend", [pytest.param("cpu", marks=pytest.mark.native), pytest.param("triton", marks=pytest.mark.interpreter)]
)
@pytest.mark.parametrize(("average", "value"), AVERAGES, ids=str)
def test_averages(average, value, backend):
    """Beside torch.lerp of tensors of the average's dtype."""
    a, v = torch.randn(3000).to(average), torch.randn(3000).to(value)
    exact = a.double() + (v.double() - a.double()) / 3
    own = torch.lerp(a, v.to(average), 1 / 3)
    clk.average_([a], [v], 1 / 3, backend=backend)
    found, peer = (float((t.double() - exact).norm() / exact.norm()) for t in (a, own))
    assert found <= (FORWARD if average == torch.float32 else TIMES * peer)
