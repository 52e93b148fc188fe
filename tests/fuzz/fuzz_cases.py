"""A fuzzer: every operation with random shapes, strides, dtypes and options against the reference in float64, gradients too.

    python tests/fuzz/fuzz_cases.py --cases 100000            all operations, CPU kernels
    python tests/fuzz/fuzz_cases.py --operation moe_adapter --first 4711 --cases 1

Fresh memory is filled with a pattern (MALLOC_PERTURB_ of glibc), so whoever reads before writing is seen. A case follows from
its operation and number alone. One in eight has a wrong argument, which must be refused by name.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from fuzz_compiled import blend_, consolidation, routed_block, squared_distance
from fuzz_peaked import peaked_features, peaked_logits
from random_tensors import DEVICE, DTYPES, Draw, assert_close
from torch import Tensor

import cl_kernels as clk

TRITON = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETED = (torch.float32, torch.float16)  # the interpreter multiplies the bits of bfloat16


def moe_adapter(draw: Draw, backend: str) -> None:
    """Sample and token routing, experts out of range, no experts, no tokens, dropout, residuals of other dtypes."""
    dtype = draw.dtype()
    batch, length, width, rank = draw.size(9), draw.size(40), draw.size(70, 1), draw.size(70, 1)
    experts, slots = draw.size(9, 1), draw.size(4)
    rows = (batch,) if draw.chance(0.4) else (batch, length)
    ids = (-1, experts + 1) if draw.chance(0.2) else (0, experts)
    tensors = {
        "x": draw.grid((*rows, width), dtype),
        "expert_ids": draw.integers(*ids, (batch, slots), draw.choice((torch.int64, torch.int64, torch.int32))),
        "gates": draw.grid((batch, slots), torch.float64 if dtype == torch.float64 else torch.float32, 0.125),
        "down_weight": draw.grid((experts, rank, width), dtype, 0.125, 4),
        "down_bias": draw.grid((experts, rank), dtype),
        "up_weight": draw.grid((experts, width, rank), dtype, 0.125, 4),
        "up_bias": draw.grid((experts, width), dtype),
    }
    if draw.chance(0.5):
        tensors["residual"] = draw.grid((*rows, width), dtype)
    options = {"scale": draw.choice((1.0, 0.1, -0.5)), "dropout_p": draw.choice((0.0, 0.0, 0.1, 0.5))}
    if _refuses(draw, clk.moe_adapter, tensors, options, backend):
        return
    upstream = draw.normal((*rows, width), dtype)
    seed = draw.random.getrandbits(30)

    def run(tensors: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return _gradients(clk.moe_adapter, tensors, {**options, "backend": backend}, upstream)

    # The bottleneck and the output are sums of width and rank products of at most 1.5 · 0.5; so are their gradients.
    size = 1.0 + (width * rank) ** 0.5
    _compare(run, tensors, backend, dtype, size)


def top_k_gating(draw: Draw, backend: str) -> None:
    """Clean and noisy gates, ties included; where two logits all but tie, either expert is right."""
    dtype = draw.dtype()
    batch, width, experts = draw.size(33), draw.size(70, 1), draw.size(70, 1)
    k = draw.random.randint(1, min(experts, 5))
    tensors = {"x": draw.grid((batch, width), dtype), "w_gate": draw.grid((width, experts), dtype, 0.125, 4)}
    if draw.chance(0.6):
        tensors["w_noise"] = draw.grid((width, experts), dtype, 0.125, 4)
        tensors["noise"] = draw.normal((batch, experts), dtype)
    if _refuses(draw, clk.top_k_gating, tensors, {"k": k}, backend):
        return
    leaves = {name: tensor.detach().to(DEVICE).requires_grad_(name != "noise") for name, tensor in tensors.items()}
    exact = {name: tensor.detach().double().requires_grad_(name != "noise") for name, tensor in tensors.items()}
    gates, ids, usage = clk.top_k_gating(**leaves, k=k, backend=backend)
    wanted, wanted_ids, _ = clk.top_k_gating(**exact, k=k, backend="reference")
    ids, accurate = ids.cpu(), torch.float64 if dtype == torch.float64 else torch.float32
    assert_close("gates", gates.cpu(), wanted, accurate, width)
    assert torch.equal(usage.cpu(), torch.bincount(ids.flatten(), minlength=experts)), "usage"
    if not torch.equal(ids, wanted_ids):
        logits = clk.gating.reference.logits(exact["x"], exact["w_gate"], exact.get("w_noise"), exact.get("noise"))
        assert_close("expert_ids: logits", logits.gather(1, ids), logits.gather(1, wanted_ids), accurate, width)
        return
    upstream = draw.normal((batch, k), torch.float64)
    inputs = [name for name in tensors if name != "noise"]
    found = torch.autograd.grad(gates, [leaves[n] for n in inputs], upstream.to(gates), materialize_grads=True)
    expected = torch.autograd.grad(wanted, [exact[n] for n in inputs], upstream, materialize_grads=True)
    for name, a, b in zip(inputs, found, expected, strict=True):
        assert_close(f"gradient of {name}", a.cpu(), b, dtype, 1.0 + batch + width)


def distill_kl(draw: Draw, backend: str) -> None:
    """Any number of dimensions, every softmax dimension, weights that broadcast, logits up to ten thousand."""
    dtype = draw.dtype()
    shape = tuple(draw.size(40, 1) for _ in range(draw.random.randint(1, 3)))
    dim = draw.random.randrange(-len(shape), len(shape))
    spread = draw.choice((0.1, 3.0, 30.0, 3000.0))
    tensors = {"student_logits": draw.normal(shape, dtype, spread), "teacher_logits": draw.normal(shape, dtype, spread)}
    left = shape[: dim % len(shape)] + shape[dim % len(shape) + 1 :]
    if draw.chance(0.3):
        tensors["sample_weight"] = draw.grid([n if draw.chance(0.7) else 1 for n in left], dtype)
    temperature = draw.choice((0.5, 1.0, 2.0, 1.7))
    options = {
        "dim": dim,
        "temperature": temperature,
        "target": draw.choice(("cross_entropy", "kl")),
        "reduction": draw.choice(("mean", "sum", "none")),
    }
    if _refuses(draw, clk.distill_kl, tensors, options, backend):
        return
    upstream = draw.normal(left if options["reduction"] == "none" else (), torch.float64)

    def run(tensors: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
        constant = {"teacher_logits"}
        return _gradients(clk.distill_kl, tensors, {**options, "backend": backend}, upstream, constant)

    # A logit of ten thousand has an absolute error of its own size times the precision, and a probability that relative error.
    largest = max(tensor.double().abs().max().item() for tensor in list(tensors.values())[:2]) / temperature
    _compare(run, tensors, backend, dtype, 1.0 + largest * temperature**2)


def feature_distill_kl(draw: Draw, backend: str) -> None:
    """One or several teachers, own anchors, weights, a masked diagonal, one direction or both, gradients of all three inputs."""
    dtype = draw.dtype()
    N, M, d = draw.size(80, 1), draw.size(300, 1), draw.size(70, 1)
    teachers = () if draw.chance(0.6) else (draw.random.randint(1, 3),)
    own = draw.chance(0.3)
    width = draw.size(40, 1) if own else d
    tensors = {
        "student": draw.normal((N, d), dtype, d**-0.5),
        "teacher": draw.normal((*teachers, N, width), dtype, width**-0.5),
        "anchors": draw.normal((M, d), dtype, d**-0.5),
        "logit_scale": torch.tensor(draw.choice((1.0, 20.0, 100.0)), dtype=torch.float64),
    }
    if own:
        tensors["teacher_anchors"] = draw.normal((M, width), dtype, width**-0.5)
    if draw.chance(0.3):
        tensors["sample_weight"] = draw.grid((*teachers, N), torch.float32)
    options = {
        "rows": draw.choice((1.0, 1.0, 0.0, 0.7)),
        "columns": draw.choice((1.0, 1.0, 0.0, 1.3)),
        "temperature": draw.choice((1.0, 2.0, 0.7)),
        "target": draw.choice(("cross_entropy", "kl")),
        "mask_diagonal": draw.chance(0.2),
    }
    if _refuses(draw, clk.feature_distill_kl, tensors, options, backend):
        return
    upstream = draw.normal((), torch.float64)
    constant = {"teacher", "teacher_anchors", "sample_weight"}

    def run(tensors: dict[str, Tensor], backend: str) -> dict[str, Tensor]:
        return _gradients(clk.feature_distill_kl, tensors, {**options, "backend": backend}, upstream, constant)

    scale = tensors["logit_scale"].item() / options["temperature"]
    tall = 1e4 if options["mask_diagonal"] else 0.0  # the masked logit is part of a loss of its own size
    _compare(run, tensors, backend, dtype, 1.0 + tall + 4 * scale * max(1.0, scale / 20))


def average_(draw: Draw, backend: str) -> None:
    """Several tensors of mixed dtypes and layouts; what lies around a view must stay as it was."""
    averages, values, before = [], [], []
    for _ in range(draw.random.randint(1, 6)):
        shape = [draw.size(30) for _ in range(draw.random.randint(0, 3))]
        average = draw.normal(shape, draw.dtype())
        if any(stride == 0 and size > 1 for stride, size in zip(average.stride(), average.shape, strict=True)):
            average = average.clone(memory_format=torch.contiguous_format)
        averages.append(average.to(DEVICE))
        values.append(draw.normal(shape, draw.dtype()).to(DEVICE))
        before.append(average.double().clone())
    weight = draw.choice((0.0, 1.0, 0.5, 1 / 3, 0.01, -0.5, 2.0))
    outside = [_outside(average) for average in averages]
    clk.average_(averages, values, weight, backend=backend)
    for average, value, start, around in zip(averages, values, before, outside, strict=True):
        wanted = start.to(average.device) + weight * (value.double() - start.to(average.device))
        assert_close("average", average, wanted, average.dtype, 4.0)
        assert torch.equal(_outside(average), around), "memory outside the view has changed"


def _outside(tensor: Tensor) -> Tensor:
    """How often NaN, with which the surroundings of a strided view are filled, is in a tensor's storage."""
    whole = torch.as_strided(tensor, (tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)
    return whole.isnan().sum()


def _gradients(
    function: Callable[..., Tensor],
    tensors: dict[str, Tensor],
    options: dict[str, Any],
    upstream: Tensor,
    constant: set[str] = frozenset(),  # type: ignore[assignment]
) -> dict[str, Tensor]:
    """Result of a call, and the gradient of everything differentiable in it."""
    leaves = {
        name: tensor.detach().requires_grad_(tensor.is_floating_point() and name not in constant)
        for name, tensor in tensors.items()
    }
    result = function(**leaves, **options)
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    found = {"result": result.detach().cpu()}
    if result.requires_grad:
        gradients = torch.autograd.grad(
            result, list(wanted.values()), upstream.to(result), allow_unused=True, materialize_grads=True
        )
        found |= {f"gradient of {n}": g.cpu() for n, g in zip(wanted, gradients, strict=True)}
    return found


def _compare(
    run: Callable[[dict[str, Tensor], str], dict[str, Tensor]],
    tensors: dict[str, Tensor],
    backend: str,
    dtype: torch.dtype,
    size: float,
) -> None:
    # On the same device: dropout draws its seed from the device's generator.
    exact = {n: (t.double() if t.is_floating_point() else t).to(DEVICE) for n, t in tensors.items()}
    found, expected = run({n: t.to(DEVICE) for n, t in tensors.items()}, backend), run(exact, "reference")
    assert found.keys() == expected.keys(), f"{sorted(found)} instead of {sorted(expected)}"
    for name, tensor in found.items():
        assert_close(name, tensor, expected[name], dtype, size)


def _refuses(
    draw: Draw, function: Callable[..., Any], tensors: dict[str, Tensor], options: dict[str, Any], backend: str
) -> bool:
    """In one case of eight: spoil an argument and see that the call names it, or another that it no longer fits."""
    if not draw.chance(0.125):
        return False
    name = draw.choice([n for n in tensors if tensors[n].dim()])
    tensor = tensors[name]
    ways = [tensor.unsqueeze(0).unsqueeze(0).unsqueeze(0), tensor.to(torch.complex64), tensor.tolist()]
    if name not in ("sample_weight", "w_gate"):  # another size of these may fit as well
        ways.append(torch.cat([tensor, tensor, tensor.narrow(-1, 0, min(1, tensor.shape[-1]))], dim=-1))
    spoilt = draw.choice(ways)
    message = ""
    try:
        function(**{**tensors, name: spoilt}, **options, backend=backend)
    except (ValueError, TypeError) as error:
        message = str(error)
    same = isinstance(spoilt, Tensor) and spoilt.shape == tensor.shape and spoilt.dtype == tensor.dtype
    assert message or same, f"{name}: {getattr(spoilt, 'shape', spoilt)} was accepted"
    assert same or any(argument in message for argument in tensors), f"{name} is not named: {message}"
    return True


ANYWHERE = (moe_adapter, top_k_gating, distill_kl, peaked_logits, feature_distill_kl, peaked_features, average_, blend_)
COMPILED = (routed_block, squared_distance, consolidation)
"""What the compiled library has alone."""

OPERATIONS: dict[str, Callable[[Draw, str], None]] = {f.__name__: f for f in (*ANYWHERE, *COMPILED)}


def operations(backend: str) -> list[str]:
    """Those that a backend has."""
    return [f.__name__ for f in (*ANYWHERE, *(COMPILED if backend == "cpu" else ()))]


def fuzz(operation: str, first: int, cases: int, backend: str, seconds: float = float("inf")) -> int:
    """Run the cases ``first … first + cases - 1`` of an operation, no new one after ``seconds``; how many ran.

    Raises:
        AssertionError: the first case that is wrong, with the command that repeats it.
    """
    dtypes = DTYPES if backend != "triton" else INTERPRETED if os.environ.get("TRITON_INTERPRET") == "1" else TRITON
    end = time.perf_counter() + seconds
    for number in range(first, first + cases):
        if time.perf_counter() > end:
            return number - first
        try:
            OPERATIONS[operation](Draw(operation, number, dtypes), backend)
        except Exception as error:
            repeat = f"python tests/fuzz/fuzz_cases.py --operation {operation} --first {number} --cases 1 --backend {backend}"
            raise AssertionError(f"{error}\nrepeat with: {repeat}") from error
    return cases


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operation", choices=OPERATIONS, help="one operation alone")
    parser.add_argument("--cases", type=int, default=10_000, help="shared by the operations")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--backend", default="cpu", help="cpu, cuda, triton or reference")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="of an operation, after which none is begun"
    )
    options = parser.parse_args()
    if "MALLOC_PERTURB_" not in os.environ:
        os.environ["MALLOC_PERTURB_"] = "1"  # glibc reads it when a process starts
        os.execv(sys.executable, [sys.executable, *sys.argv])
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    chosen = [options.operation] if options.operation else operations(options.backend)
    for operation in chosen:
        start = time.perf_counter()
        cases = fuzz(operation, options.first, options.cases // len(chosen), options.backend, options.seconds)
        print(f"{operation}: {cases:,} cases right, {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
