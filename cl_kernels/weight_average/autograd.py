"""Registrations of weight averaging: fake implementation (nothing to return) and the Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from cl_kernels import dispatch, library
from cl_kernels.weight_average import plan
from cl_kernels.weight_average.plan import Plan


def _fake(
    averages: list[Tensor],
    values: list[Tensor],
    weight: float,
    others: list[Tensor],
    other_weight: float,
    seed: int | None,
) -> None:
    """Nothing to return. One meta tensor among others brings the dispatcher here, who must not take them for averaged."""
    for tensor in (*values, *others):
        torch._check(tensor.device == averages[0].device, lambda: "average_: expected all tensors on one device")


for _namespace in (library.COMPILED, library.TRITON):
    library.definitions[_namespace]._register_fake("average_", _fake)

operator = library.operator("average_", "cpu")


def run(
    backend: str,
    found: Plan,
    averages: list[Tensor],
    values: list[Tensor],
    weight: float,
    others: list[Tensor],
    other_weight: float,
    seed: int | None,
) -> None:
    """Contiguous tensors that belong to a plan, with the compiled library or Triton."""
    if backend == "triton" and found.straight and not torch.compiler.is_compiling():
        # Past the dispatcher: the operator would have to look for the plan again.
        from cl_kernels.weight_average import triton_launch

        triton_launch.average_(found, averages, values, weight, others, other_weight, seed)
        return
    library.operator("average_", backend)(averages, values, weight, others, other_weight, seed)


def _triton(
    averages: list[Tensor],
    values: list[Tensor],
    weight: float,
    others: list[Tensor],
    other_weight: float,
    seed: int | None,
) -> None:
    from cl_kernels.weight_average import triton_launch

    found = plan.find((averages, values, others) if others else (averages, values))
    torch._check(found.straight, lambda: "average_: expected contiguous tensors")
    triton_launch.average_(found, averages, values, weight, others, other_weight, seed)


for _key in ("CUDA", "CPU") if dispatch.INTERPRETING else ("CUDA",):
    library.definitions[library.TRITON].impl("average_", _triton, _key)
