"""Registrations of weight averaging: fake implementation (nothing to return) and the Triton kernels."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from cl_kernels import dispatch, library

operator = partial(library.operator, "average_")

for _namespace in (library.COMPILED, library.TRITON):
    library.definitions[_namespace]._register_fake("average_", lambda averages, values, weight: None)


def _triton(averages: list[Tensor], values: list[Tensor], weight: float) -> None:
    from cl_kernels.weight_average import triton_kernels

    triton_kernels.average_(averages, values, weight)


for _key in ("CUDA", "CPU") if dispatch.INTERPRETING else ("CUDA",):
    library.definitions[library.TRITON].impl("average_", _triton, _key)
