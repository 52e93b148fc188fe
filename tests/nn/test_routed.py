"""Router and adapters as one node of the graph: the values of the two calls, without a tensor of zeros as large as x."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import cl_kernels as clk
from cl_kernels.profile import OperationCount
from cl_kernels.routed import routed_adapter

WEIGHTS = ("down_weight", "down_bias", "up_weight", "up_bias")
BACKENDS = [pytest.param("cpu", marks=pytest.mark.native), "reference"]


def tensors(dtype: torch.dtype = torch.float32, residual: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).mul(0.5).to(dtype)

    batch, length, width, rank, experts = 6, 9, 24, 8, 5
    made = {
        "x": normal(batch, length, width),
        "w_gate": normal(width, experts),
        "w_noise": normal(width, experts),
        "down_weight": normal(experts, rank, width),
        "down_bias": normal(experts, rank),
        "up_weight": normal(experts, width, rank),
        "up_bias": normal(experts, width),
    }
    return made | ({"residual": normal(batch, length, width)} if residual else {})


def two_calls(
    x, w_gate, w_noise=None, *, k, noise=None, scale=1.0, dropout_p=0.0, residual=None, backend=None, **weights
):
    gates, ids, usage = clk.top_k_gating(x[:, 0], w_gate, w_noise, k=k, noise=noise, backend=backend)
    options = {"scale": scale, "dropout_p": dropout_p, "residual": residual, "backend": backend}
    return clk.moe_adapter(x, ids, gates, **weights, **options), usage


def results(function, given: dict[str, Tensor], needs: set[str], **options) -> dict[str, Tensor]:
    leaves = {name: t.detach().clone().requires_grad_(name in needs) for name, t in given.items()}
    torch.manual_seed(3)
    out, usage = function(**leaves, k=2, scale=0.3, **options)
    found = {"out": out.detach(), "usage": usage}
    if out.requires_grad:
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out))
    return found | {f"grad of {name}": t.grad for name, t in leaves.items() if t.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("noisy", [False, True])
def test_same_bits_as_the_two_calls(noisy, dtype, backend):
    given = tensors(dtype, residual=not noisy)
    noise = torch.randn(6, 5, generator=torch.Generator().manual_seed(1)).to(dtype) if noisy else None
    options = {"noise": noise, "dropout_p": 0.2, "backend": backend}
    assert_same(results(routed_adapter, given, set(given), **options), results(two_calls, given, set(given), **options))


@pytest.mark.interpreter
@pytest.mark.parametrize("noisy", [False, True])
def test_same_bits_as_the_two_calls_in_triton(noisy):
    given, noise = tensors(), torch.randn(6, 5, generator=torch.Generator().manual_seed(1)) if noisy else None
    options = {"noise": noise, "dropout_p": 0.2, "backend": "triton"}
    assert_same(results(routed_adapter, given, set(given), **options), results(two_calls, given, set(given), **options))


@pytest.mark.parametrize(
    "needs", [(), ("x",), ("w_gate",), ("x", "up_bias"), ("residual",), ("x", "residual", "w_noise")]
)
def test_only_needed_gradients(needs):
    given, noise = tensors(), torch.ones(6, 5)
    found = results(routed_adapter, given, set(needs), noise=noise)
    assert {name for name in found if name.startswith("grad")} == {f"grad of {name}" for name in needs}
    assert_same(found, results(two_calls, given, set(needs), noise=noise))


def test_x_as_its_own_residual():
    def own(function):
        return lambda x, **rest: function(x=x, residual=x, **rest)

    given = tensors(residual=False)
    found, expected = (results(own(f), given, set(given)) for f in (routed_adapter, two_calls))
    torch.testing.assert_close(found, expected)  # the three gradients of x are added in another order


@pytest.mark.native
def test_no_tensor_of_zeros_as_large_as_x():
    leaves = {name: t.requires_grad_() for name, t in tensors().items()}
    out, _ = routed_adapter(**leaves, k=2)
    with OperationCount() as count:
        out.backward(torch.ones_like(out))
    assert count.by_name["cl_kernels::moe_adapter_backward"] == 1
    assert {"aten::select_backward", "aten::zeros"}.isdisjoint(count.by_name), count.by_name


def test_autocast_runs_the_two_calls():
    given = tensors()
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (results(f, given, set(given)) for f in (routed_adapter, two_calls))
    assert_same(found, expected)


@pytest.mark.native
@pytest.mark.parametrize("retain", [False, True])
def test_a_second_pass_through_the_graph(retain):
    given = tensors()
    x = given["x"].requires_grad_()
    out, _ = routed_adapter(**given, k=2)
    (first,) = torch.autograd.grad(out.sum(), x, retain_graph=retain)
    if retain:
        assert torch.equal(torch.autograd.grad(out.sum(), x)[0], first)
    else:
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(out.sum(), x)


@pytest.mark.native
def test_differentiating_twice_raises():
    given = tensors()
    x = given["x"].requires_grad_()
    out, _ = routed_adapter(**given, k=2)
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        grad.sum().backward()


@pytest.mark.native
def test_compiles_without_a_break():
    given = tensors()
    expected = results(routed_adapter, given, set(given))
    compiled = torch.compile(routed_adapter, backend="aot_eager", fullgraph=True)
    for name, tensor in results(compiled, given, set(given)).items():
        torch.testing.assert_close(tensor, expected[name])


@pytest.mark.parametrize("shape", [(6, 24), (6, 0, 24)])
def test_refuses_what_has_no_token_zero(shape):
    given = tensors(residual=False) | {"x": torch.zeros(shape)}
    with pytest.raises(ValueError, match=r"x: got .*, expected \(B, L, D\)"):
        routed_adapter(**given, k=2)


@pytest.mark.parametrize("name", ["w_gate", *WEIGHTS])
def test_errors_are_those_of_the_two_calls(name):
    given = tensors()
    given["x"].requires_grad_()
    given[name] = given[name][..., :-1]
    with pytest.raises(ValueError, match=name.split("_")[0]):
        routed_adapter(**given, k=2)
