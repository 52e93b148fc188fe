"""The distillation kernels compile for every target without a spill, in the configurations that the launchers use."""

from __future__ import annotations

import pytest

from cl_kernels import testing

pytestmark = pytest.mark.aot

DTYPES = ("bf16", "fp32")
TILES = ("forward_kernel", "gradient_kernel")
FEATURES = ("student_ptr", "teacher_ptr", "anchors_ptr", "teacher_anchors_ptr", "f_ptr", "g_ptr")
NUMBERS = {"scale", "masked", "row_factor", "column_factor", "outer", "dot_factor"}
ONE_OF_EACH = ("sm_80", "sm_90", "gfx942")
"""Products from registers, from shared memory, and those of AMD: for variants that need less than one tested everywhere."""


def compile_logits(name, target, dtype, M, inner, overwrite=False):
    import triton.language as tl

    from cl_kernels.distill_kl import triton_kernels

    config = triton_kernels.configuration(M, inner)
    warps = config.pop("num_warps")
    kernel = getattr(triton_kernels, name)
    constexprs = {**config, "COMPUTE": tl.float32}
    if "KL" in kernel.arg_names:
        constexprs["KL"] = True
    if "OVERWRITE" in kernel.arg_names:
        constexprs["OVERWRITE"] = overwrite
    unit = "student_inner" if inner > 1 else "student_step"
    constexprs |= {unit: 1, unit.replace("student", "teacher"): 1}
    if inner == 1:
        constexprs["inner"] = 1
    types = dict.fromkeys(("loss_ptr", "stats_ptr", "grad_ptr"), "*fp32")
    types |= dict.fromkeys(("student_ptr", "teacher_ptr", "out_ptr"), f"*{dtype}")
    types |= dict.fromkeys(("inverse_temperature", "factor"), "fp32")
    types |= dict.fromkeys(("M", "student_outer", "teacher_outer", "chunk"), "i32:16")
    signature = {a: types.get(a, "i32") for a in kernel.arg_names if a not in constexprs}
    return testing.compile_for(kernel, signature, constexprs, target, num_warps=warps)


def compile_features(name, target, dtype, config, plain=True, kl=False, transposed=False, precision="ieee"):
    """``plain``: as in ``triton_launch.tile_blocks``; else all that it excludes, and weights."""
    from cl_kernels.distill_kl import triton_forward, triton_gradient, triton_merge

    modules = {"forward_kernel": triton_forward, "merge_kernel": triton_merge}
    kernel = getattr(modules.get(name, triton_gradient), name)
    config = dict(config)
    warps, stages = config.pop("num_warps", 4), config.pop("num_stages", 3)
    config |= {"K": 1 if plain else 2, "ROWS": True, "COLUMNS": True, "SHARED": plain, "MASK_DIAGONAL": not plain}
    config |= {"KL": kl, "EVEN": plain, "EVEN_T": plain, "PRECISION": precision, "TRANSPOSED": transposed}
    config |= {"weight_ptr": None} if plain else {}
    constexprs = {k: v for k, v in config.items() if k in kernel.arg_names}
    stored = "fp32" if name == "product_kernel" and not transposed else dtype
    types = dict.fromkeys(FEATURES, f"*{dtype}") | dict.fromkeys(NUMBERS, "fp32")
    types |= {"finished_ptr": "*i32", "out_ptr": f"*{stored}"} | dict.fromkeys(
        ("width", "first", "group", "split"), "i32:16"
    )
    types |= dict.fromkeys(("D", "D_T"), "i32:16" if plain else "i32")
    signature = {
        a: types.get(a, "*fp32" if a.endswith("_ptr") else "i32") for a in kernel.arg_names if a not in constexprs
    }
    return testing.compile_for(kernel, signature, constexprs, target, num_warps=warps, num_stages=stages)


def compile_tiles(name, target, dtype="bf16", N=64, plain=True, large=True, **options):
    import torch

    from cl_kernels.distill_kl import triton_launch

    torch_dtype = torch.bfloat16 if dtype == "bf16" else torch.float32
    config = triton_launch.tile_blocks(torch_dtype, target, N, plain, large)
    return compile_features(name, target, dtype, config, plain, **options)


