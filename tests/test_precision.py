"""Products of float32 numbers: torch's older and newer switches are both heard, and neither makes the other an error."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from cl_kernels.precision import float32_products
from cl_methods.bench.agreement import full_precision
from cl_methods.components.teacher_features import _arithmetic

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    yield
    torch.set_float32_matmul_precision("highest")
    matmul.fp32_precision = before


def test_every_switch_is_heard() -> None:
    matmul = torch.backends.cuda.matmul
    assert float32_products(CUDA) == "ieee"
    torch.set_float32_matmul_precision("high")
    assert float32_products(CUDA) == "tf32"
    assert float32_products(CPU) == "ieee"
    matmul.allow_tf32 = False
    assert float32_products(CUDA) == "ieee"
    matmul.fp32_precision = "tf32"  # from here on torch refuses to answer the older questions
    with pytest.raises(RuntimeError):
        torch.get_float32_matmul_precision()
    assert float32_products(CUDA) == "tf32"


def test_the_newer_switch_stops_neither_caches_nor_comparisons() -> None:
    exact = _arithmetic(CPU)
    assert exact[-4:-2] == ["highest", "False"]
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert _arithmetic(CPU) != exact
    with full_precision():
        assert float32_products(CUDA) == "ieee"
        assert torch.backends.cudnn.conv.fp32_precision == "ieee"
    assert float32_products(CUDA) == "tf32"
