"""Some cases of the fuzzer for the Triton kernels, in the interpreter."""

from __future__ import annotations

import fuzz_cases
import pytest

pytestmark = pytest.mark.interpreter


@pytest.mark.parametrize("operation", fuzz_cases.operations("triton"))
def test_random_cases_are_right(operation):
    fuzz_cases.fuzz(operation, 0, 12, "triton")
