"""The adapter kernels compile for every target without a spill, in the configurations that the launcher uses."""

from __future__ import annotations

import pytest
import torch

from cl_kernels import testing

pytestmark = pytest.mark.aot

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SAMPLES = {"shape": (64, 197, 768), "rank": 64, "slots": 2, "gathered": False}  # ViT-B/16, as published: 128 rows
LARGE = SAMPLES | {"shape": (64, 257, 1024)}  # ViT-L/14
FEW = SAMPLES | {"shape": (8, 50, 768)}  # 64 rows
WIDE = SAMPLES | {"slots": 3}  # more columns than registers hold
TOKENS = {"shape": (12608, 1, 768), "rank": 64, "slots": 2, "gathered": True}
FEW_TOKENS = TOKENS | {"shape": (512, 1, 768)}
EXPERTS = 22
SIZES = dict.fromkeys(("B", "L", "E"), "i32")
PRODUCTS = {"sm_80": "HMMA", "sm_90": "HGMMA", "gfx942": "v_mfma"}
"""Opcodes of the matrix units."""


def strides(*names):
    return {f"{name}_stride_{dim}": "i32:16" for name in names for dim in "bl"}


def constants(target, dtype, precision, shape, rank, slots, gathered):
    from cl_kernels.moe_adapter import triton_blocks

    shared = testing.SHARED_MEMORY[target]
    blocks = triton_blocks.blocks_for(DTYPES[dtype], shape, rank, slots, EXPERTS, gathered, shared)
    values = {
        "D": shape[2],
        "R": rank,
        "RP": blocks.padded_rank,
        "K": slots,
        "EP": 32,
        "CHUNKS": blocks.chunks,
        "GATHERED": gathered,
        "FIRST": not gathered,  # of the launches for several slots the last one uses most registers
        "LAST": True,
        "BLOCK_ROWS": blocks.rows,
        "BLOCK_C": blocks.columns,
        "BLOCK_D": blocks.width,
        "PRECISION": precision,
        "STAGES": blocks.out_stages,
    }
    return (values | ({} if gathered else {"order_ptr": None, "offset_ptr": None, "partial_ptr": None})), blocks


def compile_forward(target, dtype, case, precision="ieee"):
    from cl_kernels.moe_adapter import triton_forward

    values, blocks = constants(target, dtype, precision, **case)
    typed = ("x", "down_weight", "down_bias", "up_weight", "up_bias", "residual", "partial", "out", "hidden")
    signature = {f"{name}_ptr": f"*{dtype}" for name in typed} | SIZES | strides("x", "residual", "out")
    signature |= {"ids_ptr": "*i64", "gates_ptr": "*fp32", "seed_ptr": "*i64", "scale": "fp32", "dropout_p": "fp32"}
    signature |= {"first_slot": "i32", "order_ptr": "*i32", "offset_ptr": "*i32"}
    values |= {"DROPOUT": True, "SHIFTED": True, "KP": 4 if case["slots"] == 3 else 2}
    return compile_kernel(triton_forward.forward_kernel, signature, values, target, blocks)


def compile_input_gradient(target, dtype, case, precision="ieee"):
    from cl_kernels.moe_adapter import triton_backward

    values, blocks = constants(target, dtype, precision, **case)
    typed = ("grad", "down_weight", "up_weight", "up_bias", "hidden", "partial", "grad_x", "grad_pre")
    signature = {f"{name}_ptr": f"*{dtype}" for name in typed} | SIZES | strides("grad", "grad_x")
    signature |= {"ids_ptr": "*i64", "gates_ptr": "*fp32", "gate_terms_ptr": "*fp32", "scale": "fp32", "grown": "fp32"}
    signature |= {"terms": "i32", "first_slot": "i32", "order_ptr": "*i32", "offset_ptr": "*i32"}
    return compile_kernel(triton_backward.input_gradient_kernel, signature, values, target, blocks)


def compile_kernel(kernel, signature, values, target, blocks):
    signature = {name: kind for name, kind in signature.items() if name not in values}
    return testing.compile_for(kernel, signature, values, target, blocks.num_warps, blocks.num_stages)


def compile_expert_gradient(target, dtype, precision="ieee"):
    from cl_kernels.moe_adapter import triton_blocks, triton_experts

    values = triton_blocks.expert_blocks(DTYPES[dtype], 768, 64, testing.SHARED_MEMORY[target])
    launch = {name: values.pop(name) for name in ("num_warps", "num_stages")}
    weights = ("grad_down_weight", "grad_down_bias", "grad_up_weight", "grad_up_bias")
    signature = {f"{name}_ptr": f"*{dtype}" for name in ("grad", "x", "hidden", "grad_pre", *weights)}
    signature |= {"gates_ptr": "*fp32", "order_ptr": "*i32", "offset_ptr": "*i32", "sums_ptr": "*fp32", "scale": "fp32"}
    signature |= SIZES | {"chunk_rows": "i32"} | strides("grad", "x")
    values |= {"D": 768, "R": 64, "K": 2, "EP": 32, "PRECISION": precision}
    return testing.compile_for(triton_experts.expert_gradient_kernel, signature, values, target, **launch)


