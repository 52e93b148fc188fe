"""The compiled library needs nothing that ties it to one Python or one torch."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import cl_kernels
from cl_kernels import library

PACKAGE = Path(cl_kernels.__file__).parent
CUDA_SHIMS = {
    "aoti_torch_get_current_cuda_stream",
    "torch_c10_cuda_check_msg",
    "torch_c10_cuda_free_error_msg",
}
"""Symbols of libtorch_cuda. Weak, so that the library also loads where torch was built without CUDA."""

pytestmark = pytest.mark.native


def undefined_symbols() -> dict[str, str]:
    """{name without version: "U" or "w"} of _ops.so."""
    nm = shutil.which("nm")
    assert nm, "binutils' nm comes with every compiler that could have built the library"
    done = subprocess.run(
        [nm, "-D", "--undefined-only", PACKAGE / "_ops.so"], capture_output=True, text=True, check=True
    )
    found = dict(line.split()[::-1] for line in done.stdout.splitlines())
    return {name.partition("@")[0]: kind for name, kind in found.items()}


def test_is_loaded():
    assert library.load_error == ""
    assert (PACKAGE / "_ops.so").exists()


def test_no_mangled_torch_symbols():
    """C++ names of torch change between versions; the C shims do not."""
    symbols = undefined_symbols()
    mangled = [
        s for s in symbols if s.startswith("_Z") and re.search(r"\d(at|c10|torch|caffe2)[^a-z]|N(2at|3c10|5torch)", s)
    ]
    assert mangled == []
    assert any(s.startswith(("aoti_torch_", "torch_")) for s in symbols)  # so the search did see the symbols of torch


def test_no_python_symbols():
    assert [s for s in undefined_symbols() if s.startswith(("Py", "_Py"))] == []


def test_cuda_shims_are_weak():
    symbols = undefined_symbols()
    cuda = {s: kind for s, kind in symbols.items() if "cuda" in s.lower() and s != "aoti_torch_device_type_cuda"}
    assert set(cuda) <= CUDA_SHIMS
    assert set(cuda.values()) <= {"w"}
    if library.build_information()["cuda_architectures"]:
        assert set(cuda) == CUDA_SHIMS


def test_shims_are_old_enough():
    """torch 2.11 must have every C function that is called: those that came later are named here."""
    later = {"torch_exception_get_what_without_backtrace", "torch_from_blob_v2", "aoti_torch_get_current_stream"}
    assert later.isdisjoint(undefined_symbols())


def test_exports_nothing_but_registration():
    """Hidden visibility: names of ours cannot clash with another extension's."""
    nm = shutil.which("nm")
    done = subprocess.run([nm, "-D", "--defined-only", PACKAGE / "_ops.so"], capture_output=True, text=True, check=True)
    ours = [line.split()[-1] for line in done.stdout.splitlines() if "3clk" in line]
    assert ours == []


def test_build_information_is_complete():
    information = library.build_information()
    assert information["native"] is True
    assert information["reason"] == ""
    assert "baseline" in information["instruction_sets"]
    assert information["torch"]
    assert information["cuda_architectures"] or information["cuda_reason"]
