"""The averaging kernels compile for every target without a spill and read 16 bytes at a time."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from cl_kernels import testing

pytestmark = pytest.mark.aot
ROOT = Path(__file__).parents[2]
WIDE_LOADS = {"gfx942": "global_load_dwordx4"}


def compile_average(target, average, value, other=None, stochastic=False, aligned=True):
    import triton.language as tl

    from cl_kernels.weight_average import triton_kernels as kernels

    types = {"fp32": tl.float32, "fp64": tl.float64, "bf16": tl.bfloat16, "fp16": tl.float16}
    constexprs = {
        "DST": types[average],
        "SRC": types[value],
        "OTHER": types[other] if other else None,
        "STOCHASTIC": stochastic,
        "COMPUTE": tl.float64 if average == "fp64" else tl.float32,
        "ALIGNED": aligned,
        "BLOCK": kernels.block_of(stochastic),
    }
    signature = {"table_ptr": "*i64", "weight": "fp64", "other_weight": "fp64", "seed": "i64"}
    return testing.compile_for(kernels.average_kernel, signature, constexprs, target)


@pytest.mark.parametrize("target", testing.TARGETS)
@pytest.mark.parametrize(("average", "value"), [("fp32", "fp32"), ("fp32", "bf16"), ("bf16", "bf16"), ("fp64", "fp64")])
def test_no_spills_and_wide_loads(target, average, value):
    info = compile_average(target, average, value)
    testing.assert_fits(info)
    assert info.count(WIDE_LOADS.get(target, "LDG.E.128")) >= 4


@pytest.mark.parametrize("target", testing.TARGETS)
@pytest.mark.parametrize(
    ("average", "value", "other", "stochastic"),
    [
        ("fp32", "fp32", "fp32", False),
        ("bf16", "bf16", "bf16", False),
        ("bf16", "bf16", None, True),
        ("bf16", "fp32", None, True),
        ("bf16", "bf16", "bf16", True),
        ("fp16", "fp16", None, True),
    ],
)
def test_three_way_and_stochastic_spill_nothing_either(target, average, value, other, stochastic):
    info = compile_average(target, average, value, other, stochastic)
    testing.assert_fits(info)
    assert info.count(WIDE_LOADS.get(target, "LDG.E.128")) >= (3 if other else 2)


def test_unaligned_tensors_are_not_read_wide():
    info = compile_average("sm_90", "fp32", "fp32", aligned=False)
    testing.assert_fits(info)
    assert info.count("LDG.E.128") == info.count("STG.E.128") == 0


@pytest.mark.nvcc
def test_cuda_kernels_do_not_spill(tmp_path):
    """Every .cu file, for every architecture that the package ships, as ptxas reports it."""
    architectures = re.search(r"CUDA_ARCHITECTURES = \(([^)]*)\)", (ROOT / "setup.py").read_text())
    assert architectures
    numbers = re.findall(r"\d+", architectures[1])
    for source in sorted((ROOT / "csrc").rglob("*.cu")):
        log = ptxas_log(source, numbers, tmp_path)
        functions = re.findall(r"Compiling entry function '(\S+)' for 'sm_(\d+)'", log)
        spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
        assert {architecture for _, architecture in functions} == set(numbers), source
        assert len(spills) >= len(functions) > 0
        assert set(spills) == {("0", "0")}, source


def ptxas_log(source: Path, architectures: list[str], folder: Path) -> str:
    """The log of the build in this tree if it is newer than every source, else of a compilation now."""
    newest = max(path.stat().st_mtime for path in (ROOT / "csrc").rglob("*") if path.is_file())
    for log in sorted(ROOT.glob(f"build/*/cl_kernels/{source.relative_to(ROOT / 'csrc').with_suffix('.cu.o.log')}")):
        if log.stat().st_mtime > newest:
            return log.read_text()
    command = [
        shutil.which("nvcc"), "-O3", "-std=c++17", "-Xptxas", "-v", "--expt-relaxed-constexpr", "-DUSE_CUDA", "-DCLK_WITH_CUDA",
        "-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{ROOT / 'csrc'}", f"-I{Path(torch.__file__).parent / 'include'}",
        *(f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures), "-c", str(source), "-o", str(folder / "kernel.o"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr
