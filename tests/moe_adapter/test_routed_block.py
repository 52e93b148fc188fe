"""The adapted half of a residual block as one operation: values, gradients and bits against the operations that it joins."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cl_kernels import library, use_backend
from cl_kernels.profile import OperationCount
from cl_kernels.profile.flops import operation_flops
from cl_kernels.routed import routed_adapter
from cl_kernels.routed_block import FIELDS, routed_block, serves

pytestmark = pytest.mark.native

BATCH, WIDTH, RANK, EXPERTS, TOP = 8, 64, 8, 6, 2
NAMES = ("x", "residual", "w_gate", "w_noise")


def leaves(
    length: int = 37, dtype: torch.dtype = torch.float32, needs: set[str] | None = None
) -> dict[str, list[Tensor]]:
    """Tensors by name; x and residual lie (L, B, D) in memory, as in CLIP's blocks. No sample chooses expert 5."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).mul(0.5).to(dtype)

    made = {
        "x": [normal(length, BATCH, WIDTH).transpose(0, 1)],
        "residual": [normal(length, BATCH, WIDTH).transpose(0, 1)],
        "w_gate": [normal(WIDTH, EXPERTS)],
        "w_noise": [normal(WIDTH, EXPERTS)],
        "noise": [torch.cat([normal(BATCH, EXPERTS - 1), torch.full((BATCH, 1), -1e4, dtype=dtype)], 1)],
    }
    shapes = (RANK, WIDTH), (RANK,), (WIDTH, RANK), (WIDTH,)
    made["experts"] = [normal(*shapes[i % FIELDS]) for i in range(FIELDS * EXPERTS)]
    for name, tensors in made.items():
        for t in tensors:
            t.requires_grad_(name != "noise" and (needs is None or name in needs))
    return made


def fused(given: dict[str, list[Tensor]], dropout_p: float = 0.0) -> tuple[Tensor, Tensor]:
    tensors = [given[name][0] for name in (*NAMES, "noise")]
    return routed_block(*tensors, given["experts"], k=TOP, scale=0.3, dropout_p=dropout_p)


def routed(given: dict[str, list[Tensor]], dropout_p: float = 0.0) -> tuple[Tensor, Tensor]:
    """The same from stacks, by the function that the methods' blocks call."""
    x, residual, w_gate, w_noise, noise = (given[name][0] for name in (*NAMES, "noise"))
    options = {"scale": 0.3, "dropout_p": dropout_p, "residual": residual, "add_input": True}
    return routed_adapter(x, w_gate, w_noise, *given["experts"], k=TOP, noise=noise, **options)


