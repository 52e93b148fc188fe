"""The gating kernels compile for every target without a spill, in the configurations that their launchers use."""

from __future__ import annotations

import pytest

from cl_kernels import testing

pytestmark = pytest.mark.aot

EXPERTS = (2, 8, 22, 50, 64, 100, 128)
"""Launchers know of multiples of 16 that rows are aligned, which changes the code: so there is one of each for every tile."""

MANY, PUBLISHED = 12_608, 64
"""Rows: of token routing, which programs share; and of a published training step, left to one program in 16 bits."""


def type_of(name):
    import triton.language as tl

    return {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32, "fp64": tl.float64}[name]


def compile_gating(target, dtype, noisy, experts, rows=MANY):
    from cl_kernels.gating import triton_kernels as kernels
    from cl_kernels.gating import triton_tiles as tiles

    out = "fp64" if dtype == "fp64" else "fp32"
    operand = type_of(dtype)
    launch = kernels.launch_of(rows, 768, experts, noisy, operand, target.startswith("gfx"))
    signature = {
        "x_ptr": f"*{dtype}",
        "w_gate_ptr": f"*{dtype}",
        "gates_ptr": f"*{out}",
        "expert_ids_ptr": "*i64",
        "usage_ptr": "*i64",
        "B": "i32",
        "D": "i32:16",
        "E": "i32" if experts % 16 else "i32:16",
        "stride_xb": "i32:16",
    }
    constexprs = {
        "stride_xd": 1,
        "K": 2,
        "NOISY": noisy,
        "OPERAND": operand,
        "COMPUTE": type_of(out),
        "BLOCK_B": launch.block,
        "BLOCK_D": tiles.depth_of(experts),
        "BLOCK_E": tiles.block_of(experts),
        "ALONE": launch.alone,
    }
    pointers = {"w_noise_ptr": f"*{dtype}", "noise_ptr": f"*{dtype}"}
    if noisy:
        signature |= pointers
    else:
        constexprs |= dict.fromkeys(pointers)
    return testing.compile_for(kernels.gating_kernel, signature, constexprs, target, launch.warps), launch


def compile_gradients(target, dtype, noisy, experts):
    from cl_kernels.gating import triton_backward
    from cl_kernels.gating import triton_tiles as tiles

    common = {"COMPUTE": type_of("fp32"), "BLOCK_B": tiles.BLOCK_B, "BLOCK_D": tiles.depth_of(experts)}
    common |= {"BLOCK_E": tiles.block_of(experts), "stride_xd": 1}
    sizes = {"B": "i32", "D": "i32:16", "E": "i32" if experts % 16 else "i32:16", "stride_xb": "i32:16"}
    scratch = {"grad_logits_ptr": "*fp32", "grad_spread_ptr": "*fp32"}
    inputs = {f"{name}_ptr": f"*{dtype}" for name in ("x", "w_gate", "w_noise", "noise", "grad_x")}
    signature = inputs | scratch | sizes | {"grad_ptr": "*fp32", "gates_ptr": "*fp32", "expert_ids_ptr": "*i64"}
    constexprs = common | {"K": 2, "NOISY": noisy}
    warps = triton_backward.warps_of(experts)
    yield testing.compile_for(triton_backward.row_gradient_kernel, signature, constexprs, target, warps)
    weights = {f"{name}_ptr": f"*{dtype}" for name in ("x", "grad_gate", "grad_noise")}
    yield testing.compile_for(triton_backward.weight_gradient_kernel, weights | scratch | sizes, common, target, warps)


@pytest.mark.parametrize("target", testing.TARGETS)
@pytest.mark.parametrize(
    ("dtype", "noisy", "experts"),
    [("bf16", True, 22), ("bf16", True, 50), ("fp32", True, 128)],
)
def test_no_spills(target, dtype, noisy, experts):
    info, launch = compile_gating(target, dtype, noisy, experts)
    assert not launch.alone
    testing.assert_fits(info)


@pytest.mark.parametrize("target", testing.TARGETS)
@pytest.mark.parametrize(
    "experts", [22, *(pytest.param(experts, marks=pytest.mark.slow) for experts in EXPERTS if experts != 22)]
)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_no_spills_with_any_number_of_experts(target, dtype, experts):
    testing.assert_fits(compile_gating(target, dtype, True, experts)[0])
    for info in compile_gradients(target, dtype, True, experts):
        testing.assert_fits(info)


def atomics(info):
    """Atomic operations on global memory. ATOMS, on shared memory, is how Blackwell allots its tensor memory."""
    return [o for o in info.opcodes if o.split(".")[0] in ("ATOM", "ATOMG", "RED", "REDG") or "_atomic_" in o]


@pytest.mark.parametrize("target", testing.TARGETS)
@pytest.mark.parametrize(("dtype", "noisy", "rows"), [("bf16", True, PUBLISHED), ("fp32", True, PUBLISHED // 2)])
def test_one_program_for_all_rows_has_no_spills_and_no_atomics(target, dtype, noisy, rows):
    info, launch = compile_gating(target, dtype, noisy, 22, rows)
    assert launch.alone
    testing.assert_fits(info)
    assert not atomics(info)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_programs_that_share_the_rows_have_atomics(target):
    """So that the test above can fail."""
    info, _ = compile_gating(target, "fp32", False, 22)
    assert atomics(info)


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_sixteen_bits_are_multiplied_by_tensor_cores(dtype, target):
    """Exactly, two numbers of 16 bits having a product that fp32 holds; numbers of 32 bits would lose digits there."""
    info, _ = compile_gating(target, dtype, True, 22)
    assert (info.count("HMMA") > 0) == (dtype == "bf16")


@pytest.mark.parametrize("target", ["sm_80", "sm_86", "sm_90"])
def test_float64_fits(target):
    from cl_kernels.gating import autograd

    info, _ = compile_gating(target, "fp64", True, autograd.FUSED_EXPERTS_FLOAT64)
    assert info.shared <= testing.SHARED_MEMORY[target]


@pytest.mark.parametrize("target", testing.TARGETS)
@pytest.mark.parametrize(("dtype", "experts"), [("bf16", 22), ("fp32", 128)])
def test_gradients_do_not_spill(target, dtype, experts):
    for info in compile_gradients(target, dtype, True, experts):
        testing.assert_fits(info)
