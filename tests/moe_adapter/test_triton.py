"""The Triton kernels in the interpreter, against the reference in float64. Needs TRITON_INTERPRET=1."""

from __future__ import annotations

import pytest
import torch
from adapter_cases import assert_matches_reference, assert_parts_drop_what_the_whole_does, make, outputs, relative_error
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import cl_kernels as clk
from cl_kernels import dispatch, library
from cl_kernels.moe_adapter import dropout

if dispatch.INTERPRETING:
    from cl_kernels.moe_adapter import triton_blocks, triton_launch, triton_routing

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("poison")]

SHAPES = [
    (2, 17, 33, 5, 4, 2),  # batch, length, width, rank, experts, k: two tiles of tokens, nothing a multiple of a block
    (2, 5, 70, 16, 22, 1),
    (2, 20, 40, 150, 3, 1),  # the bottleneck takes several launches
    (1, 70, 20, 40, 3, 3),
]
GATHERED = [
    (7, None, 40, 20, 3, 2),
    (3, 2, 20, 150, 2, 2),
    (70, None, 20, 8, 2, 1),
    (6, None, 1, 1, 8, 3),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", SHAPES + GATHERED)
def test_matches_reference(shape, dtype):
    assert_matches_reference(make(*shape, dtype=torch.float64).to(dtype), "triton", dropout_p=0.3)


@pytest.mark.parametrize("length", [9, 2])
def test_parts_drop_what_the_whole_does(length):
    assert_parts_drop_what_the_whole_does(make(5, length, 20, 6, 3, 2), "triton")


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


@pytest.mark.parametrize("rank", [1, 6, 20, 40])
@pytest.mark.parametrize("length", [3, 5])
def test_every_slot_and_group_of_four_draws_its_own_bits(rank, length):
    case = make(3, length, 8, rank, 4, 3)
    t = {name: tensor for name, tensor in case.tensors.items() if name != "residual"}
    t["down_bias"] = torch.full_like(t["down_bias"], 50.0)  # nothing but dropout makes a zero
    run = library.operator("moe_adapter", "triton")
    _, hidden = run(*t.values(), None, torch.tensor(5), 1.0, 0.5, True)
    row = torch.arange(3 * 3 * length).view(3, 3, length)
    assert torch.equal(hidden != 0, dropout.keep(torch.tensor(5), row, rank, 0.5))


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


@pytest.mark.parametrize(
    ("samples", "experts", "segment"), [(1, 1, 64), (5, 3, 64), (200, 9, 64), (129, 4, 1024), (20, 40, 32)]
)
def test_routing_is_a_stable_sort(samples, experts, segment, monkeypatch):
    monkeypatch.setattr(triton_routing, "SEGMENT", segment)
    monkeypatch.setattr(triton_routing, "block_of", lambda samples: 32)
    generator = torch.Generator().manual_seed(samples)
    ids = torch.randint(-1, experts + 2, (samples, 2), generator=generator)
    order, offset = triton_routing.route(ids, experts)
    bucket = torch.where((ids >= 0) & (ids < experts), ids, experts)
    for j in range(2):
        assert torch.equal(order[j].long(), bucket[:, j].argsort(stable=True))
        counts = bucket[:, j].bincount(minlength=experts + 1)
        assert torch.equal(offset[j].long(), torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]))


@pytest.mark.parametrize("pair", [[0, 1], [2, 2], [1, -1]])
@pytest.mark.parametrize("length", [40, None])
def test_one_pair_of_experts_is_split_into_chunks(length, pair, monkeypatch):
    monkeypatch.setattr(triton_launch, "chunk_rows", lambda rows, blocks, block_rows: 2 * block_rows)
    case = make(4 if length else 80, length, 24, 20, 3, 2)
    case.tensors["expert_ids"] = torch.tensor([pair]).repeat(len(case.tensors["x"]), 1)
    case.tensors["expert_ids"][3] = torch.tensor([0, 2])  # and experts of one chunk beside them
    assert_matches_reference(case, "triton", dropout_p=0.2)


@pytest.mark.parametrize("experts", [1, 3, 22, 256])
def test_chunks_stay_within_grid_and_memory(experts):
    generator = torch.Generator().manual_seed(experts)
    for rows, blocks in ((100, 1), (4000, 12), (25216, 6), (400_000, 6)):
        chunk = triton_blocks.chunk_rows(rows, blocks, 64)
        assert chunk % 64 == 0
        assert -(-rows // chunk) * blocks <= triton_blocks.PROGRAMS + blocks
        for concentration in (0.01, 1.0, 100.0):
            share = torch.rand(experts, generator=generator) ** (1 / concentration)
            counts = torch.multinomial(share + 1e-9, rows, replacement=True, generator=generator).bincount()
            chunks = (counts + chunk - 1) // chunk
            assert chunks.sum() <= -(-rows // chunk) + min(experts, rows)
            assert chunks[chunks > 1].sum() <= 2 * -(-rows // chunk)


class Counted:
    """A kernel that writes down its launches."""

    def __init__(self, kernel, name, launched):
        self.kernel, self.name, self.launched = kernel, name, launched

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.launched.append(self.name)
            with _disable_current_modes():  # the interpreter's own operations
                self.kernel[grid](*args, **kwargs)

        return launch


KERNELS = {
    "forward_kernel": "forward",
    "input_gradient_kernel": "input gradient",
    "expert_gradient_kernel": "expert gradient",
    "finish_kernel": "finish",
    "order_kernel": "route",
    "count_kernel": "count",
}
INPUTS = ("x", "expert_ids", "gates", "down_weight", "down_bias", "up_weight", "up_bias")


class Launching(TorchDispatchMode):
    """Writes down the torch operations that would launch a kernel on a GPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if not name.startswith(("empty", "new_empty")) and not func.is_view:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("length", "slots", "rank", "forward", "backward"),
    [
        (9, 2, 8, ["forward"], ["route", "input gradient", "expert gradient", "finish"]),
        (9, 3, 70, ["forward"], ["route", "input gradient", "expert gradient", "finish"]),
        (1, 2, 8, ["route"] + 2 * ["forward"], ["route", *2 * ["input gradient"], "expert gradient", "finish"]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_number_of_launches(length, slots, rank, forward, backward, dtype, monkeypatch):
    launched = []
    for module in (triton_launch, triton_routing):
        for name, short in KERNELS.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, Counted(getattr(module, name), short, launched))
    t = make(3, length, 20, rank, 4, slots).to(dtype).tensors
    with Launching() as launching:
        out, hidden = triton_launch.forward(
            *(t[name] for name in INPUTS), t["residual"], torch.tensor(3), 0.1, 0.25, True
        )
        assert launched == forward
        launched.clear()
        needed = [t[name] for name in INPUTS if name != "down_bias"]
        triton_launch.backward(torch.ones_like(out), *needed, hidden, 0.1, 0.25, True, True, True)
    assert launched == backward
    assert [name for name in launching.found if name not in ("ones_like", "fill_")] == []  # the test's own


@pytest.mark.parametrize("shape", [(60, None, 40, 8, 3, 5), (2, 40, 40, 70, 3, 4)])
def test_sums_in_half_precision_are_rounded_once(shape):
    case = make(*shape, dtype=torch.float64).to(torch.float16)
    case.scale = 1.0
    found, expected = outputs(case, "triton"), outputs(case.to(torch.float64), "reference")
    for name in ("out", "x"):
        once = relative_error(expected[name].half(), expected[name])
        assert relative_error(found[name], expected[name]) < 2.0 * once, name


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
