"""The public call: argument errors, autocast, mixed dtypes, and torch.compile."""

from __future__ import annotations

import pytest
import torch
from adapter_cases import assert_matches_reference, make

import cl_kernels as clk
from cl_kernels import dispatch

BACKENDS = ["reference", *(["cpu"] if dispatch.backends()["moe_adapter"]["cpu"] == dispatch.AVAILABLE else [])]


def call(case, **changes):
    return clk.moe_adapter(**{**case.tensors, **changes})


@pytest.mark.parametrize(
    ("name", "value", "error", "sentences"),
    [
        ("x", torch.zeros(3), ValueError, ["x", "(3,)", "(B, L, D) or (N, D)"]),
        ("expert_ids", torch.zeros(2, 2, dtype=torch.int64), ValueError, ["expert_ids", "(2, 2)", "(3, 5, 6)"]),
        ("expert_ids", torch.zeros(3, 2), TypeError, ["expert_ids", "torch.float32", "int64"]),
        ("gates", torch.zeros(3, 1), ValueError, ["gates", "(3, 1)", "(3, 2)"]),
        ("gates", torch.zeros(3, 2, dtype=torch.int64), TypeError, ["gates", "torch.int64"]),
        ("down_weight", torch.zeros(3, 4, 7), ValueError, ["down_weight", "(3, 4, 7)", "(3, 5, 6)"]),
        ("down_weight", torch.zeros(4, 6), ValueError, ["down_weight", "(4, 6)", "(E, R, 6)"]),
        ("down_bias", torch.zeros(3, 5), ValueError, ["down_bias", "(3, 5)", "(3, 4, 6)"]),
        ("up_weight", torch.zeros(3, 4, 6), ValueError, ["up_weight", "(3, 4, 6)", "expected (3, 6, 4)"]),
        ("up_bias", torch.zeros(2, 6), ValueError, ["up_bias", "(2, 6)", "(3, 6)"]),
        ("up_bias", torch.zeros(3, 6, dtype=torch.float64), TypeError, ["up_bias", "torch.float64", "torch.float32"]),
        ("residual", torch.zeros(5, 3, 6), ValueError, ["residual", "(5, 3, 6)", "(3, 5, 6)"]),
        ("x", [1.0], TypeError, ["x", "list", "float32"]),
        ("x", torch.zeros(3, 5, 6, device="meta"), ValueError, ["expert_ids", "cpu", "meta"]),
        ("dropout_p", 1.0, ValueError, ["dropout_p", "1.0", "[0, 1)"]),
        ("dropout_p", -0.1, ValueError, ["dropout_p", "-0.1", "[0, 1)"]),
        ("backend", "fast", ValueError, ["backend", "fast", "reference"]),
        ("backend", "cuda", ValueError, ["cuda", "moe_adapter"]),
    ],
)
def test_errors_name_the_argument(name, value, error, sentences):
    with pytest.raises(error) as caught:
        call(make(3, 5, 6, 4, 3, 2), **{name: value})
    for part in sentences:
        assert part in str(caught.value)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [5, None])
def test_int32_ids_and_half_gates(backend, length):
    case = make(3, length, 6, 4, 3, 2)
    gates = case.tensors["gates"].to(torch.bfloat16)
    expected = call(case, gates=gates.float(), backend=backend)
    found = call(case, gates=gates, expert_ids=case.tensors["expert_ids"].int(), backend=backend)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_works_in_the_autocast_dtype(backend):
    case = make(3, 9, 20, 6, 3, 2, residual=False)
    half = case.to(torch.bfloat16)
    expected = call(half, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        found = call(case, backend=backend)
        again = call(half, backend=backend)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)
    assert torch.equal(again, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_leaves_gradients_in_the_dtype_of_the_leaves(backend):
    arguments = make(3, 9, 20, 6, 3, 2).arguments(True)
    with torch.autocast("cpu", torch.bfloat16):
        out = clk.moe_adapter(**arguments, backend=backend)
    assert out.dtype == torch.float32  # that of the residual
    out.square().sum().backward()
    for name, tensor in arguments.items():
        if name != "expert_ids":
            assert tensor.grad is not None, name
            assert tensor.grad.dtype == torch.float32, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_leaves_float64_alone(backend):
    case = make(3, 9, 20, 6, 3, 2, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        found = call(case, backend=backend)
    assert torch.equal(found, call(case, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.float64, torch.float16])
def test_residual_of_another_dtype_decides_the_dtype(backend, residual_dtype):
    case = make(3, 9, 20, 6, 3, 2).to(torch.bfloat16)
    residual = case.tensors["residual"].to(residual_dtype)
    found = call(case, residual=residual, backend=backend)
    assert found.dtype == residual_dtype
    alone = call(case, residual=None, backend=backend)
    torch.testing.assert_close(found, (residual + alone).to(residual_dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("length", "dropout_p"), [(5, 0.0), (None, 0.3)])
def test_compiled_equals_eager(backend, length, dropout_p):
    arguments = make(4, length, 12, 6, 3, 2).arguments(True)
    expected = make(4, length, 12, 6, 3, 2).arguments(True)

    def step(tensors):
        return clk.moe_adapter(**tensors, scale=0.1, dropout_p=dropout_p, backend=backend).square().sum()

    torch.manual_seed(2)
    step(expected).backward()
    torch.manual_seed(2)
    torch.compile(step, backend="aot_eager", fullgraph=backend != "reference")(arguments).backward()
    for name in arguments:
        if name != "expert_ids":
            torch.testing.assert_close(arguments[name].grad, expected[name].grad, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_grad_and_eval_agree_with_training(backend):
    arguments = make(4, 5, 12, 6, 3, 2).arguments(True)
    with torch.no_grad():
        alone = clk.moe_adapter(**arguments, backend=backend)
    assert not alone.requires_grad
    assert torch.equal(alone, clk.moe_adapter(**arguments, backend=backend))


def test_use_backend_decides():
    case = make(2, 5, 6, 4, 3, 2)
    for backend in BACKENDS:
        with clk.use_backend(backend):
            assert_matches_reference(case, backend)
            call(case)
