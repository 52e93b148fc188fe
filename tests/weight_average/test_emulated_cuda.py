"""The CUDA kernel of weight averaging, its own source, run on the processor: every index and every bit, without a GPU.

Compiled by the host compiler with CUDA's headers and with tables of few entries, so that a list of tensors takes many launches.
"""

from __future__ import annotations

import itertools
import re
import subprocess
from pathlib import Path

import average_cases as cases
import pytest
import torch

import cl_kernels as clk
from cl_kernels.schemas import SCHEMAS

pytestmark = [pytest.mark.nvcc, pytest.mark.native]  # stochastic bits are compared with the compiled CPU kernel's

ROOT = Path(__file__).parents[2]
CHUNK, TENSORS, CHUNKS = 1 << 10, 5, 7
SIZES = {"kChunk": CHUNK, "kTensors": TENSORS, "kChunks": CHUNKS}
ALIGNED = "-fPIC,-fsanitize=alignment,-fsanitize-undefined-trap-on-error"  # a pack off its own grid ends the process
LAUNCH = r"kernel<<<chunks, kThreads, 0, static_cast<cudaStream_t>\(stream\)>>>\(table\)"
SHAPES = [*cases.SHAPES, (CHUNK - 1,), (CHUNK,), (CHUNK + 1,), ((CHUNKS + 2) * CHUNK + 3,), (2, 3, 5, 7), (9,), (1, 1)]


def emulated_source() -> str:
    """The kernel with its launch replaced, and its tables cut down to :data:`SIZES`."""
    text = (ROOT / "csrc" / "weight_average" / "cuda.cu").read_text()
    text, launches = re.subn(LAUNCH, "emulate(kernel, chunks, kThreads, table)", text)
    assert launches == 1, "the launch is written differently now"
    for name, size in SIZES.items():
        text, found = re.subn(rf"(constexpr \w+ {name}) = [^;]+;", rf"\1 = {size};", text)
        assert found == 1, f"{name} is written differently now"
    return text


@pytest.fixture(scope="module")
def average_(tmp_path_factory):
    """The operator, on CPU tensors."""
    folder, torch_folder = tmp_path_factory.mktemp("emulated"), Path(torch.__file__).parent
    (folder / "cuda.inc").write_text(emulated_source())
    library = folder / "emulated.so"
    command = [
        "nvcc",
        "-x",
        "c++",
        *["-std=c++17", "-O1", "-shared", "-cudart", "none", "-DUSE_CUDA", "-Xcompiler"],
        ALIGNED,
    ]
    command += ["-DTORCH_TARGET_VERSION=0x020a000000000000", f'-DEMULATED_SOURCE="{folder / "cuda.inc"}"']
    command += [f"-I{ROOT / 'csrc'}", "-isystem", f"{torch_folder / 'include'}", f"-L{torch_folder / 'lib'}"]
    command += [str(Path(__file__).with_name("emulated_cuda.cpp")), "-ltorch", "-ltorch_cpu", "-o", str(library)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    definitions = torch.library.Library("cl_kernels_emulated", "DEF")
    definitions.define("average_" + SCHEMAS["average_"])
    torch.ops.load_library(str(library))
    yield torch.ops.cl_kernels_emulated.average_.default
    definitions._destroy()


def check(averages, expected):
    """One rounding to the stored dtype, and those of the arithmetic."""
    for a, e in zip(averages, expected, strict=True):
        compute = a.dtype if a.dtype == torch.float64 else torch.float32
        tolerance = cases.EPSILON[a.dtype] + 8 * cases.EPSILON[compute]
        assert torch.all((a.double() - e).abs() <= tolerance * e.abs().clamp(min=1.0))


def other_lists(dtype):
    return cases.lists(dtype, torch.float32, SHAPES, seed=1)[0]


@pytest.mark.parametrize(("average_dtype", "value_dtype"), cases.PAIRS, ids=str)
def test_equals_the_formula_in_every_dtype(average_, average_dtype, value_dtype):
    for other_dtype in (None, *cases.DTYPES):
        averages, values = cases.lists(average_dtype, value_dtype, SHAPES)
        others = [] if other_dtype is None else other_lists(other_dtype)
        expected = [a.double() + 0.3 * (v.double() - a.double()) for a, v in zip(averages, values, strict=True)]
        for place, other in enumerate(others):
            expected[place] += 0.45 * (other.double() - averages[place].double())
        average_(averages, values, 0.3, others, 0.45, None)
        check(averages, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_stochastic_rounding_draws_the_bits_of_the_cpu(average_, dtype):
    generator = torch.Generator().manual_seed(4)
    starts, values, others = (
        [torch.randint(-64, 64, shape, generator=generator) / 64 for shape in SHAPES] for _ in range(3)
    )  # whose sums fp32 holds exactly: with and without fused multiply-add
    for value_dtype, three in itertools.product((torch.float32, dtype), (False, True)):
        sources = [value.to(value_dtype) for value in values], others if three else []
        averages, expected = [[start.to(dtype) for start in starts] for _ in range(2)]
        for target, run in zip((averages, expected), (average_, torch.ops.cl_kernels.average_), strict=True):
            run(target, sources[0], 0.25, sources[1], 2.0**-6 if three else 0.0, 7)
        assert all(torch.equal(a, e) for a, e in zip(averages, expected, strict=True))
        assert any(torch.any(a != s.to(dtype)) for a, s in zip(averages, starts, strict=True))
    special, stored = cases.between(dtype), [torch.zeros(3007, dtype=dtype) for _ in range(2)]
    for target, run in zip(stored, (average_, torch.ops.cl_kernels.average_), strict=True):
        run([target], [special], 1.0, [], 0.0, 11)
    assert torch.equal(stored[0].isnan(), stored[1].isnan())
    assert torch.equal(stored[0].nan_to_num(), stored[1].nan_to_num())


def test_tensors_off_the_grid_of_16_bytes_leave_their_neighbours(average_):
    for dtype, offset in itertools.product(cases.DTYPES, (1, 2, 3)):
        slab = torch.full((3 * CHUNK + 40,), 42.0, dtype=dtype)
        views = [slab[offset : 2 * CHUNK + 5], slab[2 * CHUNK + 5 + offset : -offset]]
        gaps = torch.ones(len(slab), dtype=torch.bool)
        for view in views:
            view.copy_(torch.randn(len(view)))
            gaps[view.storage_offset() : view.storage_offset() + len(view)] = False
        values, others = ([torch.randn(len(view) + 3)[3:] for view in views] for _ in range(2))
        for shift in (None, 0, 1):  # of the third model; without one, two are averaged
            third = [] if shift is None else [torch.cat([other[:shift], other])[shift:] for other in others]
            expected = cases.exact(views, values, 0.25)
            for place, other in enumerate(third):
                expected[place] += 0.5 * (other.double() - views[place].double())
            average_(views, values, 0.25, third, 0.5, None)
            check(views, expected)
        assert torch.all(slab[gaps] == 42)


def test_more_tensors_and_chunks_than_a_launch_takes(average_):
    sizes = [*range(4 * TENSORS + 1), 3 * CHUNKS * CHUNK + 1, 1, 2 * CHUNK]
    averages, values = cases.lists(torch.float32, torch.float32, [(size,) for size in sizes])
    expected = [a.clone() for a in averages]
    average_(averages, values, 0.4, [], 0.0, None)
    clk.average_(expected, values, 0.4, backend="reference")
    for a, e in zip(averages, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-6)
