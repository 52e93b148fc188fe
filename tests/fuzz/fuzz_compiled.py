"""Operations that only the compiled library has, and averages of three models: random cases against plain PyTorch in float64."""

from __future__ import annotations

import torch
from random_tensors import DEVICE, Draw, assert_close
from torch import Tensor

import cl_kernels as clk
from cl_kernels import library
from cl_kernels.gating import reference as gating
from cl_kernels.routed import routed_adapter
from cl_kernels.routed_block import FIELDS
from cl_kernels.routed_block import routed_block as block
from cl_kernels.squared_distance import add_difference_, distance_value
from cl_kernels.squared_distance import squared_distance as distance


def routed_block(draw: Draw, backend: str) -> None:
    """Experts stacked or each for itself, tokens in any order, dropout; in one case of eight the operator gets a wrong size."""
    dtype = draw.choice((torch.float32, torch.float64))
    batch, length, width = draw.size(9), draw.size(40, 1), draw.size(70, 1)
    rank, experts = draw.size(40, 1), draw.size(9, 1)
    k = draw.random.randint(1, min(experts, 4))
    shapes = (rank, width), (rank,), (width, rank), (width,)
    steps = (0.125, 4), (0.25, 6), (0.125, 4), (0.25, 6)
    inputs = {
        "x": draw.grid((batch, length, width), dtype),
        "residual": draw.grid((batch, length, width), dtype),
        "w_gate": draw.grid((width, experts), dtype, 0.125, 4),
        "w_noise": draw.grid((width, experts), dtype, 0.125, 4),
        "noise": draw.normal((batch, experts), dtype),
    }
    stacks = [draw.grid((experts, *shape), dtype, *step) for shape, step in zip(shapes, steps, strict=True)]
    scale, dropout_p = draw.choice((1.0, 0.1, -0.5)), draw.choice((0.0, 0.0, 0.3))
    if draw.chance(0.125):
        _refuses(draw, inputs, stacks, k, scale)
        return
    logits = gating.logits(*(inputs[name].double() if name != "x" else inputs[name][:, 0].double() for name in _ROUTER))
    ranked = logits.sort(dim=-1, descending=True).values[:, : k + 1]
    if ranked.numel() and experts > 1 and (ranked[:, :-1] - ranked[:, 1:]).min() < 1e-3:
        return  # either of two experts would be right
    apart = draw.chance(0.5)
    seed, upstream = draw.random.getrandbits(30), draw.normal((batch, length, width), dtype)

    def run(fused: bool) -> dict[str, Tensor]:
        exact = torch.float64 if not fused else dtype
        torch.manual_seed(seed)
        leaves = {name: t.detach().to(exact).requires_grad_(name != "noise") for name, t in inputs.items()}
        whole = [stack.detach().to(exact).requires_grad_() for stack in stacks]
        if fused:
            parts = [stack[e] for e in range(experts) for stack in whole] if apart else whole
            out, usage = block(*leaves.values(), parts, k=k, scale=scale, dropout_p=dropout_p)
        else:
            x, residual, w_gate, w_noise, noise = leaves.values()
            options = {"k": k, "noise": noise, "scale": scale, "dropout_p": dropout_p, "backend": "reference"}
            out, usage = routed_adapter(x, w_gate, w_noise, *whole, residual=x + residual, **options)
        wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        wanted |= {f"experts[{i}]": stack for i, stack in enumerate(whole)}
        found = torch.autograd.grad(
            out, list(wanted.values()), upstream.to(exact), allow_unused=True, materialize_grads=True
        )
        return {"out": out.detach(), "usage": usage} | dict(zip(wanted, found, strict=True))

    found, expected = run(True), run(False)
    assert torch.equal(found.pop("usage"), expected.pop("usage")), "usage"
    for name, tensor in found.items():
        # A router's gradient sums over all tokens of a sample.
        size = (1.0 + (width * rank) ** 0.5) * (length if name.startswith("w_") or name == "x" else 1)
        assert_close(name, tensor, expected[name], dtype, size)


_ROUTER = ("x", "w_gate", "w_noise", "noise")


def _refuses(draw: Draw, inputs: dict[str, Tensor], stacks: list[Tensor], k: int, scale: float) -> None:
    """The operator itself, which checks what it gets, for those who call it without the functions around it."""
    wrong = draw.choice([*inputs, *range(FIELDS)])
    tensors, lists = dict(inputs), [list(stack.unbind(0)) for stack in stacks]
    if isinstance(wrong, str):
        tensors[wrong] = draw.choice((torch.cat([tensors[wrong]] * 3, -1), tensors[wrong].half(), tensors[wrong][None]))
    else:
        last = lists[wrong][-1]
        lists[wrong][-1] = draw.choice((torch.cat([last] * 3, -1), last.half(), last[None]))
    try:
        library.operator("routed_block", "cpu")(*tensors.values(), *lists, None, k, scale, 0.0, True)
    except (RuntimeError, ValueError):
        return
    raise AssertionError(f"{wrong}: another shape or dtype was accepted")


