"""The compiled CPU path against the reference in float64."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from adapter_cases import assert_matches_reference, assert_parts_drop_what_the_whole_does, make, outputs

import cl_kernels as clk
from cl_kernels import library
from cl_kernels.moe_adapter import dropout

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Memory that the compiled code asks torch for comes full of NaN (and of the largest integers)."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


SHAPES = [
    (3, 17, 33, 5, 4, 2),  # batch, length, width, rank, experts, k: nothing is a multiple of a vector
    (2, 50, 96, 16, 3, 2),
    (2, 25, 300, 70, 22, 1),
    (9, None, 40, 20, 3, 2),
    (60, None, 31, 9, 2, 3),
    (5, 2, 64, 33, 3, 3),
    (1, 1, 1, 1, 1, 1),
    (2, 230, 64, 64, 3, 2),  # several chunks of a sample, weights and rows used where they lie
    (9, 21, 64, 13, 2, 1),  # chunks that span samples
    (300, None, 40, 20, 2, 2),  # tokens grouped by both experts at once
    (14, 210, 768, 8, 3, 2),  # several pieces of the batch in every dtype
    (1500, None, 768, 8, 2, 2),  # the same of tokens in their own order
    (1500, None, 768, 8, 3, 2),  # grouped by both experts at once
    (1500, None, 768, 8, 40, 2),  # slot by slot
]


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(shape, dtype, dropout_p):
    assert_matches_reference(make(*shape, dtype=torch.float64).to(dtype), "cpu", dropout_p)


@pytest.mark.parametrize("shape", [(3, 9, 20, 6, 4, 2), (8, None, 20, 6, 4, 2)])
def test_without_residual(shape):
    assert_matches_reference(make(*shape, residual=False), "cpu")


@pytest.mark.parametrize("length", [9, 3, None])
def test_ids_out_of_range_contribute_nothing(length):
    case = make(5, length, 20, 6, 3, 2)
    case.tensors["expert_ids"] = torch.tensor([[0, -1], [3, 2], [99, -5], [2**62, 1], [-(2**62), -1]])
    assert_matches_reference(case, "cpu")
    found = outputs(case, "cpu")
    assert found["gates"][2].tolist() == [0.0, 0.0]
    torch.testing.assert_close(found["out"][2], case.tensors["residual"][2])


@pytest.mark.parametrize("slots", [1, 2])
def test_tokens_with_ids_out_of_range_beside_many_others(slots):
    case = make(400, None, 20, 6, 2, slots)
    case.tensors["expert_ids"][::7, 0] = 2
    case.tensors["expert_ids"][3::11] = -1
    assert_matches_reference(case, "cpu")
    assert outputs(case, "cpu")["gates"][::7, 0].abs().max() == 0


def test_tokens_in_several_pieces_with_ids_out_of_range_and_rows_apart():
    case = make(3000, None, 768, 8, 2, 2)
    case.tensors["expert_ids"][::7, 0] = 2
    case.tensors["expert_ids"][3::11] = -1
    for name in ("x", "residual"):  # every second row of what lies twice as wide in memory
        case.tensors[name] = torch.stack((case.tensors[name], torch.zeros(3000, 768)), 1).reshape(6000, 768)[::2]
    assert_matches_reference(case, "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_do_not_depend_on_the_order_of_their_choices(dtype):
    """Bit by bit where tokens are grouped by all their experts; one of three does not exist."""
    case, other = (make(900, None, 40, 20, 3, 3, dtype=torch.float64).to(dtype) for _ in range(2))
    case.tensors["expert_ids"][::5, 1] = -1
    order = torch.rand(900, 3, generator=torch.Generator().manual_seed(1)).argsort(-1)
    for name in ("expert_ids", "gates"):
        other.tensors[name] = case.tensors[name].gather(1, order)
    assert_matches_reference(other, "cpu")
    # Where a token chose an expert twice, the one in the earlier slot is added first, and that may be the other one.
    once = torch.tensor([len(set(ids)) == 3 for ids in case.tensors["expert_ids"].tolist()])
    found, again = outputs(case, "cpu"), outputs(other, "cpu")
    assert once.sum() > 100
    for name in ("out", "x", "residual"):
        assert torch.equal(found[name][once], again[name][once]), name
    assert torch.equal(found["gates"].gather(1, order)[once], again["gates"][once])


@pytest.mark.parametrize("length", [9, None])
def test_unused_and_repeated_experts(length):
    case = make(6, length, 20, 6, 8, 2)
    case.tensors["expert_ids"] = torch.tensor([[1, 1]]).expand(6, 2)
    assert_matches_reference(case, "cpu")
    for name in ("down_weight", "down_bias", "up_weight", "up_bias"):
        gradient = outputs(case, "cpu")[name]
        assert [bool((gradient[e] != 0).any()) for e in range(8)] == [e == 1 for e in range(8)], name


def test_dropout_draws_the_bits_of_the_reference():
    # Identity-like experts make the output show the mask of every bottleneck element.
    batch, length, rank = 3, 7, 70
    eye = torch.eye(rank)
    x = torch.ones(batch, length, rank)
    ids, gates = torch.zeros(batch, 1, dtype=torch.int64), torch.ones(batch, 1)
    zeros = torch.zeros(1, rank)
    for seed in range(4):
        for p in (0.1, 0.5, 0.9):
            torch.manual_seed(seed)
            out = clk.moe_adapter(x, ids, gates, eye[None], zeros, eye[None], zeros, dropout_p=p, backend="cpu")
            torch.manual_seed(seed)
            row = torch.arange(batch * length).view(batch, length)
            assert torch.equal(out != 0, dropout.keep(dropout.draw_seed(), row, rank, p))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("length", [9, 2])
def test_parts_drop_what_the_whole_does(backend, length):
    assert_parts_drop_what_the_whole_does(make(5, length, 20, 6, 3, 2), backend)


VIEWS = {
    "length first": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "columns of a wider tensor": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    "strided columns": lambda t: torch.stack([t, t], -1)[..., 0],
    "every other sample": lambda t: torch.stack([t, t], 1).flatten(0, 1)[::2],
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("length", [6, 2])
def test_views(view, length):
    case = make(4, length, 20, 6, 3, 2)
    expected = outputs(case, "cpu")
    for name in ("x", "residual"):
        case.tensors[name] = VIEWS[view](case.tensors[name])
    case.tensors["up_weight"] = case.tensors["up_weight"].transpose(1, 2).contiguous().transpose(1, 2)
    case.tensors["expert_ids"] = case.tensors["expert_ids"].t().contiguous().t()
    found = outputs(case, "cpu")
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_output_keeps_the_memory_order_of_x():
    case = make(4, 6, 20, 6, 3, 2)
    case.tensors["x"] = VIEWS["length first"](case.tensors["x"])
    assert clk.moe_adapter(**case.tensors, backend="cpu").stride() == case.tensors["x"].stride()


def test_expanded_upstream_gradient():
    case = make(4, 6, 20, 6, 3, 2)
    arguments, expected = case.arguments(True), case.arguments(True)
    clk.moe_adapter(**arguments, backend="cpu").sum().backward()
    clk.moe_adapter(**expected, backend="reference").sum().backward()
    for name in arguments:
        if name != "expert_ids":
            torch.testing.assert_close(arguments[name].grad, expected[name].grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("batch", "length"), [(0, 5), (3, 0), (0, None)])
def test_empty_inputs(batch, length):
    case = make(batch, length, 20, 6, 3, 2)
    found = outputs(case, "cpu")
    assert found["out"].shape == case.tensors["x"].shape
    for name in ("down_weight", "up_bias", "gates"):
        assert torch.equal(found[name], torch.zeros_like(case.tensors[name]))


@pytest.mark.parametrize("length", [5, None])
def test_no_slots_pass_the_residual_on(length):
    case = make(3, length, 20, 6, 3, 0)
    assert torch.equal(clk.moe_adapter(**case.tensors, backend="cpu"), case.tensors["residual"])


@pytest.mark.parametrize("needs", [("x",), ("gates",), ("up_bias",), ("residual",), ("x", "down_weight")])
def test_only_needed_gradients(needs):
    case = make(3, 9, 20, 6, 4, 2)
    everything = outputs(case, "cpu")
    found = outputs(case, "cpu", needs=needs)
    assert found.keys() == {"out", *needs}
    for name, tensor in found.items():
        assert torch.equal(tensor, everything[name]), name


def test_extreme_values_stay_finite_and_nan_shows():
    case = make(3, 9, 20, 6, 4, 2)
    case.tensors["x"] = case.tensors["x"] * 1e18
    assert_matches_reference(case, "cpu")
    case.tensors["x"][1, 2, 3] = float("nan")
    out = clk.moe_adapter(**case.tensors, backend="cpu")
    assert out[1, 2].isnan().all()
    assert out.isnan().sum() == out.shape[-1]


@pytest.mark.parametrize(
    "shape",
    [(30, 13, 64, 24, 5, 2), (30, None, 64, 24, 5, 2), (14, 210, 768, 8, 3, 2), (1500, None, 768, 8, 3, 2)],
)
def test_same_bits_for_any_number_of_threads(shape):
    case = make(*shape)
    threads = torch.get_num_threads()
    try:
        found = []
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            found.append(outputs(case, "cpu", dropout_p=0.2))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        for name, tensor in found[0].items():
            assert torch.equal(tensor, other[name]), name


def test_gradcheck():
    case = make(3, 5, 6, 4, 3, 2, dtype=torch.float64)
    arguments = case.arguments(True)
    names = [name for name in arguments if name != "expert_ids"]

    def call(*tensors):
        torch.manual_seed(3)
        named = dict(zip(names, tensors, strict=True))
        return clk.moe_adapter(**named, expert_ids=case.tensors["expert_ids"], dropout_p=0.3, backend="cpu")

    assert torch.autograd.gradcheck(call, [arguments[name] for name in names])


def test_differentiating_twice_raises():
    arguments = make(2, 5, 6, 4, 3, 2).arguments(True)
    out = clk.moe_adapter(**arguments, backend="cpu")
    (grad,) = torch.autograd.grad(out.square().sum(), arguments["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        grad.sum().backward()


@pytest.mark.parametrize("length_first", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_opcheck(dropout_p, length_first):
    case = make(3, 5, 6, 4, 3, 2)
    if length_first:
        case.tensors["x"] = VIEWS["length first"](case.tensors["x"])
    t = case.arguments(True)
    weights = [t[name] for name in ("down_weight", "down_bias", "up_weight", "up_bias")]
    seed = torch.tensor(5) if dropout_p else None
    call = (t["x"], t["expert_ids"], t["gates"], *weights, t["residual"], seed, 0.1, dropout_p, True)
    torch.library.opcheck(library.operator("moe_adapter", "cpu"), call)
    out, hidden = library.operator("moe_adapter", "cpu")(*call)
    detached = [v.detach() for v in (t["x"], t["expert_ids"], t["gates"], weights[0], weights[2], weights[3])]
    for needs in ((True, True, True), (False, True, False)):
        arguments = (torch.randn_like(out), *detached, hidden, 0.1, dropout_p, *needs)
        torch.library.opcheck(library.operator("moe_adapter_backward", "cpu"), arguments)


@pytest.mark.parametrize("name", ["down_weight", "up_weight", "up_bias", "gates"])
def test_operator_rejects_sizes_that_do_not_fit(name):
    t = make(3, 5, 6, 4, 3, 2).tensors
    t[name] = t[name][..., :-1]
    weights = [t[n] for n in ("down_weight", "down_bias", "up_weight", "up_bias")]
    with pytest.raises(RuntimeError, match="moe_adapter"):
        library.operator("moe_adapter", "cpu")(
            t["x"], t["expert_ids"], t["gates"], *weights, None, None, 1.0, 0.0, False
        )


@pytest.mark.parametrize("instruction_set", ["baseline", "avx2"])
def test_other_instruction_sets(instruction_set, forked_torch, tmp_path):
    """The process picks its instruction set once: the comparison runs in one of its own."""
    code = (
        "import torch; from adapter_cases import assert_matches_reference as check, make\n"
        "for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):\n"
        "    for shape in ((3, 17, 33, 5, 4, 2), (60, None, 31, 9, 2, 3), (2, 25, 130, 40, 3, 1)):\n"
        "        check(make(*shape, dtype=torch.float64).to(dtype), 'cpu', 0.3)"
    )
    environment = {
        "CL_KERNELS_ISA": instruction_set,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    (tmp_path / "program.py").write_text(code)
    run = forked_torch.run(tmp_path / "program.py", environment=environment)
    assert run.returncode == 0, run.stderr
