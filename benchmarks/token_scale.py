"""Token routing with the tokens of a thousand images, for several numbers of experts: ours, grouped products, all experts masked.

    python benchmarks/token_scale.py --tokens 200000 --experts 2 4 8 16 22 32 64 --output token_scale.json

Each row is checked before it is timed: results and gradients of all three implementations against float64. A bottleneck unit whose
input is within rounding of 0 is on in one arithmetic and off in another, and takes part of the token's gradient with it; such
tokens are counted, and left out of the comparison of the tokens' own gradients.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from bench_token_routing import SCALE, D, K, R, dense, grouped, inputs, ours
from machine import DEVICE, ceilings
from side_by_side import best
from torch import Tensor

IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {"ours": ours, "grouped_mm": grouped, "dense": dense}
NAMES = ("x", "gates", "down_weight", "down_bias", "up_weight", "up_bias")
TOLERANCE = 1e-4
"""Largest error allowed, relative to the largest entry; a gradient of an expert is a sum over thousands of tokens."""


def exact(tensors: list[Tensor], upstream: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Output and gradients in float64, expert by expert, and the tokens (N,) with a unit that fp32 may take for on or off."""
    x, ids, gates, *weights = tensors
    found = {"out": x.double(), "x": upstream.double(), "gates": torch.zeros_like(gates, dtype=torch.float64)}
    sums = [torch.zeros_like(weight, dtype=torch.float64) for weight in weights]
    kinks = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for e, (down, down_bias, up, up_bias) in enumerate(zip(*(w.double().unbind(0) for w in weights), strict=True)):
        token, slot = (ids == e).nonzero(as_tuple=True)
        rows, grad, gate = x[token].double(), upstream[token].double(), gates[token, slot, None].double()
        before = rows @ down.T + down_bias
        kinks[token] |= (before.abs() < 1e-5 * before.abs().amax(1, keepdim=True)).any(1)
        hidden = before.relu()
        y = hidden @ up.T + up_bias
        found["out"].index_add_(0, token, SCALE * gate * y)
        found["gates"][token, slot] = SCALE * (grad * y).sum(1)
        grad = SCALE * gate * grad
        inner = (grad @ up) * (before > 0)
        found["x"].index_add_(0, token, inner @ down)
        for total, part in zip(sums, (inner.T @ rows, inner.sum(0), grad.T @ hidden, grad.sum(0)), strict=True):
            total[e] = part
    return found | dict(zip(NAMES[2:], sums, strict=True)), kinks


def check(
    name: str, tensors: list[Tensor], upstream: Tensor, wanted: dict[str, Tensor], kinks: Tensor
) -> dict[str, float]:
    """Largest relative error of every result of an implementation, and how many tokens' gradients differ by a kink.

    Raises:
        AssertionError: one is too large.
    """
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
    differentiable = [leaf for leaf in leaves if leaf.requires_grad]
    out = IMPLEMENTATIONS[name](*leaves)
    found = {"out": out.detach(), **dict(zip(NAMES, torch.autograd.grad(out, differentiable, upstream), strict=True))}
    errors = {}
    for key, value in found.items():
        error = (value.double() - wanted[key]).abs_() / wanted[key].abs().max()
        if key == "x":
            errors["tokens at a kink"] = int((error[kinks].amax(1) > TOLERANCE).sum())
            error = error[~kinks]
        errors[key] = float(error.max())
    wrong = {key: error for key, error in errors.items() if key in found and not error <= TOLERANCE}
    assert not wrong, f"{name}: relative errors {wrong} are above {TOLERANCE:.0e}: no time is reported"
    return errors


def measure(tokens: int, experts: int, rounds: int) -> dict[str, object]:
    """One row: errors, and best seconds of all three turn about, forward and training step."""
    tensors = list(inputs(tokens, experts))
    upstream = torch.randn(tokens, D, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    wanted, kinks = exact(tensors, upstream)
    errors = {name: check(name, tensors, upstream, wanted, kinks) for name in IMPLEMENTATIONS}
    del wanted
    row: dict[str, object] = {"tokens": tokens, "experts": experts, "errors": errors}

    def wait() -> None:
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    def forward(function: Callable[..., Tensor]) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                function(*tensors)
            wait()

        return run

    def step(function: Callable[..., Tensor]) -> Callable[[], None]:
        leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
        differentiable = [leaf for leaf in leaves if leaf.requires_grad]

        def run() -> None:
            torch.autograd.grad(function(*leaves), differentiable, upstream)
            wait()

        return run

    for kind, make in (("forward", forward), ("step", step)):
        row[kind] = best({name: make(function) for name, function in IMPLEMENTATIONS.items()}, rounds)
    return row


def line(row: dict[str, object]) -> str:
    """A row in words."""
    parts = [f"{row['tokens']:,} tokens, {row['experts']:2} experts:"]
    for kind in ("forward", "step"):
        seconds = row[kind]
        ratios = (f"{name} {seconds[name] / seconds['ours']:.2f}x" for name in IMPLEMENTATIONS if name != "ours")
        parts.append(f"{kind} {seconds['ours']:.2f} s, {', '.join(ratios)};")
    kinks = {name: error["tokens at a kink"] for name, error in row["errors"].items()}
    worst = {name: max(v for key, v in error.items() if key in NAMES) for name, error in row["errors"].items()}
    return " ".join(parts) + f" kinks {kinks}, largest error { ({n: f'{v:.0e}' for n, v in worst.items()}) }"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--experts", type=int, nargs="+", default=[2, 4, 8, 16, 22, 32, 64])
    parser.add_argument("--rounds", type=int, default=2, help="of each implementation, turn about; the best counts")
    parser.add_argument("--output", type=Path, help="a JSON file that gets every row, those of earlier calls included")
    options = parser.parse_args()
    found = json.loads(options.output.read_text()) if options.output and options.output.exists() else []
    for experts in options.experts:
        if experts < K:
            parser.error(f"--experts: got {experts}, expected at least {K}, so many as a token chooses")
        row = measure(options.tokens, experts, options.rounds)
        row |= {
            "threads": torch.get_num_threads(),
            "device": str(DEVICE),
            "width": D,
            "bottleneck": R,
            "ceilings": ceilings(),
        }
        print(line(row), flush=True)
        found.append(row)
        if options.output:
            options.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
