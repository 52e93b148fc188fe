"""Inputs of the adapter tests and an independent, naive evaluation of the definition."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import cl_kernels as clk
from cl_kernels.moe_adapter import dropout, with_hidden

WEIGHTS = ("down_weight", "down_bias", "up_weight", "up_bias")


@dataclass
class Case:
    """Arguments of one call. ``tensors`` holds every tensor argument by name."""

    tensors: dict[str, Tensor]
    scale: float = 0.1

    def arguments(self, requires_grad: bool = False) -> dict[str, Tensor]:
        """The tensors, as fresh leaves that require gradients where they can."""
        return {
            name: tensor.detach().requires_grad_(requires_grad and tensor.is_floating_point())
            for name, tensor in self.tensors.items()
        }

    def to(self, dtype: torch.dtype) -> Case:
        """Every floating tensor but the gates in ``dtype``."""
        return Case(
            {n: t.to(dtype) if t.is_floating_point() and n != "gates" else t for n, t in self.tensors.items()},
            self.scale,
        )


def make(
    batch: int,
    length: int | None,
    width: int,
    rank: int,
    experts: int,
    k: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    residual: bool = True,
) -> Case:
    """Random weights of moderate size, so that no output is dominated by a single term; ``length`` None routes tokens."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * std).to(dtype)

    x_shape = (batch, width) if length is None else (batch, length, width)
    gates_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    tensors = {
        "x": normal(*x_shape),
        "expert_ids": torch.randint(0, experts, (batch, k), generator=generator),
        "gates": torch.rand(batch, k, generator=generator, dtype=torch.float64).to(gates_dtype),
        "down_weight": normal(experts, rank, width, std=max(width, 1) ** -0.5),
        "down_bias": normal(experts, rank, std=0.3),
        "up_weight": normal(experts, width, rank, std=max(rank, 1) ** -0.5),
        "up_bias": normal(experts, width, std=0.3),
    }
    if residual:
        tensors["residual"] = normal(*x_shape)
    return Case(tensors)


def naive(
    x: Tensor,
    expert_ids: Tensor,
    gates: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    residual: Tensor | None = None,
    *,
    scale: float,
    keep: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """The definition over all experts at once: every expert sees every sample, and an (B, E) matrix of gates picks.

    ``keep`` (B, k, L, R) is the dropout mask; with it, each slot is evaluated on its own.
    """
    if x.dim() == 2:
        args = (expert_ids, gates, down_weight, down_bias, up_weight, up_bias)
        out = naive(
            x[:, None],
            *args,
            None if residual is None else residual[:, None],
            scale=scale,
            keep=keep,
            dropout_p=dropout_p,
        )
        return out[:, 0]
    experts = down_weight.shape[0]
    hidden = torch.einsum("bld,erd->belr", x, down_weight) + down_bias[None, :, None, :]
    hidden = hidden.clamp_min(0)
    out = torch.zeros_like(x) if residual is None else residual
    for j in range(expert_ids.shape[1]):
        chosen = torch.nn.functional.one_hot(expert_ids[:, j].clamp(0, experts - 1), experts).to(x.dtype)
        chosen = chosen * ((expert_ids[:, j] >= 0) & (expert_ids[:, j] < experts))[:, None]
        slot = torch.einsum("be,belr->belr", chosen, hidden)
        if keep is not None:
            slot = slot * keep[:, j, None] / (1 - dropout_p)
        expert = torch.einsum("belr,edr->bld", slot, up_weight) + torch.einsum("be,ed->bd", chosen, up_bias)[:, None]
        out = out + scale * gates[:, j, None, None].to(x.dtype) * expert
    return out


TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Relative root-mean-square error against float64 arithmetic on the same inputs: a few units in the last place."""


def relative_error(given: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of ``expected``; NaN if either has one."""
    given, expected = given.double(), expected.double()
    return ((given - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def outputs(
    case: Case, backend: str, dropout_p: float = 0.0, needs: tuple[str, ...] | None = None
) -> dict[str, Tensor]:
    """Output and gradients of one call under a fixed seed and upstream gradient; ``needs`` names what requires a gradient."""
    arguments = case.arguments(requires_grad=needs is None)
    for name in needs or ():
        arguments[name].requires_grad_()
    torch.manual_seed(7)
    out = clk.moe_adapter(**arguments, scale=case.scale, dropout_p=dropout_p, backend=backend)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(11), dtype=torch.float64)
    out.backward(upstream.to(case.tensors["x"].dtype).to(out))
    found = {"out": out.detach()}
    return found | {name: tensor.grad for name, tensor in arguments.items() if tensor.grad is not None}


def assert_matches_reference(case: Case, backend: str, dropout_p: float = 0.0, factor: float = 1.0) -> None:
    """Output and every gradient against the reference in float64 on the same (already rounded) inputs."""
    dtype = case.tensors["x"].dtype
    found = outputs(case, backend, dropout_p)
    expected = outputs(case.to(torch.float64), "reference", dropout_p)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == (case.tensors["gates"].dtype if name == "gates" else dtype)
        error = relative_error(tensor, expected[name])
        assert error <= factor * TOLERANCE[dtype], f"{name}: relative error {error:.2e}"


def assert_parts_drop_what_the_whole_does(case: Case, backend: str) -> None:
    """A batch in two parts, each with :func:`seed_of_part`, keeps the elements of the bottleneck that the whole batch keeps."""
    t, seed, outs = case.tensors, torch.tensor(2**40 + 5), []
    weights = {name: t[name] for name in ("down_weight", "down_bias", "up_weight", "up_bias")}
    options = {"scale": case.scale, "dropout_p": 0.4, "backend": backend}
    for rows, given in (
        (slice(None), seed),
        (slice(0, 2), dropout.seed_of_part(seed, 0)),
        (slice(2, None), dropout.seed_of_part(seed, 2)),
    ):
        part = [t[name][rows] for name in ("x", "expert_ids", "gates")]
        outs.append(with_hidden(*part, weights, residual=t["residual"][rows], seed=given, **options)[0])
    torch.testing.assert_close(torch.cat(outs[1:]), outs[0])
    wrong = with_hidden(
        *(t[name][2:] for name in ("x", "expert_ids", "gates")),
        weights,
        residual=t["residual"][2:],
        seed=seed,
        **options,
    )[0]
    assert (wrong - outs[0][2:]).abs().max() > 1e-3
