"""The gate before every speed: what counts as the same loss and gradients."""

from __future__ import annotations

import pytest
import torch

from cl_methods.bench.agreement import CheckError, compare


def gradients(dtype: torch.dtype, small: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return torch.tensor(2.0, dtype=dtype), {
        "weight": torch.tensor([1.0, 0.0], dtype=dtype),
        "bias": torch.tensor([small], dtype=dtype),
    }


@pytest.mark.parametrize(
    ("dtype", "small", "error", "same"),
    [
        (torch.float32, 0.1, 0.9e-6, True),
        (torch.float32, 0.1, 1.2e-6, False),
        (torch.float32, 1e-4, 4.4e-9, True),  # 4.4e-5 of the bias, and a rounding of the whole
        (torch.float32, 1e-4, 2e-8, False),
        (torch.float64, 1e-4, 4.4e-9, False),
        (torch.float64, 1e-4, 0.9e-9, True),
        (torch.float32, 1e-4, float("nan"), False),
    ],
)
def test_a_tensor_may_differ_by_its_own_share_or_by_rounding(
    dtype: torch.dtype, small: float, error: float, same: bool
) -> None:
    wanted, found = gradients(dtype, small), gradients(dtype, small + error)
    if same:
        errors = compare("case", found, wanted)
        assert errors["loss"] == 0
        assert errors["gradient"] < 1e-6 < errors["gradients"] < 1e-5
    else:
        with pytest.raises(CheckError, match=r"case: gradients? differ by .*, expected at most 1e-05; no speed"):
            compare("case", found, wanted)


def test_many_small_errors_are_seen_in_the_whole() -> None:
    wanted = torch.ones(()), {str(index): torch.ones(1) for index in range(100)}
    found = torch.ones(()), {name: value + 1e-4 for name, value in wanted[1].items()}
    with pytest.raises(CheckError, match=r"gradient differ by 1\.0e-04"):
        compare("case", found, wanted)


def test_a_missing_gradient_is_named() -> None:
    loss, wanted = gradients(torch.float32, 1.0)
    with pytest.raises(CheckError, match="1 gradients exist on one side only, such as bias"):
        compare("case", (loss, {"weight": wanted["weight"]}), (loss, wanted))


@pytest.mark.parametrize(("own", "same"), [(1.9e-4, True), (2.1e-4, False), (float("nan"), False)])
def test_rounding_is_measured_against_float64(own: float, same: bool) -> None:
    """Two that are further apart than 1e-5, on both sides of what is true: ours may be off twice as far as the other."""
    truth, found, wanted = (gradients(torch.float64, 0.1), *(gradients(torch.float32, 0.1) for _ in range(2)))
    found[1]["bias"] *= 1 + own
    wanted[1]["bias"] *= 1 - 1e-4
    with pytest.raises(CheckError, match="expected at most 1e-05"):
        compare("case", found, wanted)
    if same:
        assert compare("case", found, wanted, lambda: truth)["gradients"] == pytest.approx(own, rel=0.01)
    else:
        with pytest.raises(CheckError, match=r"gradients? differ by .*, expected at most 2e-0"):
            compare("case", found, wanted, lambda: truth)
