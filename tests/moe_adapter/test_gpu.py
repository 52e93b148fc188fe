"""The adapters on a GPU: values, no waiting for the device, CUDA graphs, number of launches."""

from __future__ import annotations

import pytest
import torch
from adapter_cases import assert_matches_reference, make, outputs, relative_error
from gpu_steps import capture, replayed, waiting_is_an_error
from torch import nn

import cl_kernels as clk
from cl_kernels import library
from cl_kernels.moe_adapter import dropout
from cl_kernels.nn import MoEAdapter

pytestmark = pytest.mark.gpu

PUBLISHED = (64, 197, 768, 64, 22, 2)  # batch, length, width, rank, experts, k
CASES = {
    "published": PUBLISHED,
    "few samples": (3, 50, 768, 64, 22, 2),
    "ragged": (5, 77, 100, 20, 4, 3),
    "wide bottleneck": (6, 130, 256, 200, 5, 2),
    "tokens": (3000, None, 512, 64, 22, 2),
    "many experts": (700, None, 128, 16, 256, 4),
    "short samples": (40, 3, 24, 5, 3, 3),
}


def on_gpu(case):
    case.tensors = {name: tensor.cuda() for name, tensor in case.tensors.items()}
    return case


@pytest.fixture
def exact_fp32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("exact_fp32")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", CASES.values(), ids=CASES.keys())
def test_matches_reference(shape, dtype):
    case = on_gpu(make(*shape, dtype=torch.float64).to(dtype))
    found, expected = (
        outputs(case, "triton", dropout_p=0.3),
        outputs(case.to(torch.float64), "reference", dropout_p=0.3),
    )
    tolerance = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    for name, tensor in expected.items():
        assert relative_error(found[name], tensor) <= tolerance, name


@pytest.mark.parametrize("shape", [PUBLISHED, CASES["tokens"]], ids=["samples", "tokens"])
def test_everybody_on_one_pair_of_experts(shape):
    case = on_gpu(make(*shape, dtype=torch.float64).to(torch.bfloat16))
    case.tensors["expert_ids"] = torch.tensor([[3, 7]], device="cuda").repeat(len(case.tensors["x"]), 1)
    assert_matches_reference(case, "triton", dropout_p=0.1)


def test_length_first_in_memory():
    case = on_gpu(make(*PUBLISHED, dtype=torch.float64).to(torch.bfloat16))
    expected = outputs(case, "triton", 0.1)
    for name in ("x", "residual"):
        case.tensors[name] = case.tensors[name].transpose(0, 1).contiguous().transpose(0, 1)
    found = outputs(case, "triton", 0.1)
    assert found["out"].stride() == case.tensors["x"].stride()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("shape", [PUBLISHED, CASES["tokens"]], ids=["samples", "tokens"])
def test_same_bits_every_time(shape):
    case = on_gpu(make(*shape, dtype=torch.float64).to(torch.bfloat16))
    first, second = outputs(case, "triton", 0.1), outputs(case, "triton", 0.1)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("seed_on", ["cpu", "cuda"])
def test_dropout_draws_the_bits_of_the_cpu(seed_on):
    batch, length, rank = 5, 70, 30
    weights = [
        w.cuda() for w in (torch.eye(rank)[None], torch.zeros(1, rank), torch.eye(rank)[None], torch.zeros(1, rank))
    ]
    ids, gates = torch.zeros(batch, 1, dtype=torch.int64, device="cuda"), torch.ones(batch, 1, device="cuda")
    x, seed = torch.ones(batch, length, rank, device="cuda"), torch.tensor(2**62 + 12345)
    run = library.operator("moe_adapter", "triton")
    out, _ = run(x, ids, gates, *weights, None, seed.to(seed_on), 1.0, 0.3, False)
    row = torch.arange(batch * length).view(batch, length)
    assert torch.equal(out.cpu() != 0, dropout.keep(seed, row, rank, 0.3))