def compile_product(target, dtype, rows, transposed, precision="ieee"):
    import torch

    from cl_kernels.distill_kl import triton_launch

    torch_dtype = torch.bfloat16 if dtype == "bf16" else torch.float32
    config = triton_launch.product_blocks(torch_dtype, target, rows)
    return compile_features("product_kernel", target, dtype, config, transposed=transposed, precision=precision)


@pytest.mark.parametrize("target", testing.TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "inner"), [(100_000, 1), (64, 1000)])
@pytest.mark.parametrize("name", ["forward_kernel", "backward_kernel"])
def test_logits(name, M, inner, dtype, target):
    info = compile_logits(name, target, dtype, M, inner)
    testing.assert_fits(info)
    if target == "sm_90" and dtype == "fp32" and inner == 1:
        assert info.count("LDG.E.128") > 0


@pytest.mark.parametrize("target", testing.TARGETS)
def test_logits_that_are_overwritten(target):
    """No thread writes before all have read; the barrier costs no registers."""
    testing.assert_fits(compile_logits("backward_kernel", target, "fp32", 64, 1000, overwrite=True))


@pytest.mark.parametrize("target", testing.TARGETS)
@pytest.mark.parametrize("name", TILES)
def test_tiles(name, target):
    info = compile_tiles(name, target)
    testing.assert_fits(info)
    products = {"sm_80": "HMMA.16816", "sm_90": "HGMMA.64x128x16", "gfx942": "v_mfma"}
    if target in products:
        assert info.count(products[target]) > 0


@pytest.mark.parametrize("target", testing.TARGETS)
@pytest.mark.parametrize("name", TILES)
def test_tiles_in_fp32(name, target):
    """Exact fp32 products use no matrix unit of NVIDIA."""
    testing.assert_fits(compile_tiles(name, target, "fp32"))


@pytest.mark.parametrize("target", testing.TARGETS)
@pytest.mark.parametrize("name", TILES)
def test_tiles_in_general(name, target):
    """Two teachers with weights, their own anchors, widths that are no multiple of a block, the masked diagonal, the divergence."""
    testing.assert_fits(compile_tiles(name, target, plain=False, kl=True))


@pytest.mark.parametrize("target", ONE_OF_EACH)
@pytest.mark.parametrize("name", TILES)
def test_narrow_tiles(name, target):
    testing.assert_fits(compile_tiles(name, target, large=False))
    if name == "forward_kernel":  # which needs more registers
        testing.assert_fits(compile_tiles(name, target, N=16))


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("name", TILES)
def test_tiles_in_tf32(name, target):
    testing.assert_fits(compile_tiles(name, target, "fp32", precision="tf32"))


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("transposed", [False, True])
def test_products_in_tf32(transposed, target):
    testing.assert_fits(compile_product(target, "fp32", 64, transposed, precision="tf32"))


@pytest.mark.parametrize("target", testing.TARGETS)
@pytest.mark.parametrize(
    ("dtype", "rows", "transposed"),
    [("bf16", 64, False), ("bf16", 4096, False), ("bf16", 4096, True), ("fp32", 64, True)],
)
def test_products(dtype, rows, transposed, target):
    info = compile_product(target, dtype, rows, transposed)
    testing.assert_fits(info)
    if target == "sm_90" and dtype == "bf16":
        assert info.count("HGMMA.64x128x16" if rows == 64 else "HGMMA") > 0


@pytest.mark.parametrize("target", testing.TARGETS)
def test_merges(target):
    from cl_kernels.distill_kl import triton_launch

    testing.assert_fits(compile_features("merge_kernel", target, "bf16", triton_launch.MERGE, kl=True))
    testing.assert_fits(compile_features("finish_kernel", target, "bf16", triton_launch.FINISH))


def test_spills_are_seen():
    """Twice the rows and columns of the general variant: what the other tests assert can fail."""
    config = {"BLOCK_N": 128, "BLOCK_M": 128, "BLOCK_D": 32, "num_warps": 4, "num_stages": 2}
    info = compile_features("gradient_kernel", "sm_80", "bf16", config, plain=False)
    assert info.spills > 0
    with pytest.raises(AssertionError, match="spilled"):
        testing.assert_fits(info)
