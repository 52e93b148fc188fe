"""Launches at the largest sizes that users have: within the limits of every GPU, on the tensors' device, compiled only once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.aot

BF16, FP32 = torch.bfloat16, torch.float32


def empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def adapters(batch: int, length: int, width: int, experts: int = 22, dtype=BF16, length_first: bool = False, slots=2):
    """Forward, and backward with all gradients."""
    from cl_kernels.moe_adapter import triton_launch

    shape = (length, batch, width) if length_first else (batch, length, width)
    x, residual, grad = (empty(*shape, dtype=dtype) for _ in range(3))
    if length_first:
        x, residual, grad = (t.transpose(0, 1) for t in (x, residual, grad))
    ids, gates = empty(batch, slots, dtype=torch.int64), empty(batch, slots, dtype=FP32)
    down, up = empty(experts, 64, width, dtype=dtype), empty(experts, width, 64, dtype=dtype)
    down_bias, up_bias = empty(experts, 64, dtype=dtype), empty(experts, width, dtype=dtype)
    seed = empty(dtype=torch.int64)
    _, hidden = triton_launch.forward(x, ids, gates, down, down_bias, up, up_bias, residual, seed, 0.1, 0.1, True)
    triton_launch.backward(grad, x, ids, gates, down, up, up_bias, hidden, 0.1, 0.1, True, True, True)


def gating(rows: int, width: int, experts: int, dtype=BF16, k: int = 2):
    from cl_kernels.gating import triton_backward, triton_kernels

    x, w_gate, w_noise = empty(rows, width, dtype=dtype), *(empty(width, experts, dtype=dtype) for _ in range(2))
    noise = empty(rows, experts, dtype=dtype)
    gates, ids, _ = triton_kernels.top_k_gating(x, w_gate, w_noise, noise, k)
    grad = torch.empty_like(gates)
    triton_backward.top_k_gating_backward(grad, x, w_gate, w_noise, noise, gates, ids, True, True, True)


def logits(*shape: int, transposed: bool = False, dtype=FP32):
    """(outer, M, inner)."""
    from cl_kernels.distill_kl import triton_kernels

    student, teacher = (empty(*shape, dtype=dtype) for _ in range(2))
    if transposed:
        student, teacher = student.mT, teacher.mT
    loss, stats = triton_kernels.distill_kl(student, teacher, 2.0, True)
    triton_kernels.distill_kl_backward(loss, student, teacher, stats, 2.0)
    triton_kernels.distill_kl_backward_(loss, student.contiguous(), teacher, stats, 2.0)


def features(N: int, M: int, d: int, K: int = 1, own: int | None = None, dtype=BF16):
    from cl_kernels.distill_kl import triton_launch

    tensors = (empty(N, d, dtype=dtype), empty(K, N, own or d, dtype=dtype), empty(M, d, dtype=dtype))
    given = (
        *tensors,
        empty(M, own, dtype=dtype) if own else None,
        empty(K, N, dtype=FP32),
        empty(dtype=FP32),
        1.0,
        2.0,
    )
    factors = (1.0, 1.0)
    loss, row_stats, column_stats = triton_launch.feature_distill_kl(*given, *factors, False, False)
    triton_launch.feature_distill_kl_backward(
        loss, *given[:6], row_stats, column_stats, *given[6:], *factors, False, True, True, True
    )


def averaging(*sizes: int):
    from cl_kernels.weight_average import plan, triton_launch

    averages, values = ([empty(size, dtype=FP32) for size in sizes] for _ in range(2))
    triton_launch.average_(plan.Plan(None, (averages, values)), averages, values, 0.1, [], 0.0, None)


CASES = {
    "adapters, 70,000 samples": lambda: adapters(70_000, 8, 768),
    "adapters, ViT-B/16": lambda: adapters(64, 197, 768),
    "adapters, ViT-bigG": lambda: adapters(512, 257, 1664),
    "adapters, ViT-bigG in fp32, length first": lambda: adapters(4096, 77, 1280, dtype=FP32, length_first=True),
    "adapters, three slots": lambda: adapters(70_000, 50, 768, slots=3),
    "adapters, 200,000 tokens": lambda: adapters(200_000, 1, 768, 64),
    "adapters, 4,000,000 tokens in fp32": lambda: adapters(4_000_000, 1, 768, 256, dtype=FP32, slots=3),
    "gating, 200,000 tokens": lambda: gating(200_000, 1664, 64),
    "gating, 128 experts in fp32": lambda: gating(70_000, 768, 128, FP32, 4),
    "gating, one program": lambda: gating(64, 768, 22),
    "gating, float64": lambda: gating(3000, 768, 32, torch.float64),
    "logits, rows": lambda: logits(4096, 100_000, 1),
    "logits, columns": lambda: logits(1, 4096, 100_000),
    "logits, more than 2³¹ of them, transposed": lambda: logits(1, 40_000, 70_000, transposed=True),
    "logits, maps of five million": lambda: logits(2, 150, 5_000_000, dtype=BF16),
    "features, 4096 x 100,000": lambda: features(4096, 100_000, 1280),
    "features, 64 x 3,000,000 in fp32": lambda: features(64, 3_000_000, 512, dtype=FP32),
    "features, 3,000,000 x 64 in fp32": lambda: features(3_000_000, 64, 512, dtype=FP32),
    "features, teachers of their own": lambda: features(70_000, 10_000, 512, 3, 768),
    "averaging, 2.5 billion weights": lambda: averaging(2_500_000_000, 7, 0, 4096),
}


@pytest.mark.parametrize("case", CASES)
def test_a_launch_is_within_the_limits(case: str) -> None:
    from recorded_launches import recorded

    with recorded() as found:
        CASES[case]()
    assert found.launches
    for launch in found.launches:
        x, y, z = launch.grid
        assert 1 <= x < 2**31, (launch.name, launch.grid)
        assert 1 <= y <= 65_535, (launch.name, launch.grid)
        assert 1 <= z <= 65_535, (launch.name, launch.grid)


def test_a_captured_average_keeps_its_table_and_needs_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replays read the table by address, long after newer lists have taken its plan's place; a capture cannot copy one."""
    from recorded_launches import recorded

    from cl_kernels.weight_average import plan, triton_launch

    averages, values = ([empty(5, dtype=FP32)] for _ in range(2))
    given = averages, values, 0.1, [], 0.0, None
    found = plan.Plan(None, (averages, values))
    kept: list = []
    monkeypatch.setattr(triton_launch, "_captured", kept)
    with recorded() as recording:
        with monkeypatch.context() as patch:
            patch.setattr(triton_launch, "_capturing", lambda _: True)
            with pytest.raises(RuntimeError, match=r"^average_: .*CUDA graph is captured.*once before the capture$"):
                triton_launch.average_(found, *given)
        assert not recording.launches
        triton_launch.average_(found, *given)
        assert not kept
        monkeypatch.setattr(triton_launch, "_capturing", lambda _: True)
        for _ in range(2):
            triton_launch.average_(found, *given)
    assert len(recording.launches) == 3
    assert len(kept) == 1
    assert kept[0] is found.tables


@pytest.mark.parametrize(
    ("call", "kernels"),
    [
        (lambda rows: adapters(rows, 50, 768), 6),  # two sizes of the block by which samples are sorted
        (lambda rows: adapters(rows + 2000, 1, 768), 7),
        (lambda rows: gating(rows, 768, 22), 5),  # three sizes of the block of rows that one program takes
        (lambda rows: logits(rows, 100, 1), 3),  # forward, backward, backward that overwrites
        (lambda rows: logits(1, rows, 100), 12),  # three steps, and whole multiples of 16 or not
        (lambda rows: features(rows, 1000, 512), 8),  # two widths of the blocks of rows
    ],
    ids=["adapters", "tokens", "gating", "logits, rows", "logits, columns", "features"],
)
def test_ragged_batches_compile_a_handful(call, kernels: int) -> None:
    from recorded_launches import recorded

    with recorded() as found:
        for rows in (64, 37, 1, 63, 2, 17, 50, 33):
            call(rows)
        assert len(found.kernels) == kernels, [kernel.function.__name__ for kernel in found.kernels]