def block(dtype=torch.bfloat16):
    torch.manual_seed(0)
    module = MoEAdapter(128, 6, bottleneck=32, dropout=0.5).cuda().to(dtype)
    nn.init.normal_(module.up_weight, std=0.1)
    nn.init.normal_(module.w_gate, std=0.1)
    x = torch.randn(16, 50, 128, device="cuda", dtype=dtype, requires_grad=True)
    return module, x, torch.randn_like(x).detach()


@pytest.mark.parametrize("length", [50, None], ids=["samples", "tokens"])
def test_nothing_waits_for_the_device(length):
    module, x, upstream = block()
    tokens = on_gpu(make(300, length, 128, 32, 6, 2).to(torch.bfloat16)).arguments(True)

    def step():
        module(x, x).backward(upstream)
        clk.moe_adapter(**tokens, dropout_p=0.1).sum().backward()

    step()  # compiles
    with waiting_is_an_error():
        step()


def test_replays_of_a_graph_drop_other_elements():
    batch, length, rank = 16, 64, 64
    weights = [
        w.cuda() for w in (torch.eye(rank)[None], torch.zeros(1, rank), torch.eye(rank)[None], torch.zeros(1, rank))
    ]
    ids, gates = torch.zeros(batch, 1, dtype=torch.int64, device="cuda"), torch.ones(batch, 1, device="cuda")
    x = torch.ones(batch, length, rank, device="cuda")
    graph, out = capture(lambda: clk.moe_adapter(x, ids, gates, *weights, dropout_p=0.25))
    (first,), (second,) = replayed(graph, [out]), replayed(graph, [out])
    for found in (first, second):
        assert abs((found != 0).float().mean().item() - 0.75) < 0.01
    agreement = ((first != 0) == (second != 0)).float().mean().item()
    assert abs(agreement - (0.75**2 + 0.25**2)) < 0.01  # independent


def test_graph_of_a_whole_block_equals_eager_without_randomness():
    module, x, upstream = block()
    module.eval()
    leaves = [x, *module.experts, module.w_gate]

    def step():
        return torch.autograd.grad(module(x, x), leaves, upstream)

    expected = [tensor.clone() for tensor in step()]
    graph, gradients = capture(step)
    for found, wanted in zip(replayed(graph, gradients), expected, strict=True):
        assert torch.equal(found, wanted)
    with torch.no_grad():
        x.mul_(-1.0)  # replays read what is there now
    for found, wanted in zip(replayed(graph, gradients), step(), strict=True):
        assert torch.equal(found, wanted)


def test_graph_of_a_whole_block_in_training_draws_anew():
    module, x, upstream = block()
    leaves = [x, *module.experts, module.w_gate, module.w_noise]
    graph, gradients = capture(lambda: torch.autograd.grad(module(x, x), leaves, upstream))
    first, second = replayed(graph, gradients), replayed(graph, gradients)
    for a, b in zip(first, second, strict=True):
        assert a.isfinite().all()
        assert not torch.equal(a, b)


@pytest.mark.parametrize(("length", "forward", "backward"), [(197, 2, 4), (None, 4, 5)], ids=["samples", "tokens"])
def test_number_of_launches(length, forward, backward):
    """Of the forward ones, one draws the seed of the mask."""
    case = on_gpu(make(64 if length else 2000, length, 768, 64, 22, 2).to(torch.bfloat16))
    arguments = case.arguments(True)
    upstream = torch.randn_like(arguments["x"]).detach()

    def launches(call):
        call()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            result = call()
            torch.cuda.synchronize()
        names = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        return result, [name for name in names if not name.startswith(("Memset", "Memcpy"))]

    out, names = launches(lambda: clk.moe_adapter(**arguments, dropout_p=0.1))
    assert len(names) == forward, names
    leaves = [tensor for name, tensor in arguments.items() if name not in ("expert_ids", "residual")]
    _, names = launches(lambda: torch.autograd.grad(out, leaves, upstream, retain_graph=True))
    assert len(names) == backward, names
