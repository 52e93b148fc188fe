"""Weight averaging in Triton: one launch for a list of tensors, through a table of pointers and chunks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def average_kernel(
    dst_ptr,  # [n]
    src_ptr,  # [n]
    n,
    weight,
    BLOCK: tl.constexpr,
):
    """One tensor: every program handles ``BLOCK`` consecutive elements in fp32."""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = offset < n
    a = tl.load(dst_ptr + offset, mask=inside).to(tl.float32)
    v = tl.load(src_ptr + offset, mask=inside).to(tl.float32)
    tl.store(dst_ptr + offset, (a + weight * (v - a)).to(dst_ptr.dtype.element_ty), mask=inside)


def average_(averages: list[Tensor], values: list[Tensor], weight: float) -> None:
    """See :func:`cl_kernels.average_`."""
    for average, value in zip(averages, values, strict=True):
        if average.numel():
            with torch.cuda.device_of(average):
                average_kernel[(triton.cdiv(average.numel(), BLOCK),)](
                    average, value, average.numel(), weight, BLOCK=BLOCK
                )
