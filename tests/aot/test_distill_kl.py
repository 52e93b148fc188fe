"""The distillation kernels compile for every target without a spill, in the configurations that the launchers use."""

from __future__ import annotations

import pytest

from cl_kernels import testing

pytestmark = pytest.mark.aot

DTYPES = ("bf16", "fp32")
FEATURES = ("student_ptr", "teacher_ptr", "anchors_ptr", "teacher_anchors_ptr")
FP32 = {"row_parts_ptr", "column_parts_ptr", "row_stats_ptr", "column_stats_ptr", "losses_ptr", "parts_ptr", "dots_ptr"}
NUMBERS = {"scale", "masked", "row_factor", "column_factor", "outer"}


def compile_logits(name, target, dtype, M, inner):
    import triton.language as tl

    from cl_kernels.distill_kl import triton_kernels

    config = triton_kernels.configuration(M, inner)
    warps = config.pop("num_warps")
    kernel = getattr(triton_kernels, name)
    constexprs = {**config, "COMPUTE": tl.float32}
    if "KL" in kernel.arg_names:
        constexprs["KL"] = True
    unit = "student_inner" if inner > 1 else "student_step"
    constexprs |= {unit: 1, unit.replace("student", "teacher"): 1}
    if inner == 1:
        constexprs["inner"] = 1
    types = dict.fromkeys(("loss_ptr", "stats_ptr", "grad_ptr"), "*fp32")
    types |= dict.fromkeys(("student_ptr", "teacher_ptr", "out_ptr"), f"*{dtype}")
    types |= dict.fromkeys(("inverse_temperature", "factor"), "fp32")
    types |= dict.fromkeys(("M", "student_outer", "teacher_outer"), "i32:16")
    signature = {a: types.get(a, "i32") for a in kernel.arg_names if a not in constexprs}
    return testing.compile_for(kernel, signature, constexprs, target, num_warps=warps)


def compile_features(name, target, dtype, plain=True):
    import torch

    from cl_kernels.distill_kl import triton_features, triton_launch

    torch_dtype = torch.bfloat16 if dtype == "bf16" else torch.float32
    amd = target.startswith("gfx")
    config = triton_launch.configuration(torch_dtype, 64, name.startswith("backward"), plain, amd)
    warps, stages = config.pop("num_warps"), config.pop("num_stages")
    if name.startswith("merge"):
        block = triton_launch.MERGE_BLOCK if name == "merge_kernel" else triton_launch.GRADIENT_BLOCK
        config, warps, stages = {"BLOCK": block}, 4, 3
    config |= {"K": 1 if plain else 2, "ROWS": True, "COLUMNS": True, "SHARED": plain, "MASK_DIAGONAL": not plain}
    config |= {"KL": True, "EVEN": plain, "EVEN_T": plain, "EVEN_OUT": plain, "PRECISION": "ieee"}
    kernel = getattr(triton_features, name)
    constexprs = {k: v for k, v in config.items() if k in kernel.arg_names}
    types = dict.fromkeys((*FEATURES, "out_ptr"), f"*{dtype}") | dict.fromkeys((*FP32, "weight_ptr"), "*fp32")
    types |= dict.fromkeys(("scale_ptr", "grad_ptr"), "*fp32") | dict.fromkeys(NUMBERS, "fp32")
    types |= dict.fromkeys(("D", "D_T"), "i32:16" if plain else "i32")
    signature = {a: types.get(a, "i32") for a in kernel.arg_names if a not in constexprs}
    return testing.compile_for(kernel, signature, constexprs, target, num_warps=warps, num_stages=stages)


@pytest.mark.parametrize("target", testing.TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "inner"), [(100_000, 1), (64, 1000)])
@pytest.mark.parametrize("name", ["forward_kernel", "backward_kernel"])
def test_logits(name, M, inner, dtype, target):
    testing.assert_fits(compile_logits(name, target, dtype, M, inner))


@pytest.mark.parametrize("target", testing.TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["forward_kernel", "backward_student_kernel", "backward_anchors_kernel"])
def test_features(name, dtype, target):
    testing.assert_fits(compile_features(name, target, dtype))


@pytest.mark.parametrize("target", [t for t in testing.TARGETS if t.startswith("sm_")])
@pytest.mark.parametrize("name", ["forward_kernel", "backward_student_kernel", "backward_anchors_kernel"])
def test_features_in_general(name, target):
    """Two teachers, their own anchors, widths that are no multiple of a block, and the masked diagonal.

    On gfx942 this variant moves up to 54 scalar registers, whose masks take two each, into vector registers.
    """
    testing.assert_fits(compile_features(name, target, "bf16", plain=False))


@pytest.mark.parametrize("target", testing.TARGETS)
@pytest.mark.parametrize("name", ["merge_kernel", "merge_student_kernel"])
def test_merges(name, target):
    testing.assert_fits(compile_features(name, target, "bf16"))


def test_instructions():
    """Matrix units are used: warp-group products on Hopper, MFMA on AMD; and logits are read 16 bytes at a time."""
    assert compile_features("forward_kernel", "sm_90", "bf16").count("HGMMA") > 0
    assert compile_features("backward_student_kernel", "sm_90", "bf16").count("HGMMA") > 0
    assert compile_features("forward_kernel", "gfx942", "bf16").count("v_mfma") > 0
    assert compile_logits("forward_kernel", "sm_90", "fp32", 100_000, 1).count("LDG.E.128") > 0
