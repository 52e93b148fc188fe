"""What the gating kernels share: masked tiles of a matrix, products of router input with a router, and the sizes of the tiles."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cl_kernels import dispatch

BLOCK_B = 16


@triton.jit
def load_tile(ptr, rows, columns, row_stride, column_stride, row_end, column_end, DTYPE: tl.constexpr):
    """``[rows, columns]`` of a matrix as DTYPE, zero from ``row_end`` and ``column_end`` on.

    Offsets have the type of ``rows`` and ``columns``: 64 bits where they may not fit 32.
    """
    where = rows[:, None] * row_stride + columns[None, :] * column_stride
    inside = (rows < row_end)[:, None] & (columns < column_end)[None, :]
    return tl.load(ptr + where, mask=inside, other=0.0).to(DTYPE)


@triton.jit
def router_products(
    rows,  # [BLOCK_B] int64
    x_ptr,  # [B, D]
    w_ptr,  # [D, E]
    other_ptr,  # [D, E], read if BOTH
    B,
    D,
    E,
    stride_xb,
    stride_xd,
    BOTH: tl.constexpr,
    OPERAND: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """``x w`` and, if BOTH, ``x other`` of a block of rows, [BLOCK_B, BLOCK_E]: products of OPERANDs, summed as COMPUTE."""
    columns = tl.arange(0, BLOCK_E)
    first = tl.zeros((BLOCK_B, BLOCK_E), COMPUTE)
    second = tl.zeros((BLOCK_B, BLOCK_E), COMPUTE)
    for start in range(0, D, BLOCK_D):
        depth = start + tl.arange(0, BLOCK_D)
        x = load_tile(x_ptr, rows, depth.to(tl.int64), stride_xb, stride_xd, B, D, OPERAND)
        w = load_tile(w_ptr, depth, columns, E, 1, D, E, OPERAND)
        first = tl.dot(x, w, first, input_precision="ieee", out_dtype=COMPUTE)
        if BOTH:
            w = load_tile(other_ptr, depth, columns, E, 1, D, E, OPERAND)
            second = tl.dot(x, w, second, input_precision="ieee", out_dtype=COMPUTE)
    return first, second


def block_of(experts: int) -> int:
    """Columns of a program's tile: all experts, and at least the 16 that a matrix product needs."""
    return max(16, triton.next_power_of_2(experts))


def depth_of(experts: int) -> int:
    """Features of a tile: fewer with many experts, so that two routers' tiles fit the 64 KiB of an AMD GPU."""
    return 32 if experts <= 64 else 16


def operand_type(x: Tensor, *weights: Tensor | None) -> tl.dtype:
    """What x (B, D) and the routers' weights (D, E) are multiplied as.

    Two 16-bit numbers of one type have an exact product in fp32, so tensor cores lose nothing that fp32 arithmetic would keep.
    Mixed types are widened, as is bfloat16 in the interpreter, which would multiply its bits.
    """
    if x.dtype == torch.float64:
        return tl.float64
    alike = all(weight is None or weight.dtype == x.dtype for weight in weights)
    if alike and x.dtype == torch.float16:
        return tl.float16
    if alike and x.dtype == torch.bfloat16 and not dispatch.INTERPRETING:
        return tl.bfloat16
    return tl.float32
