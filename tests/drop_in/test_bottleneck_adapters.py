"""Bottleneck adapters of several codebases' forms, patched and unpatched."""

from __future__ import annotations

import copy

import pytest
import torch
from moe_structures import Expert
from torch import Tensor, nn

from cl_kernels import drop_in
from cl_kernels.profile import OperationCount

D, R = 12, 5


class Houlsby(nn.Module):
    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.adapter_down = nn.Sequential(nn.Linear(D, R), nn.ReLU(), nn.Dropout(p))
        self.adapter_up = nn.Linear(R, D)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.adapter_up(self.adapter_down(hidden))


class Parallel(nn.Module):
    """Added by the caller; its scale is learnt."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((1,), 0.3))
        self.fc1, self.act, self.fc2 = nn.Linear(D, R), nn.ReLU(), nn.Linear(R, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x))) * self.scale


class Scaled(Parallel):
    def __init__(self) -> None:
        super().__init__()
        self.scale = None
        self.scaling = 4.0

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.act(self.fc1(x))) * self.scaling


class TwoReLUs(Parallel):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


class WithMask(Parallel):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return super().forward(x) * mask


def model(adapter: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(D, D), adapter, nn.Linear(D, 3))
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return made


@pytest.mark.parametrize("adapter", [Houlsby, Parallel, Scaled, lambda: Expert(D, 0.0)])
@pytest.mark.parametrize("shape", [(4, 6, D), (7, D), (2, 3, 4, D)])
def test_outputs_gradients_and_ten_steps(adapter, shape):
    original = model(adapter())
    twin = copy.deepcopy(original)
    patch = drop_in.patch_adapters(twin)
    assert patch.replaced == ["1"]
    torch.manual_seed(1)
    x = torch.randn(shape)
    optimisers = [torch.optim.SGD(m.parameters(), lr=0.005, momentum=0.9) for m in (original, twin)]
    for step in range(10):
        results = []
        for m, optimiser in zip((original, twin), optimisers, strict=True):
            given = x.clone().requires_grad_()
            out = m(given)
            optimiser.zero_grad()
            (out - 1).square().mean().backward()
            results.append([out.detach(), given.grad, *(p.grad for p in m.parameters())])
            optimiser.step()
        for expected, found in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, atol=1e-6 if step == 0 else 1e-5, rtol=1e-5)
    for p, q in zip(original.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(q, p, atol=1e-5, rtol=0)
    assert list(twin.state_dict()) == list(original.state_dict())
    patch.undo()
    assert [type(m) for m in twin.modules()] == [type(m) for m in original.modules()]
    assert [set(vars(m)) for m in twin.modules()] == [set(vars(m)) for m in original.modules()]


def test_the_residual_of_the_caller():
    adapter = Expert(D, 0.0)
    x, other = torch.randn(2, 3, D), torch.randn(2, 3, D)
    expected = [adapter(x, add_residual=False), adapter(x)]
    drop_in.patch_adapters(nn.ModuleList([adapter]))
    for given, wanted in zip((adapter(x, add_residual=False), adapter(x)), expected, strict=True):
        torch.testing.assert_close(given, wanted)
    torch.testing.assert_close(adapter(x, residual=other), expected[0] + other)


def test_dropout():
    adapter = Houlsby(0.5)
    drop_in.patch_adapters(nn.ModuleList([adapter]))
    x = torch.randn(2, 3, D)
    outputs = torch.stack([adapter(x) for _ in range(300)])
    assert outputs.std(0).mean() > 0.01
    expected = adapter.eval()(x)
    assert torch.equal(adapter(x), expected)
    torch.testing.assert_close(outputs.mean(0), expected, atol=float(outputs.std(0).max()) / 3, rtol=0)


@pytest.mark.native
def test_operations():
    original = model(Expert(D, 0.1))
    x = torch.randn(4, 6, D)
    counts = []
    for patched in (False, True):
        if patched:
            drop_in.patch_adapters(original)
        original.zero_grad()
        with OperationCount() as count:
            original[1](x).sum().backward()
        counts.append(count.operations)
    assert counts[0] >= 1.5 * counts[1], counts


@pytest.mark.parametrize(
    ("adapter", "reason"),
    [
        (TwoReLUs, "computes something else"),
        (WithMask, "its forward takes x, mask, expected one tensor"),
        (lambda: nn.Sequential(nn.Linear(D, R), nn.ReLU(), nn.Linear(R, 2 * D)), "its layers map 12 -> 5 and 5 -> 24"),
        (lambda: nn.Sequential(nn.Linear(D, R, bias=False), nn.ReLU(), nn.Linear(R, D)), "plain nn.Linear with bias"),
        (lambda: nn.Sequential(nn.Linear(D, R), nn.GELU(), nn.Linear(R, D)), "expected modules of two nn.Linear"),
    ],
)
def test_what_is_not_of_this_form_is_left(adapter, reason):
    made = model(adapter())
    kinds = [type(m) for m in made.modules()]
    with pytest.raises(ValueError, match=reason):
        drop_in.patch_adapters(made)
    assert [type(m) for m in made.modules()] == kinds
    with pytest.raises(TypeError, match="model: got int"):
        drop_in.patch_adapters(3)


def test_plain_sequences_count_too():
    made = model(nn.Sequential(nn.Linear(D, R), nn.ReLU(), nn.Linear(R, D)))
    x = torch.randn(2, 3, D)
    expected = made(x)
    assert drop_in.patch_adapters(made).replaced == ["1"]
    torch.testing.assert_close(made(x), expected)
    with pytest.raises(ValueError, match="1: already patched"):
        drop_in.patch_adapters(made)
