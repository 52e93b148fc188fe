"""Some hundred cases of the fuzzer for each operation, with fresh memory filled; `fuzz_cases.py` runs as many as asked for."""

from __future__ import annotations

from pathlib import Path

import fuzz_cases
import fuzz_compiled
import pytest
from random_tensors import Draw

PROGRAM = Path(__file__).with_name("fuzz_cases.py")


@pytest.mark.parametrize("operation", fuzz_cases.OPERATIONS)
def test_random_cases_are_right(operation, forked_torch):
    finished = forked_torch.run(PROGRAM, "--operation", operation, "--cases", 400, timeout=300)
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert f"{operation}: 400 cases right" in finished.stdout


# The operation, and where the function under test is looked up.
SPOILT = [
    *((name, fuzz_cases.clk, name) for name in ("moe_adapter", "top_k_gating", "distill_kl", "feature_distill_kl")),
    ("routed_block", fuzz_compiled, "block"),
    ("squared_distance", fuzz_compiled, "distance"),
    ("consolidation", fuzz_compiled, "distance_value"),
]


@pytest.mark.parametrize(
    ("operation", "module", "name"), SPOILT, ids=lambda value: value if isinstance(value, str) else ""
)
def test_the_fuzzer_sees_what_is_wrong(operation, module, name, monkeypatch):
    original = getattr(module, name)

    def wrong(*args, **options):
        found = original(*args, **options)
        if options.get("backend") == "reference":
            return found
        return (found[0] * 1.2, *found[1:]) if isinstance(found, tuple) else found * 1.2

    monkeypatch.setattr(module, name, wrong)
    with pytest.raises(AssertionError, match="repeat with: python"):
        fuzz_cases.fuzz(operation, 0, 40, "cpu")


@pytest.mark.parametrize(
    ("operation", "name"), [("peaked_logits", "distill_kl"), ("peaked_features", "feature_distill_kl")]
)
def test_the_fuzzer_sees_a_loss_that_is_off_by_rounding_of_large_logits(operation, name, monkeypatch):
    original = getattr(fuzz_cases.clk, name)

    def rounded(*args, **options):
        found = original(*args, **options)
        return found if options["backend"] == "reference" else found + 60 * 2.0**-24  # of a logit of 60

    monkeypatch.setattr(fuzz_cases.clk, name, rounded)
    with pytest.raises(AssertionError, match="times as large as rounded logits explain"):
        fuzz_cases.fuzz(operation, 0, 60, "cpu")


def test_averages_of_three_models_that_are_wrong_are_seen(monkeypatch):
    original = fuzz_cases.clk.blend_

    def wrong(averages, values, others, weight, other_weight, **options):
        original(averages, values, others, weight, 1.2 * other_weight, **options)

    monkeypatch.setattr(fuzz_cases.clk, "blend_", wrong)
    with pytest.raises(AssertionError, match="repeat with: python"):
        fuzz_cases.fuzz("blend_", 0, 40, "cpu")


def test_a_case_follows_from_its_number():
    draws = [Draw("moe_adapter", 7) for _ in range(2)]
    assert draws[0].size(100) == draws[1].size(100)
    assert draws[0].normal((3, 2), fuzz_cases.torch.float32).equal(draws[1].normal((3, 2), fuzz_cases.torch.float32))
