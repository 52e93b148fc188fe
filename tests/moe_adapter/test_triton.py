"""The Triton kernels in the interpreter, against the reference in float64. Needs TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch
from adapter_cases import assert_matches_reference, make, outputs

import cl_kernels as clk
from cl_kernels import library
from cl_kernels.moe_adapter import dropout

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poison")]

SHAPES = [
    (2, 17, 33, 5, 4, 2),  # batch, length, width, rank, experts, k: two tiles of tokens, nothing a multiple of a block
    (2, 5, 70, 16, 22, 1),
    (2, 20, 40, 150, 3, 1),  # the bottleneck takes several launches
    (1, 70, 20, 40, 3, 3),
]
GATHERED = [(7, None, 40, 20, 3, 2), (3, 2, 20, 150, 2, 2), (70, None, 20, 8, 2, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES + GATHERED)
def test_matches_reference(shape, dtype):
    assert_matches_reference(make(*shape, dtype=torch.float64).to(dtype), "triton", dropout_p=0.3)


@pytest.mark.parametrize("shape", [(2, 5, 20, 6, 4, 2), (4, None, 20, 6, 4, 2)])
def test_without_residual_and_dropout(shape):
    assert_matches_reference(make(*shape, residual=False), "triton")


@pytest.mark.parametrize("length", [5, None])
def test_ids_out_of_range_contribute_nothing(length):
    case = make(5, length, 20, 6, 3, 2)
    case.tensors["expert_ids"] = torch.tensor([[0, -1], [3, 2], [99, -5], [2**62, 1], [-(2**62), -1]])
    assert_matches_reference(case, "triton")
    assert outputs(case, "triton")["gates"][2].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("length", [5, None])
def test_unused_and_repeated_experts(length):
    case = make(4, length, 20, 6, 8, 2)
    case.tensors["expert_ids"] = torch.tensor([[1, 1]]).expand(4, 2)
    assert_matches_reference(case, "triton")
    gradients = outputs(case, "triton")
    for name in ("down_weight", "down_bias", "up_weight", "up_bias"):
        assert [bool((gradients[name][e] != 0).any()) for e in range(8)] == [e == 1 for e in range(8)], name


def test_dropout_draws_the_bits_of_the_reference():
    batch, length, rank = 2, 7, 6
    eye, zeros = torch.eye(rank)[None], torch.zeros(1, rank)
    ids, gates = torch.zeros(batch, 1, dtype=torch.int64), torch.ones(batch, 1)
    for p in (0.1, 0.6):
        torch.manual_seed(1)
        x = torch.ones(batch, length, rank)
        out = clk.moe_adapter(x, ids, gates, eye, zeros, eye, zeros, dropout_p=p, backend="triton")
        torch.manual_seed(1)
        row = torch.arange(batch * length).view(batch, length)
        assert torch.equal(out != 0, dropout.keep(dropout.draw_seed(), row, rank, p))


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**62 + 12345])
def test_every_seed_draws_the_bits_of_the_reference(seed):
    weights = [torch.eye(6)[None], torch.zeros(1, 6), torch.eye(6)[None], torch.zeros(1, 6)]
    ids, gates = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)
    run = library.operator("moe_adapter", "triton")
    out, _ = run(torch.ones(1, 7, 6), ids, gates, *weights, None, torch.tensor(seed), 1.0, 0.5, False)
    assert torch.equal(out != 0, dropout.keep(torch.tensor(seed), torch.arange(7)[None], 6, 0.5))


@pytest.mark.parametrize("length", [6, 2])
def test_views(length):
    case = make(3, length, 20, 6, 3, 2)
    expected = outputs(case, "triton")
    case.tensors["x"] = case.tensors["x"].transpose(0, 1).contiguous().transpose(0, 1)
    case.tensors["residual"] = torch.stack([case.tensors["residual"]] * 2, -1)[..., 0]
    case.tensors["up_weight"] = case.tensors["up_weight"].transpose(1, 2).contiguous().transpose(1, 2)
    case.tensors["gates"] = case.tensors["gates"].t().contiguous().t()
    found = outputs(case, "triton")
    assert found["out"].stride() == case.tensors["x"].stride()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(("batch", "length"), [(0, 5), (3, 0), (0, None)])
def test_empty_inputs(batch, length):
    case = make(batch, length, 20, 6, 3, 2)
    found = outputs(case, "triton")
    assert found["out"].shape == case.tensors["x"].shape
    assert torch.equal(found["down_weight"], torch.zeros_like(case.tensors["down_weight"]))


@pytest.mark.parametrize("needs", [("x",), ("gates",), ("up_bias",), ("residual",)])
def test_only_needed_gradients(needs):
    case = make(2, 5, 20, 6, 4, 2)
    everything = outputs(case, "triton")
    found = outputs(case, "triton", needs=needs)
    assert found.keys() == {"out", *needs}
    for name, tensor in found.items():
        assert torch.equal(tensor, everything[name]), name


def test_nan_shows_and_stays_in_its_row():
    case = make(2, 5, 20, 6, 4, 2)
    case.tensors["x"][1, 2, 3] = float("nan")
    out = clk.moe_adapter(**case.tensors, backend="triton")
    assert out[1, 2].isnan().all()
    assert out.isnan().sum() == out.shape[-1]


@pytest.mark.parametrize(("samples", "experts"), [(1, 1), (5, 3), (300, 22), (129, 4), (40, 200)])
def test_routing_is_a_stable_sort(samples, experts):
    from cl_kernels.moe_adapter.triton_routing import route

    generator = torch.Generator().manual_seed(samples)
    ids = torch.randint(-1, experts + 2, (samples, 2), generator=generator)
    order, offset = route(ids, experts)
    bucket = torch.where((ids >= 0) & (ids < experts), ids, experts)
    for j in range(2):
        assert torch.equal(order[j].long(), bucket[:, j].argsort(stable=True))
        counts = bucket[:, j].bincount(minlength=experts + 1)
        assert torch.equal(offset[j].long(), torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]))


def test_opcheck():
    t = make(2, 5, 20, 6, 3, 2).arguments(True)
    weights = [t[name] for name in ("down_weight", "down_bias", "up_weight", "up_bias")]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    call = (t["x"], t["expert_ids"], t["gates"], *weights, t["residual"], torch.tensor(5), 0.1, 0.25, True)
    torch.library.opcheck(library.operator("moe_adapter", "triton"), call, test_utils=tests)
    out, hidden = library.operator("moe_adapter", "triton")(*call)
    detached = [v.detach() for v in (t["x"], t["expert_ids"], t["gates"], weights[0], weights[2], weights[3])]
    arguments = (torch.randn_like(out), *detached, hidden, 0.1, 0.25, True, True, True)
    torch.library.opcheck(library.operator("moe_adapter_backward", "triton"), arguments, test_utils=tests)


def test_float64_runs_on_the_reference_and_says_so():
    case = make(2, 5, 20, 6, 3, 2, dtype=torch.float64)
    with clk.use_backend("triton"), pytest.warns(RuntimeWarning, match="float64"):
        found = clk.moe_adapter(**case.tensors)
    assert torch.equal(found, clk.moe_adapter(**case.tensors, backend="reference"))
    with pytest.raises(ValueError, match="float64"):
        clk.moe_adapter(**case.tensors, backend="triton")


def test_compiled_equals_eager():
    arguments, expected = make(2, 5, 12, 6, 3, 2).arguments(True), make(2, 5, 12, 6, 3, 2).arguments(True)

    def step(tensors):
        return clk.moe_adapter(**tensors, scale=0.1, dropout_p=0.3, backend="triton").square().sum()

    torch.manual_seed(2)
    step(expected).backward()
    torch.manual_seed(2)
    torch.compile(step, backend="aot_eager", fullgraph=True)(arguments).backward()
    for name in arguments:
        if name != "expert_ids":
            torch.testing.assert_close(arguments[name].grad, expected[name].grad, msg=name)
