"""What a task remembers of weights: taken where needed, saved and restored by name, shared only while nobody writes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cl_methods.components.averages import SnapshotMean
from cl_methods.components.task_weights import TaskWeights


def parameters() -> list[tuple[str, nn.Parameter]]:
    return [("a", nn.Parameter(torch.arange(6.0).view(2, 3))), ("b", nn.Parameter(torch.ones(4)))]


def begun(held: list[tuple[str, nn.Parameter]], **needed: bool) -> TaskWeights:
    weights = TaskWeights()
    weights.begin(held, **{"start": False, "mean": False, "pulled": False, "on_host": False, **needed})
    return weights


def move(held: list[tuple[str, nn.Parameter]], by: float) -> None:
    with torch.no_grad():
        for _, value in held:
            value += by


def test_the_mean_counts_the_start_once_with_and_without_a_copy_of_it() -> None:
    for start in (True, False):
        held = parameters()
        first = held[0][1].detach().clone()
        weights = begun(held, start=start, mean=True)
        assert bool(weights.averaged) is not start  # until a snapshot comes, the start is the mean
        for _ in range(2):
            move(held, 3.0)
            weights.take_snapshot(held, pull=0.0)
        torch.testing.assert_close(weights.averaged["a"], first + 3.0)


def test_a_mean_may_lie_elsewhere_than_its_start() -> None:
    """Beside the model, where the start is on the host."""
    start = {"a": torch.ones(3)}
    assert SnapshotMean(start, device=torch.device("meta")).tensors["a"].is_meta
    assert SnapshotMean(start, device=torch.device("cpu")).tensors["a"].data_ptr() != start["a"].data_ptr()


def test_a_pull_goes_to_what_was_before_the_last_one() -> None:
    held = parameters()
    weights = begun(held, pulled=True)
    move(held, 4.0)
    weights.pull_to_previous(held, 0.25)
    torch.testing.assert_close(held[1][1].detach(), torch.full((4,), 4.0))  # 5 a quarter of the way to 1
    weights.pull_to_previous(held, 0.5)
    torch.testing.assert_close(held[1][1].detach(), torch.full((4,), 4.5))  # and half of the way back to 5


def test_state_goes_on_where_it_was_and_refuses_other_names() -> None:
    held = parameters()
    weights = begun(held, start=True, mean=True, pulled=True)
    move(held, 1.0)
    weights.take_snapshot(held, pull=0.1)
    saved = {name: value.clone() for name, value in weights.state_dict().items()}
    other = begun(parameters(), start=True, mean=True, pulled=True)
    other.load_state_dict(saved)
    assert saved.keys() == other.state_dict().keys()
    for one in (weights, other):
        move(held, 0.0)
        one.take_snapshot(held, pull=0.1)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in weights.state_dict().items())
    with pytest.raises(RuntimeError, match="pulled weights do not fit"):
        begun(parameters(), start=True).load_state_dict(saved)


def test_restoring_writes_to_no_tensor_that_a_teacher_shares() -> None:
    held = parameters()
    teacher = {name: value.detach().clone() for name, value in held}
    weights = begun(held, start=True)
    weights.share_start(teacher, known_equal=False)
    assert weights.start["a"].data_ptr() == teacher["a"].data_ptr()
    weights.load_state_dict({f"start.{name}": value + 1 for name, value in teacher.items()})
    assert torch.equal(teacher["b"], torch.ones(4))
    assert torch.equal(weights.start["b"], torch.full((4,), 2.0))
