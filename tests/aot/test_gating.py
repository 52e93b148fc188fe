"""The gating kernel compiles for every target without a spill, in the configurations that the launcher uses."""

from __future__ import annotations

import pytest

from cl_kernels import testing

pytestmark = pytest.mark.aot


def compile_gating(target, dtype, noisy, experts, compute="fp32", alone=False):
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
        "ALONE": alone,
    }
    pointers = {"w_noise_ptr": f"*{dtype}", "noise_ptr": f"*{dtype}"}
    if noisy:
        signature |= pointers
    else:
        constexprs |= dict.fromkeys(pointers)
    warps = kernels.WARPS_ALONE if alone else 4
    return testing.compile_for(kernels.gating_kernel, signature, constexprs, target, warps)


@pytest.mark.parametrize("target", testing.TARGETS)
@pytest.mark.parametrize(("dtype", "noisy", "experts"), [("bf16", True, 22), ("fp32", True, 22), ("fp32", False, 64)])
def test_no_spills(target, dtype, noisy, experts):
    testing.assert_fits(compile_gating(target, dtype, noisy, experts))


def atomics(info):
    """Atomic operations in the machine code: ATOM, ATOMG, RED and REDG, but not REDUX, a warp's reduction; *_atomic_* on AMD."""
    reductions = [o for o in info.opcodes if o.startswith("RED") and not o.startswith("REDUX")]
    return reductions + [opcode for opcode in info.opcodes if "ATOM" in opcode.upper()]


@pytest.mark.parametrize("target", testing.TARGETS)
@pytest.mark.parametrize(("dtype", "noisy"), [("bf16", True), ("fp16", True), ("fp32", True), ("fp32", False)])
def test_one_program_for_all_rows_has_no_spills_and_no_atomics(target, dtype, noisy):
    info = compile_gating(target, dtype, noisy, 32, alone=True)
    testing.assert_fits(info)
    assert not atomics(info)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_programs_that_share_the_rows_have_atomics(target):
    """So that the test above can fail."""
    info = compile_gating(target, "fp32", False, 22)
    assert atomics(info)


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_float64_compiles(target):
    info = compile_gating(target, "fp64", True, 22, compute="fp64")
    assert info.shared <= testing.SHARED_MEMORY[target]


def compile_gradients(target, dtype, noisy, experts):
    import triton.language as tl

    from cl_kernels.gating import triton_backward

    common = {"COMPUTE": tl.float32, "BLOCK_B": triton_backward.BLOCK_B, "BLOCK_D": triton_backward.BLOCK_D}
    common |= {"BLOCK_E": triton_backward.block_of(experts), "stride_xd": 1}
    sizes = {"B": "i32", "D": "i32:16", "E": "i32", "stride_xb": "i32:16"}
    scratch = {"grad_logits_ptr": "*fp32", "grad_spread_ptr": "*fp32"}
    inputs = {f"{name}_ptr": f"*{dtype}" for name in ("x", "w_gate", "w_noise", "noise", "grad_x")}
    signature = inputs | scratch | sizes | {"grad_ptr": "*fp32", "gates_ptr": "*fp32", "expert_ids_ptr": "*i64"}
    constexprs = common | {"K": 2, "NOISY": noisy}
    yield testing.compile_for(
        triton_backward.row_gradient_kernel, signature, constexprs, target, triton_backward.NUM_WARPS
    )
    weights = {f"{name}_ptr": f"*{dtype}" for name in ("x", "grad_gate", "grad_noise")}
    yield testing.compile_for(
        triton_backward.weight_gradient_kernel, weights | scratch | sizes, common, target, triton_backward.NUM_WARPS
    )


@pytest.mark.parametrize("target", testing.TARGETS)
@pytest.mark.parametrize(("dtype", "experts"), [("bf16", 22), ("fp32", 64)])
def test_gradients_do_not_spill(target, dtype, experts):
    for info in compile_gradients(target, dtype, True, experts):
        testing.assert_fits(info)