def joined(given: dict[str, list[Tensor]], dropout_p: float = 0.0) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch, with experts stacked."""
    x, residual, w_gate, w_noise, noise = (given[name][0] for name in (*NAMES, "noise"))
    stacks = (torch.stack(given["experts"][i::FIELDS]) for i in range(FIELDS))
    options = {"scale": 0.3, "dropout_p": dropout_p, "residual": x + residual, "backend": "reference"}
    return routed_adapter(x, w_gate, w_noise, *stacks, k=TOP, noise=noise, **options)


def results(function, given: dict[str, list[Tensor]], **options: float) -> dict[str, Tensor]:
    torch.manual_seed(3)
    out, usage = function(given, **options)
    upstream = torch.randn(out.transpose(0, 1).shape, generator=torch.Generator().manual_seed(5)).to(out)
    out.backward(upstream.transpose(0, 1))
    grads = {f"{name} {i}": t.grad for name, tensors in given.items() for i, t in enumerate(tensors)}
    return {"out": out.detach(), "usage": usage} | {name: g for name, g in grads.items() if g is not None}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-5)])
@pytest.mark.parametrize("length", [1, 37])  # tokens gathered by expert; tiles of a sample's tokens
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_values_and_gradients(dtype, tolerance, length, dropout_p):
    found, expected = (results(f, leaves(length, dtype), dropout_p=dropout_p) for f in (fused, joined))
    assert found["usage"][-1] == 0
    assert found["usage"].sum() == BATCH * TOP
    unused = {f"experts {FIELDS * e + i}" for e in range(EXPERTS) for i in range(FIELDS) if not expected["usage"][e]}
    assert expected.keys() - found.keys() == unused, "experts that nobody chose get no gradient, all others do"
    for name, tensor in found.items():
        torch.testing.assert_close(
            tensor, expected[name], atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert length == 1 or found["out"].stride() == leaves(length)["x"][0].stride()


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_stacked_experts_have_the_bits_of_experts_apart(dropout_p):
    given, other = leaves(), leaves()
    stacks = [torch.stack([t.detach() for t in other["experts"][i::FIELDS]]).requires_grad_() for i in range(FIELDS)]
    other["experts"] = stacks
    with OperationCount() as count:
        found = results(routed, other, dropout_p=dropout_p)
    assert count.by_name["cl_kernels::routed_block"] == count.by_name["cl_kernels::routed_block_backward"] == 1
    expected = results(fused, given, dropout_p=dropout_p)
    for i in range(FIELDS):
        stack = found.pop(f"experts {i}")
        for e in range(EXPERTS):
            apart = expected.pop(f"experts {FIELDS * e + i}", torch.zeros_like(stack[e]))
            assert torch.equal(stack[e], apart), (i, e)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_calls_that_are_not_one_operation_add_x_all_the_same():
    """Clean gates, and a backend that has no such operation."""
    given = leaves(5)
    call = [given[name][0].detach() for name in ("x", "w_gate", "w_noise")]
    stacks = [torch.stack([t.detach() for t in given["experts"][i::FIELDS]]).requires_grad_() for i in range(FIELDS)]
    residual, noise = given["residual"][0].detach(), given["noise"][0]
    for options in ({"noise": None}, {"noise": noise, "backend": "reference"}):
        one, two = (
            routed_adapter(*call, *stacks, k=TOP, residual=base, add_input=add, **options)[0]
            for base, add in ((residual, True), (residual + call[0], False))
        )
        assert torch.equal(one, two)
    with pytest.raises(ValueError, match="residual: got None with add_input"):
        routed_adapter(*call, *stacks, k=TOP, noise=noise, add_input=True)
    with pytest.raises(ValueError, match="residual: got shape"):
        routed_adapter(*call, *stacks, k=TOP, noise=noise, residual=residual[:1], add_input=True)


@pytest.mark.parametrize("needs", [{"x"}, {"residual"}, {"w_gate"}, {"experts"}, {"x", "w_noise"}])
def test_only_needed_gradients(needs):
    found, expected = (results(f, leaves(5, needs=needs)) for f in (fused, joined))
    assert {name.split()[0] for name in found} == {"out", "usage", *needs}
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], atol=2e-5, rtol=2e-5)


def test_the_same_bits_however_tokens_lie_in_memory():
    """(L, B, D) as in CLIP's blocks, or (B, L, D)."""
    given, dense = leaves(), leaves()
    assert not given["x"][0].is_contiguous()
    for name in ("x", "residual"):
        dense[name] = [dense[name][0].detach().contiguous().requires_grad_()]
    found, expected = results(fused, given), results(fused, dense)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def test_frozen_experts_get_no_gradient():
    given = leaves(5)
    for t in given["experts"][:FIELDS]:
        t.requires_grad_(False)
    found = results(fused, given)
    assert found["usage"][0] > 0
    assert "experts 0" not in found
    assert any(name.startswith("experts") for name in found)


def test_one_operation_each_way():
    given, upstream = leaves(5), torch.ones(BATCH, 5, WIDTH)
    wanted = [t for tensors in given.values() for t in tensors if t.requires_grad]
    with OperationCount() as count:
        torch.autograd.grad(fused(given, 0.1)[0], wanted, upstream, allow_unused=True)
    assert count.by_name == {"aten::randint": 1, "cl_kernels::routed_block": 1, "cl_kernels::routed_block_backward": 1}
    with torch.no_grad(), OperationCount() as count:
        fused(given)
    assert count.by_name == {"cl_kernels::routed_block": 1}


