"""The compiled top-k gating."""

from __future__ import annotations

import os
import sys

import gating_cases as cases
import pytest
import torch

import cl_kernels as clk

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("shape", cases.SHAPES, ids=str)
def test_equals_the_definition(shape, noisy, dtype):
    cases.check_against_float64("cpu", shape, noisy, dtype)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa, forked_torch, tmp_path):
    """Each in its own process, because the choice is made once. Where the machine lacks one, the next lower runs."""
    code = (
        "import torch; import gating_cases as cases\n"
        "for shape in cases.SHAPES:\n"
        "    cases.check_against_float64('cpu', shape, True, torch.float32)\n"
        "    cases.check_against_float64('cpu', shape, True, torch.float64)\n"
        "cases.check_ties_and_extremes('cpu')"
    )
    (tmp_path / "program.py").write_text(code)
    done = forked_torch.run(
        tmp_path / "program.py", environment={"CL_KERNELS_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    assert done.returncode == 0, done.stderr


def test_threads_do_not_change_a_bit():
    x, w_gate, w_noise, noise = cases.inputs(301, 256, 22)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(clk.top_k_gating(x, w_gate, w_noise, k=2, noise=noise, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    alone = clk.top_k_gating(x[7:8], w_gate, w_noise, k=2, noise=noise[7:8], backend="cpu")
    assert torch.equal(alone[0][0], results[0][0][7])  # nor do the other rows of the batch


def test_ties_and_extremes():
    cases.check_ties_and_extremes("cpu")


def test_views():
    cases.check_views("cpu")


@pytest.mark.parametrize("noisy", [False, True])
def test_gradients(noisy):
    cases.check_gradients("cpu", noisy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradients_equal_autograd(dtype):
    cases.check_gradients_equal_autograd("cpu", dtype)


def test_opcheck():
    cases.check_opcheck("cpu")


@pytest.mark.parametrize("backend", ["cpu", None])
def test_compiles_without_a_break(backend):
    cases.check_compile(backend)


def test_autocast():
    cases.check_autocast("cpu")


def test_operator_refuses_what_does_not_fit():
    cases.check_errors("cpu")
