"""Token routing with the tokens of a thousand images, for several numbers of experts: ours, grouped products, all experts masked.

    python benchmarks/token_scale.py --tokens 200000 --experts 2 4 8 16 22 32 64 --output token_scale.json

Each row is checked before it is timed: results and gradients of all three implementations against float64. A bottleneck unit whose
input is within rounding of 0 is on in one arithmetic and off in another, and takes part of its token's gradient with it. Tokens
with such a unit get no gradient in that check; how many of them differ is counted for each implementation.
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

NEAR = 2e-6
"""Of a token's largest bottleneck unit: some times what fp32 is off by at most."""


PIECE = 16_384
"""Tokens of which float64 results are held at once."""


def at_a_kink(x: Tensor, ids: Tensor, down_weight: Tensor, down_bias: Tensor) -> Tensor:
    """(N,) whether a unit of the token's experts is within rounding of 0."""
    found = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for e, (down, bias) in enumerate(zip(down_weight.double(), down_bias.double(), strict=True)):
        token = (ids == e).any(1).nonzero().flatten()
        before = (x[token].double() @ down.T + bias).abs()
        found[token] |= (before < NEAR * before.amax(1, keepdim=True)).any(1)
    return found


def exact(tensors: list[Tensor], upstream: Tensor) -> dict[str, Tensor]:
    """Output and gradients by float64 arithmetic, tokens piece by piece; what is as large as the tokens is kept in fp32."""
    x, ids, gates, *weights = tensors
    found = {
        "out": torch.empty_like(x),
        "x": torch.empty_like(x),
        "gates": torch.zeros_like(gates, dtype=torch.float64),
    }
    found |= {name: torch.zeros_like(w, dtype=torch.float64) for name, w in zip(NAMES[2:], weights, strict=True)}
    for begin in range(0, len(x), PIECE):
        piece = slice(begin, begin + PIECE)
        results = {"out": x[piece].double(), "x": upstream[piece].double()}
        for e, (down, down_bias, up, up_bias) in enumerate(zip(*(w.double().unbind(0) for w in weights), strict=True)):
            token, slot = (ids[piece] == e).nonzero(as_tuple=True)
            rows, grad, gate = (
                x[piece][token].double(),
                upstream[piece][token].double(),
                gates[piece][token, slot, None].double(),
            )
            before = rows @ down.T + down_bias
            hidden = before.relu()
            y = hidden @ up.T + up_bias
            results["out"].index_add_(0, token, SCALE * gate * y)
            found["gates"][piece][token, slot] = SCALE * (grad * y).sum(1)
            grad = SCALE * gate * grad
            inner = (grad @ up) * (before > 0)
            results["x"].index_add_(0, token, inner @ down)
            for name, part in zip(NAMES[2:], (inner.T @ rows, inner.sum(0), grad.T @ hidden, grad.sum(0)), strict=True):
                found[name][e] += part
        for name, value in results.items():
            found[name][piece] = value
    return found


def relative_errors(name: str, tensors: list[Tensor], upstream: Tensor, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of every result the largest absolute error in each row over the largest exact entry."""
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
    differentiable = [leaf for leaf in leaves if leaf.requires_grad]
    out = IMPLEMENTATIONS[name](*leaves)
    found = {"out": out.detach(), **dict(zip(NAMES, torch.autograd.grad(out, differentiable, upstream), strict=True))}
    errors = {}
    for key, value in found.items():
        pieces = zip(value.split(PIECE), wanted[key].split(PIECE), strict=True)
        rows = [(a.double() - b).abs().flatten(1).amax(1) for a, b in pieces]
        errors[key] = torch.cat(rows) / wanted[key].abs().max()
    return errors


def check(names: list[str], tensors: list[Tensor], upstream: Tensor) -> dict[str, dict[str, float]]:
    """For each implementation the largest relative error of every result, and how many tokens are on the other side of a kink.

    Raises:
        AssertionError: an error is too large.
    """
    x, ids, gates, *weights = tensors
    kinks = at_a_kink(x, ids, *weights[:2])
    away = upstream.masked_fill(kinks[:, None], 0.0)
    wanted = exact(tensors, away)
    near = [x[kinks], ids[kinks], gates[kinks], *weights], upstream[kinks]
    wanted_near = exact(*near)
    found = {}
    for name in names:
        errors = {key: float(error.max()) for key, error in relative_errors(name, tensors, away, wanted).items()}
        wrong = {key: error for key, error in errors.items() if not error <= TOLERANCE}
        assert not wrong, f"{name}: relative errors {wrong} are above {TOLERANCE:.0e}: no time is reported"
        flipped = (relative_errors(name, *near, wanted_near)["x"] > TOLERANCE).sum() if kinks.any() else 0
        found[name] = errors | {"tokens near a kink": int(kinks.sum()), "on its other side": int(flipped)}
    return found


def measure(tokens: int, experts: int, rounds: int, with_dense: bool) -> dict[str, object]:
    """One row: errors, and best seconds of all turn about, forward and training step."""
    names = [name for name in IMPLEMENTATIONS if name != "dense" or with_dense]
    tensors = list(inputs(tokens, experts))
    upstream = torch.randn(tokens, D, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    row: dict[str, object] = {"tokens": tokens, "experts": experts, "errors": check(names, tensors, upstream)}

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
        row[kind] = best({name: make(IMPLEMENTATIONS[name]) for name in names}, rounds)
    return row


def line(row: dict[str, object]) -> str:
    """A row in words."""
    parts = [f"{row['tokens']:,} tokens, {row['experts']:2} experts:"]
    for kind in ("forward", "step"):
        seconds = row[kind]
        ratios = (f"{name} {seconds[name] / seconds['ours']:.2f}x" for name in seconds if name != "ours")
        parts.append(f"{kind} {seconds['ours']:.2f} s, {', '.join(ratios)};")
    errors = row["errors"]
    worst = ", ".join(f"{name} {max(error[key] for key in ('out', *NAMES)):.0e}" for name, error in errors.items())
    flipped = ", ".join(f"{name} {error['on its other side']}" for name, error in errors.items())
    near = errors["ours"]["tokens near a kink"]
    return " ".join(parts) + f" errors: {worst}; of {near} tokens near a kink on its other side: {flipped}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--experts", type=int, nargs="+", default=[2, 4, 8, 16, 22, 32, 64])
    parser.add_argument("--rounds", type=int, default=2, help="of each implementation, turn about; the best counts")
    parser.add_argument(
        "--dense-up-to", type=int, default=64, help="experts: with more, masking all of them takes minutes"
    )
    parser.add_argument("--output", type=Path, help="a JSON file that gets every row, those of earlier calls included")
    options = parser.parse_args()
    found = json.loads(options.output.read_text()) if options.output and options.output.exists() else []
    for experts in options.experts:
        if experts < K:
            parser.error(f"--experts: got {experts}, expected at least {K}, so many as a token chooses")
        row = measure(options.tokens, experts, options.rounds, experts <= options.dense_up_to)
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