def test_saves_what_the_backward_pass_reads_and_nothing_twice():
    given, saved = leaves(5), {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        fused(given)
    there = {t.data_ptr() for tensors in given.values() for t in tensors}
    new = sum(t.numel() * t.element_size() for pointer, t in saved.items() if pointer not in there)
    gates = BATCH * TOP * (4 + 8) + EXPERTS * 8
    assert new == BATCH * TOP * 5 * RANK * 4 + gates


def test_a_weight_that_changes_before_the_backward_pass_is_an_error():
    given = leaves(5)
    out, _ = fused(given)
    with torch.no_grad():
        given["experts"][0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_differentiating_twice_raises():
    given = leaves(5)
    (grad,) = torch.autograd.grad(fused(given)[0].square().sum(), given["x"][0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_what_it_serves():
    given = leaves(5)
    x, others = given["x"][0], [given["residual"][0], *given["experts"]]
    assert serves(x, others)
    assert not serves(x.bfloat16(), [t.bfloat16() for t in others])
    assert not serves(x, [*others[:-1], others[-1].double()])
    assert not serves(x.to("meta"), [t.to("meta") for t in others])
    stacks = [torch.stack(given["experts"][i::FIELDS]).to("meta") for i in range(FIELDS)]
    assert serves(x.to("meta"), [others[0].to("meta"), *stacks])
    with use_backend("reference"):
        assert not serves(x, others)
    with torch.autocast("cpu", torch.bfloat16):
        assert not serves(x, others)


@pytest.mark.parametrize(
    ("index", "replace", "message"),
    [
        (2, lambda t: t[:-1], "w_gate and w_noise"),
        (4, lambda t: t[:, :-1], "noise"),
        (1, lambda t: t[:, :-1], "residual"),
        (5, lambda t: [*t[:-1], t[-1][:-1]], "the same shape and dtype of every expert"),
        (7, lambda t: t[:-1], "down_weight"),
        (5, lambda t: [], "at least one expert"),
    ],
)
def test_the_operation_checks_what_it_gets(index, replace, message):
    given = leaves(5)
    fields = [given["experts"][i::FIELDS] for i in range(FIELDS)]
    call = [given[name][0] for name in (*NAMES, "noise")] + fields + [None, TOP, 1.0, 0.0, False]
    call[index] = replace(call[index])
    with torch.no_grad(), pytest.raises(RuntimeError, match=message):
        library.operator("routed_block", "cpu")(*call)


def test_shapes_without_computing_and_flops():
    given = leaves(5)
    fields = [[t.detach() for t in given["experts"][i::FIELDS]] for i in range(FIELDS)]
    tensors = [given[name][0].detach() for name in (*NAMES, "noise")]
    forward, backward = (library.operator(name, "cpu") for name in ("routed_block", "routed_block_backward"))

    def calls(t: list[Tensor], f: list[list[Tensor]]) -> tuple[list[Tensor], list[Tensor], int, int]:
        first = (*t, *f, None, TOP, 1.0, 0.0, True)
        out, usage, gates, ids, hidden = forward(*first)
        second = (t[1], t[0], *t[2:], gates, ids, f[0], f[2], f[3], hidden, 1.0, 0.0, True, True, True)
        counts = [operation_flops(op, args, {}, None) for op, args in ((forward, first), (backward, second))]
        return [out, usage, gates, ids, hidden], list(backward(*second)), *counts

    real = calls(tensors, fields)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake = calls([mode.from_tensor(t) for t in tensors], [[mode.from_tensor(t) for t in f] for f in fields])
    for a, b in zip(real[0] + real[1], fake[0] + fake[1], strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
    product, chosen = 2 * BATCH * 5 * TOP * WIDTH * RANK, 2 * BATCH * TOP * WIDTH
    assert real[2:] == (2 * product + 2 * 2 * BATCH * WIDTH * EXPERTS, 4 * product + 5 * chosen)
