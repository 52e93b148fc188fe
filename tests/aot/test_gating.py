"""The gating kernel compiles for every target without a spill, in the configurations that the launcher uses."""

from __future__ import annotations

import pytest

from cl_kernels import testing

pytestmark = pytest.mark.aot


def compile_gating(target, dtype, noisy, experts, compute="fp32"):
    import triton.language as tl

    from cl_kernels.gating import triton_kernels as kernels

    out = "fp64" if compute == "fp64" else "fp32"
    signature = {
        "x_ptr": f"*{dtype}",
        "w_gate_ptr": f"*{dtype}",
        "gates_ptr": f"*{out}",
        "expert_ids_ptr": "*i64",
        "usage_ptr": "*i64",
        "B": "i32",
        "D": "i32:16",
        "E": "i32",
        "stride_xb": "i32:16",
    }
    constexprs = {
        "stride_xd": 1,
        "K": 2,
        "NOISY": noisy,
        "COMPUTE": tl.float64 if compute == "fp64" else tl.float32,
        "BLOCK_B": kernels.BLOCK_B,
        "BLOCK_D": kernels.BLOCK_D,
        "BLOCK_E": kernels.block_of(experts),
    }
    pointers = {"w_noise_ptr": f"*{dtype}", "noise_ptr": f"*{dtype}"}
    if noisy:
        signature |= pointers
    else:
        constexprs |= dict.fromkeys(pointers)
    return testing.compile_for(kernels.gating_kernel, signature, constexprs, target)


@pytest.mark.parametrize("target", testing.TARGETS)
@pytest.mark.parametrize(("dtype", "noisy", "experts"), [("bf16", True, 22), ("fp32", True, 22), ("fp32", False, 64)])
def test_no_spills(target, dtype, noisy, experts):
    testing.assert_fits(compile_gating(target, dtype, noisy, experts))


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_float64_compiles(target):
    info = compile_gating(target, "fp64", True, 22, compute="fp64")
    assert info.shared <= testing.SHARED_MEMORY[target]
