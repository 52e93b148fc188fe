"""Host waits are found where a GPU would have them, and nowhere else."""

from __future__ import annotations

import pytest
import torch

from cl_kernels.profile import HostWaits


@pytest.fixture
def weights() -> torch.Tensor:
    return torch.randn(4, 3, requires_grad=True)


def test_reading_a_number_of_the_device_is_a_wait_and_one_of_the_host_is_not(weights: torch.Tensor) -> None:
    rows = torch.tensor([0, 2])
    with HostWaits([weights]) as waits:
        (weights.square().sum() * 2).backward()
        assert int(rows.max()) == 2
        assert bool((rows < 5).all())
    assert waits.waits == 0
    with HostWaits([weights]) as waits:
        float(weights.detach()[rows].sum())
    assert waits.by_name == {"aten::_local_scalar_dense": 1}


@pytest.mark.parametrize(
    ("name", "do"),
    [
        ("aten::nonzero", lambda w: w.nonzero()),
        ("aten::index", lambda w: w[w > 0]),
        ("aten::index_put_", lambda w: w.clone().index_put_((w > 0,), torch.zeros(()))),
        ("aten::masked_select", lambda w: w.masked_select(w > 0)),
        ("aten::_unique2", lambda w: w.unique()),
        ("aten::linalg_cholesky_ex", lambda w: torch.linalg.cholesky(w @ w.T + torch.eye(4))),
        ("aten::equal", lambda w: torch.equal(w, w + 1)),
    ],
)
def test_shapes_that_depend_on_numbers_and_factorisations_are_waits(name: str, do, weights: torch.Tensor) -> None:
    with HostWaits([weights]) as waits:
        do(weights.detach())
    assert waits.by_name.get(name) == 1


def test_views_and_results_in_place_stay_on_the_device_and_freed_storage_is_forgotten(weights: torch.Tensor) -> None:
    host = torch.zeros(4, 3)
    with HostWaits([weights]) as waits:
        moved = torch.zeros(3)
        moved.add_(weights.detach()[1])
        moved[0].item()
        for _ in range(100):
            (weights.detach() + 1).sum()
            assert host.sum().item() == 0
    assert waits.by_name == {"aten::_local_scalar_dense": 1}
