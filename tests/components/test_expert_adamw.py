"""The expert-wise AdamW against torch's AdamW with one parameter per expert."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cl_methods.components.expert_adamw import ExpertAdamW


@pytest.fixture(params=["rows", "masks"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row by row as on a CPU, or all rows with masks as where reading them would wait."""
    if request.param == "masks":
        monkeypatch.setattr("cl_methods.components.expert_adamw._readable", lambda value: False)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_equals_one_parameter_per_expert(weight_decay: float) -> None:
    torch.manual_seed(0)
    stacked, plain = nn.Parameter(torch.randn(4, 3, 5)), nn.Parameter(torch.randn(7))
    apart = [nn.Parameter(row.detach().clone()) for row in stacked]
    other = nn.Parameter(plain.detach().clone())
    mask = torch.zeros(4, dtype=torch.bool)
    ours = ExpertAdamW([stacked, plain], {stacked: mask}, lr=1e-2, weight_decay=weight_decay)
    theirs = torch.optim.AdamW([*apart, other], lr=1e-2, weight_decay=weight_decay)
    for step in range(20):
        mask.copy_(torch.rand(4) > 0.5)
        stacked.grad, plain.grad = torch.randn(4, 3, 5), torch.randn(7)
        other.grad = plain.grad.clone()
        for index, row in enumerate(apart):
            row.grad = stacked.grad[index].clone() if mask[index] else None
        before = stacked.detach().clone()
        for group in (*ours.param_groups, *theirs.param_groups):
            group["lr"] = 1e-2 / (step + 1)
        ours.step()
        theirs.step()
        assert torch.equal(before[~mask], stacked.detach()[~mask])
    torch.testing.assert_close(stacked.detach(), torch.stack([row.detach() for row in apart]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(plain, other, rtol=1e-5, atol=1e-6)


def test_state_survives_a_round_trip() -> None:
    torch.manual_seed(0)
    ends = []
    for resumed in (False, True):
        value = nn.Parameter(torch.ones(3, 2))
        mask = torch.tensor([True, False, True])
        optimizer = ExpertAdamW([value], {value: mask}, lr=0.1)
        for step in range(4):
            if resumed and step == 2:
                state = optimizer.state_dict()
                optimizer = ExpertAdamW([value], {value: mask}, lr=0.1)
                optimizer.load_state_dict(state)
            value.grad = torch.full((3, 2), float(step + 1))
            mask[1] = step > 0
            optimizer.step()
        ends.append(value.detach().clone())
    assert torch.equal(*ends)


def test_masks_are_checked() -> None:
    value = nn.Parameter(torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"masks: expected bool \(3,\)"):
        ExpertAdamW([value], {value: torch.ones(2, dtype=torch.bool)}, lr=0.1)