def squared_distance(draw: Draw, backend: str) -> None:
    """Lists of tensors, empty ones among them, and the gradients of some of them."""
    dtype = draw.choice((torch.float32, torch.float64))
    shapes = [[draw.size(60) for _ in range(draw.random.randint(0, 3))] for _ in range(draw.random.randint(1, 6))]
    tensors, references = ([draw.normal(shape, dtype) for shape in shapes] for _ in range(2))
    leaves = [t.detach().requires_grad_(draw.chance(0.7)) for t in tensors]
    result = distance(leaves, references)
    differences = [a.double() - b.double() for a, b in zip(tensors, references, strict=True)]
    expected = sum((d.square().sum() for d in differences), torch.zeros((), dtype=torch.float64))
    assert_close("result", result, expected, dtype)
    wanted = [i for i, leaf in enumerate(leaves) if leaf.requires_grad]
    if wanted:
        found = torch.autograd.grad(3 * result, [leaves[i] for i in wanted])
        for i, gradient in zip(wanted, found, strict=True):
            assert_close(f"gradient {i}", gradient, 6 * differences[i], dtype)


def consolidation(draw: Draw, backend: str) -> None:
    """Value and gradient of ``Σ w (t − r)²`` with and without weights, the gradient added to what was there."""
    dtype = draw.choice((torch.float32, torch.float64))
    shapes = [[draw.size(60) for _ in range(draw.random.randint(0, 3))] for _ in range(draw.random.randint(1, 6))]
    lists = [[draw.normal(shape, dtype).contiguous() for shape in shapes] for _ in range(4)]
    tensors, references, gradients, weights = lists
    chosen = weights if draw.chance(0.5) else None
    factor = draw.choice((2.0, 0.75, -1.5))
    ones = [torch.ones_like(w) for w in weights]
    weighted = [
        w.double() * (t.double() - r.double()) for w, t, r in zip(chosen or ones, tensors, references, strict=True)
    ]
    terms = [(w * (t.double() - r.double())).sum() for w, t, r in zip(weighted, tensors, references, strict=True)]
    largest = max((float(w.square().sum()) for w in weighted), default=0.0)
    assert_close("value", distance_value(tensors, references, chosen), torch.stack(terms).sum(), dtype, 4.0 + largest)
    expected = [g.double() + factor * w for g, w in zip(gradients, weighted, strict=True)]
    added = [g.clone() for g in gradients]
    add_difference_(added, tensors, references, factor, chosen)
    for i, (found, wanted) in enumerate(zip(added, expected, strict=True)):
        assert_close(f"gradient {i}", found, wanted, dtype, 4.0)


def blend_(draw: Draw, backend: str) -> None:
    """Three models of mixed dtypes and layouts; rounded stochastically, bit by bit what the reference draws."""
    shapes = [[draw.size(30) for _ in range(draw.random.randint(0, 3))] for _ in range(draw.random.randint(1, 6))]
    averages, values, others = ([draw.normal(shape, draw.dtype()) for shape in shapes] for _ in range(3))
    averages = [average.clone(memory_format=torch.contiguous_format) for average in averages]
    weight, other_weight = draw.choice((0.0, 0.5, 1 / 3, 0.01)), draw.choice((0.0, 0.25, 0.02, -0.5))
    options = {"rounding": "stochastic", "seed": draw.random.getrandbits(40)} if draw.chance(0.5) else {}

    def run(backend: str, device: str) -> list[Tensor]:
        lists = [[t.detach().to(device, copy=True) for t in tensors] for tensors in (averages, values, others)]
        clk.blend_(*lists, weight, other_weight, backend=backend, **options)
        return [t.cpu() for t in lists[0]]

    found = run(backend, DEVICE)
    for start, value, other, result in zip(averages, values, others, found, strict=True):
        a = start.double()
        wanted = a + weight * (value.double() - a) + other_weight * (other.double() - a)
        assert_close("average", result, wanted, start.dtype, 4.0)
    if options:
        for start, result, expected in zip(averages, found, run("reference", "cpu"), strict=True):
            if start.dtype.itemsize > 2:
                continue
            # The exact sums may differ in their last bit before they are rounded, which moves a few across a boundary.
            differing = (result.double() != expected.double()).sum().item()
            assert differing <= 1 + start.numel() // 50, f"{differing} of {start.numel()} entries are rounded otherwise"
