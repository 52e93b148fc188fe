"""The adapter kernels compile for every target without a spill, in the configurations that the launcher uses."""

from __future__ import annotations

import pytest
import torch

from cl_kernels import testing

pytestmark = pytest.mark.aot

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SHAPE = {"width": 768, "rank": 64, "slots": 2}  # ViT-B, as published
WIDE = {"width": 768, "rank": 64, "slots": 3}  # more columns than one launch holds
EXPERTS_PADDED = 32
SIZES = dict.fromkeys(("B", "L", "E"), "i32")


def strides(*names):
    return {f"{name}_stride_{dim}": "i32:16" for name in names for dim in "bl"}


def constants(dtype, gathered, precision, shape):
    from cl_kernels.moe_adapter import triton_launch

    blocks = triton_launch.blocks_for(DTYPES[dtype], 1 if gathered else 197, *shape.values(), gathered)
    values = {
        "D": shape["width"],
        "R": shape["rank"],
        "RP": blocks.padded_rank,
        "K": shape["slots"],
        "EP": EXPERTS_PADDED,
        "GATHERED": gathered,
        "OPENS": not gathered
        and shape is SHAPE,  # the others are launched in both forms, of which this takes more registers
        "BLOCK_ROWS": blocks.rows,
        "BLOCK_C": blocks.columns,
        "BLOCK_D": blocks.width,
        "PRECISION": precision,
    }
    return (values | ({} if gathered else {"order_ptr": None, "offset_ptr": None})), blocks


def compile_forward(target, dtype, gathered, precision, shape=SHAPE):
    from cl_kernels.moe_adapter import triton_kernels

    values, blocks = constants(dtype, gathered, precision, shape)
    typed = ("x", "down_weight", "down_bias", "up_weight", "up_bias", "residual", "out", "hidden")
    signature = {f"{name}_ptr": f"*{dtype}" for name in typed} | SIZES | strides("x", "residual", "out")
    signature |= {"ids_ptr": "*i64", "gates_ptr": "*fp32", "seed": "i64", "scale": "fp32", "dropout_p": "fp32"}
    signature |= {"first_column": "i32:16"} | ({"order_ptr": "*i32", "offset_ptr": "*i32"} if gathered else {})
    values["DROPOUT"] = True
    return testing.compile_for(
        triton_kernels.forward_kernel, signature, values, target, blocks.num_warps, blocks.num_stages
    )


def compile_input_gradient(target, dtype, gathered, precision, shape=SHAPE):
    from cl_kernels.moe_adapter import triton_kernels

    values, blocks = constants(dtype, gathered, precision, shape)
    typed = ("grad", "down_weight", "up_weight", "up_bias", "hidden", "grad_x", "grad_pre")
    signature = {f"{name}_ptr": f"*{dtype}" for name in typed} | SIZES | strides("grad", "grad_x")
    signature |= {"ids_ptr": "*i64", "gates_ptr": "*fp32", "gate_terms_ptr": "*fp32", "scale": "fp32", "grown": "fp32"}
    signature |= {"terms": "i32", "first_column": "i32:16"}
    signature |= {"order_ptr": "*i32", "offset_ptr": "*i32"} if gathered else {}
    return testing.compile_for(
        triton_kernels.input_gradient_kernel, signature, values, target, blocks.num_warps, blocks.num_stages
    )


def compile_expert_gradient(target, dtype, precision):
    from cl_kernels.moe_adapter import triton_kernels, triton_launch

    values = triton_launch.expert_blocks(DTYPES[dtype], SHAPE["width"], SHAPE["rank"])
    launch = {name: values.pop(name) for name in ("num_warps", "num_stages")}
    weights = ("grad_down_weight", "grad_down_bias", "grad_up_weight", "grad_up_bias")
    signature = {f"{name}_ptr": f"*{dtype}" for name in ("grad", "x", "hidden", "grad_pre", *weights)}
    signature |= {"gates_ptr": "*fp32", "order_ptr": "*i32", "offset_ptr": "*i32", "scale": "fp32"}
    signature |= SIZES | strides("grad", "x")
    values |= {"D": SHAPE["width"], "R": SHAPE["rank"], "K": SHAPE["slots"], "PRECISION": precision}
    return testing.compile_for(triton_kernels.expert_gradient_kernel, signature, values, target, **launch)


@pytest.mark.parametrize("target", testing.TARGETS)
@pytest.mark.parametrize("gathered", [False, True], ids=["samples", "tokens"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("compile_kernel", [compile_forward, compile_input_gradient])
def test_row_kernels_fit(compile_kernel, dtype, gathered, target):
    info = compile_kernel(target, dtype, gathered, "ieee")
    testing.assert_fits(info)
    if dtype == "bf16":
        products = {"sm_80": "HMMA", "sm_90": "HGMMA", "gfx942": "v_mfma"}
        assert info.count(products.get(target, "")) > 0


@pytest.mark.parametrize("target", testing.TARGETS)
@pytest.mark.parametrize("compile_kernel", [compile_forward, compile_input_gradient])
def test_several_launches_fit(compile_kernel, target):
    testing.assert_fits(compile_kernel(target, "bf16", False, "ieee", WIDE))


@pytest.mark.parametrize("target", testing.TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_expert_gradient_fits(dtype, target):
    testing.assert_fits(compile_expert_gradient(target, dtype, "ieee"))


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_tf32_fits(target):
    for compile_kernel in (compile_forward, compile_input_gradient):
        testing.assert_fits(compile_kernel(target, "fp32", False, "tf32"))
    testing.assert_fits(compile_expert_gradient(target, "fp32", "tf32"))


@pytest.mark.parametrize("target", testing.TARGETS)
def test_routing_fits(target):
    from cl_kernels.moe_adapter import triton_routing

    common = {"ids_ptr": "*i64", "count_ptr": "*i32", "B": "i32", "E": "i32", "blocks": "i32"}
    values = {"K": 2, "EP": EXPERTS_PADDED, "BLOCK": 128}
    testing.assert_fits(testing.compile_for(triton_routing.count_kernel, common, values, target))
    signature = common | {"order_ptr": "*i32", "offset_ptr": "*i32"}
    testing.assert_fits(
        testing.compile_for(triton_routing.order_kernel, signature, values | {"BLOCK_COUNTS": 64}, target)
    )