@pytest.mark.parametrize("target", testing.TARGETS)
@pytest.mark.parametrize("case", [SAMPLES, WIDE, TOKENS], ids=["samples", "wide", "tokens"])
@pytest.mark.parametrize("compile_case", [compile_forward, compile_input_gradient])
def test_row_kernels_fit(compile_case, case, target):
    info = compile_case(target, "bf16", case)
    testing.assert_fits(info)
    assert info.count(PRODUCTS.get(target, "")) > 0


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("case", [LARGE, FEW, FEW_TOKENS], ids=["large", "few", "few tokens"])
@pytest.mark.parametrize("compile_case", [compile_forward, compile_input_gradient])
def test_row_kernels_fit_other_sizes(compile_case, case, target):
    testing.assert_fits(compile_case(target, "bf16", case))


@pytest.mark.parametrize("target", testing.TARGETS)
@pytest.mark.parametrize("compile_case", [compile_forward, compile_input_gradient])
def test_row_kernels_fit_in_fp32(compile_case, target):
    testing.assert_fits(compile_case(target, "fp32", SAMPLES))


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("case", [WIDE, TOKENS], ids=["wide", "tokens"])
@pytest.mark.parametrize("compile_case", [compile_forward, compile_input_gradient])
def test_other_row_kernels_fit_in_fp32(compile_case, case, target):
    testing.assert_fits(compile_case(target, "fp32", case))


@pytest.mark.parametrize("target", testing.TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_expert_gradient_fits(dtype, target):
    info = compile_expert_gradient(target, dtype)
    testing.assert_fits(info)
    if dtype == "bf16":
        assert info.count(PRODUCTS.get(target, "")) > 0


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_tiles_are_read_ahead_and_added_without_atomics(target):
    """Asynchronous copies of 16 bytes bring in every tile: those a product waits for would show as ordinary loads."""
    tiles = {  # 16-byte copies of a stage's tiles, by each of 256 threads
        compile_forward: 4 + 4 + 4 + 4,  # x, down weights; up weights, residual
        compile_input_gradient: 4 + 4 + 4,  # grad, up weights; down weights
    }
    for compile_case, copies in tiles.items():
        info = compile_case(target, "bf16", SAMPLES)
        assert info.count("LDGSTS.E.BYPASS.128") >= 3 * copies
        assert info.count("ATOM") == info.count("RED.") == 0
    info = compile_expert_gradient(target, "bf16")
    assert info.count("LDGSTS.E.BYPASS.128") >= 2 * (4 + 4 + 2 + 2)  # x, grad; hidden, its gradient
    assert info.count("ATOM") == info.count("RED.") == 0


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_tf32_fits(target):
    for compile_case in (compile_forward, compile_input_gradient):
        testing.assert_fits(compile_case(target, "fp32", SAMPLES, "tf32"))
    testing.assert_fits(compile_expert_gradient(target, "fp32", "tf32"))


@pytest.mark.parametrize("target", testing.TARGETS)
def test_last_sums_fit(target):
    from cl_kernels.moe_adapter import triton_experts, triton_launch

    names = ("grad_down_weight", "grad_down_bias", "grad_up_weight", "grad_up_bias")
    signature = {f"{name}_ptr": "*bf16" for name in names} | {"sums_ptr": "*fp32", "offset_ptr": "*i32"}
    signature |= {"gate_terms_ptr": "*fp32", "grad_gates_ptr": "*fp32"} | dict.fromkeys(
        ("gates", "L", "E", "chunk_rows"), "i32"
    )
    values = {"D": 768, "R": 64, "K": 2, "EP": 32, "TERMS": 4, "TERMS_PADDED": 4}
    values |= {"BLOCK": triton_launch.BLOCK_SUMS, "BLOCK_GATES": triton_launch.BLOCK_GATES}
    testing.assert_fits(testing.compile_for(triton_experts.finish_kernel, signature, values, target))


@pytest.mark.parametrize("target", testing.TARGETS)
def test_routing_fits(target):
    from cl_kernels.moe_adapter import triton_routing

    common = {"ids_ptr": "*i64", "count_ptr": "*i32", "B": "i32", "E": "i32", "segments": "i32"}
    values = {"K": 2, "SEGMENT": triton_routing.SEGMENT, "BLOCK": 2048}
    testing.assert_fits(testing.compile_for(triton_routing.count_kernel, common, values, target))
    signature = common | {"order_ptr": "*i32", "offset_ptr": "*i32"}
    testing.assert_fits(testing.compile_for(triton_routing.order_kernel, signature, values, target))
