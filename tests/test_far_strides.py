"""Triton kernels, in the interpreter, on tensors whose elements lie 2³¹ and more apart: no offset is computed in 32 bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import cl_kernels as clk

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.filterwarnings(
        "ignore::RuntimeWarning:triton.runtime.interpreter"
    ),  # NumPy says where 32 bits overflow
]

FAR = 1 << 30
"""Twice this stride does not fit 31 bits, and the stride itself does: a kernel gets it as a 32-bit number."""


@pytest.fixture
def far(tmp_path: Path) -> Callable[[Tensor, tuple[int, ...]], Tensor]:
    """``tensor`` with other strides, in a file of zeros of which only the touched pages exist.

    It starts far enough from the beginning that an offset which overflows finds a zero, and no memory of others.
    """
    whole = torch.from_file(str(tmp_path / "sparse"), shared=True, size=5 * FAR, dtype=torch.float32)
    places = iter(range(2 * FAR, 3 * FAR, 1 << 20))

    def spread(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
        return whole.as_strided(tensor.shape, strides, next(places)).copy_(tensor).detach()

    return spread


def test_adapters(far) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x, residual, upstream = (random(3, 5, 8) for _ in range(3))
    weights = [random(2, 4, 8), random(2, 4), random(2, 8, 4), random(2, 8)]
    ids, gates = torch.tensor([[0, 1], [1, 0], [1, 1]]), random(3, 2)

    def results(x: Tensor, residual: Tensor, upstream: Tensor) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (x, gates, *weights)]
        out = clk.moe_adapter(leaves[0], ids, *leaves[1:], residual=residual, backend="triton")
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]

    expected = results(x, residual, upstream)
    spread = results(*(far(t, (FAR, 8, 1)) for t in (x, residual, upstream)))
    for found, wanted in zip(spread, expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_gating(far) -> None:
    x, w_gate, noise = torch.randn(3, 8), torch.randn(8, 5), torch.randn(3, 5)

    def results(x: Tensor) -> list[Tensor]:
        leaves = [x.detach().requires_grad_(), w_gate.clone().requires_grad_(), w_gate.cos().requires_grad_()]
        gates, ids, _ = clk.top_k_gating(*leaves, k=2, noise=noise, backend="triton")
        return [gates.detach(), ids, *torch.autograd.grad(gates.square().sum(), leaves)]

    for found, wanted in zip(results(far(x, (FAR, 1))), results(x), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(("strides", "dim"), [((FAR, 1), 1), ((FAR, 1), 0), ((1, FAR), 0), ((1, FAR), 1)], ids=str)
def test_logits(far, strides: tuple[int, int], dim: int) -> None:
    student, teacher = torch.randn(3, 3), torch.randn(3, 3)

    def results(student: Tensor, teacher: Tensor) -> list[Tensor]:
        leaf = student.detach().requires_grad_()
        loss = clk.distill_kl(leaf, teacher, dim=dim, reduction="none", backend="triton")
        return [loss.detach(), *torch.autograd.grad(loss.sum(), leaf)]

    spread = results(far(student, strides), far(teacher, strides))
    for found, wanted in zip(spread, results(student, teacher), strict=True):
        torch.testing.assert_close(found, wanted)
