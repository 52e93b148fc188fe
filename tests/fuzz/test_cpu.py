"""Some hundred cases of the fuzzer for each operation, with fresh memory filled; `fuzz_cases.py` runs as many as asked for."""

from __future__ import annotations

from pathlib import Path

import fuzz_cases
import pytest
from random_tensors import Draw

PROGRAM = Path(__file__).with_name("fuzz_cases.py")


@pytest.mark.parametrize("operation", fuzz_cases.OPERATIONS)
def test_random_cases_are_right(operation, forked_torch):
    finished = forked_torch.run(PROGRAM, "--operation", operation, "--cases", 400, timeout=300)
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert f"{operation}: 400 cases right" in finished.stdout


@pytest.mark.parametrize("operation", [name for name in fuzz_cases.OPERATIONS if name != "average_"])
def test_the_fuzzer_sees_what_is_wrong(operation, monkeypatch):
    original = getattr(fuzz_cases.clk, operation)

    def wrong(*args, **options):
        found = original(*args, **options)
        if options["backend"] == "reference":
            return found
        return (found[0] * 1.2, *found[1:]) if isinstance(found, tuple) else found * 1.2

    monkeypatch.setattr(fuzz_cases.clk, operation, wrong)
    with pytest.raises(AssertionError, match="repeat with: python"):
        fuzz_cases.fuzz(operation, 0, 40, "cpu")


def test_a_case_follows_from_its_number():
    draws = [Draw("moe_adapter", 7) for _ in range(2)]
    assert draws[0].size(100) == draws[1].size(100)
    assert draws[0].normal((3, 2), fuzz_cases.torch.float32).equal(draws[1].normal((3, 2), fuzz_cases.torch.float32))
