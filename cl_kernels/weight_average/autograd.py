"""Registrations of weight averaging: fake implementation (nothing to return) and the Triton kernels."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from cl_kernels import dispatch, library

operator = partial(library.operator, "average_")

for _namespace in (library.COMPILED, library.TRITON):
    library.definitions[_namespace]._register_fake("average_", lambda averages, values, weight: None)


def _triton(averages: list[Tensor], values: list[Tensor], weight: float) -> None:
    from cl_kernels.weight_average import triton_kernels

    torch._check(len(averages) == len(values), lambda: "average_: expected as many values as averages")
    for a, v in zip(averages, values, strict=True):
        torch._check(
            a.numel() == v.numel() and a.device == v.device, lambda: "average_: expected equal sizes and devices"
        )
        torch._check(a.is_contiguous() and v.is_contiguous(), lambda: "average_: expected contiguous tensors")
    triton_kernels.average_(averages, values, weight)


for _key in ("CUDA", "CPU") if dispatch.INTERPRETING else ("CUDA",):
    library.definitions[library.TRITON].impl("average_", _triton, _key)
