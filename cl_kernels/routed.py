"""A mixture of adapters together with the router that chooses by token 0, as one node of the autograd graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cl_kernels import dispatch, library
from cl_kernels.gating import autograd, top_k_gating
from cl_kernels.moe_adapter import with_hidden
from cl_kernels.routed_block import routed_block, serves


def routed_adapter(
    x: Tensor,
    w_gate: Tensor,
    w_noise: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    *,
    k: int,
    noise: Tensor | None = None,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    residual: Tensor | None = None,
    add_input: bool = False,
    seed: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``moe_adapter(x, …)`` with the gates and experts of ``top_k_gating(x[:, 0], …)``, each sample routed by its token 0.

    The same values as the two calls. In training on ``x`` that needs a gradient, the router's is added to token 0 of the adapters'
    in place, where autograd would fill, add and throw away a tensor as large as ``x`` that is zero everywhere else. With
    ``add_input``, noise and the compiled kernels the sums around the mixture are formed while it is written, see
    :func:`~cl_kernels.routed_block.routed_block`.

    Args:
        x: (B, L, D) tokens of each sample.
        w_gate: (D, E) router weight.
        w_noise: (D, E) weight of the noise's standard deviation, or None.
        down_weight: (E, R, D).
        down_bias: (E, R).
        up_weight: (E, D, R).
        up_bias: (E, D).
        k: experts per sample.
        noise: (B, E) standard normal, or None for the clean gate.
        scale: factor on every expert's output.
        dropout_p: probability of zeroing a bottleneck element.
        residual: (B, L, D), what the output is added to, or None.
        add_input: whether ``x`` is added to the residual too, as the skip connection around an MLP that gave it.
        seed: of the dropout, int64 () or :func:`~cl_kernels.moe_adapter.dropout.seed_of_part`; drawn when None.
        backend: see :func:`cl_kernels.backends`; chosen by device when None.

    Returns:
        The mixture (B, L, D), and ``usage`` (E,) int64, how many samples chose each expert.

    Raises:
        ValueError: ``x`` has not three dimensions or no token; ``add_input`` without a residual of its shape; else as
            :func:`cl_kernels.top_k_gating` and :func:`cl_kernels.moe_adapter`.
        TypeError: as those.

    Source: MoE-Adapters4CL (Yu et al., CVPR 2024), equations 2 to 6.
    """
    if not isinstance(x, Tensor) or x.dim() != 3 or x.shape[1] == 0:
        given = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x: got {given}, expected (B, L, D) with at least one token per sample")
    experts = (down_weight, down_bias, up_weight, up_bias)
    if add_input:
        if residual is None or residual.shape != x.shape:
            shape = None if residual is None else f"shape {tuple(residual.shape)}"
            raise ValueError(f"residual: got {shape} with add_input, expected the shape {tuple(x.shape)} of x")
        if _one_operation(x, residual, (w_gate, w_noise, noise), experts, k, dropout_p, backend):
            assert w_noise is not None
            assert noise is not None
            options: dict[str, Any] = {"k": k, "scale": scale, "dropout_p": dropout_p, "seed": seed}
            return routed_block(x, residual, w_gate, w_noise, noise, experts, **options)
        residual = x + residual
    call = (x, w_gate, w_noise, noise, *experts, residual, k, scale, dropout_p, seed, backend)
    if _one_node(x, (w_gate, *experts, residual), backend):
        return _Routed.apply(*call)
    return _two_calls(*call)[:2]


def _one_operation(
    x: Tensor,
    residual: Tensor,
    router: tuple[Tensor | None, ...],
    experts: tuple[Tensor, ...],
    k: int,
    dropout_p: float,
    backend: str | None,
) -> bool:
    """Whether :func:`routed_block` takes this call as it is; what is wrong with a call, the two functions say."""
    recorded = torch.is_grad_enabled() and backend in (None, "cpu") and not any(t is None for t in router)
    given = [t for t in (residual, *router, *experts) if isinstance(t, Tensor)]
    if not recorded or len(given) < 8 or not serves(x, given) or experts[0].dim() != 3:
        return False
    (batch, _, width), (count, rank, _) = x.shape, experts[0].shape
    shapes = [x.shape, (width, count), (width, count), (batch, count)]
    shapes += [(count, rank, width), (count, rank), (count, width, rank), (count, width)]
    fitting = all(t.shape == shape for t, shape in zip(given, shapes, strict=True))
    return fitting and 1 <= k <= count and 0.0 <= dropout_p < 1.0


def _one_node(x: Tensor, others: tuple[Tensor | None, ...], backend: str | None) -> bool:
    """Whether the node below serves this call: it takes tensors as they are to a kernel, and pays where ``x`` is differentiated."""
    if not (torch.is_grad_enabled() and x.requires_grad) or torch.is_autocast_enabled(
        dispatch.autocast_device(x.device)
    ):
        return False
    if any(isinstance(t, Tensor) and t.dtype != x.dtype for t in others):
        return False
    double = x.dtype == torch.float64 and x.device.type == "cuda"
    return not double and dispatch.choose("moe_adapter", x.device, backend) != "reference"


def _two_calls(
    x: Tensor,
    w_gate: Tensor,
    w_noise: Tensor | None,
    noise: Tensor | None,
    down_weight: Tensor,
    down_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    residual: Tensor | None,
    k: int,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    backend: str | None,
    *,
    save_hidden: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """The output, the usage, and what else the backward pass needs: gates and ids (B, k), the bottleneck (B, k, L, R)."""
    gates, expert_ids, usage = top_k_gating(x[:, 0], w_gate, w_noise, k=k, noise=noise, backend=backend)
    experts = {"down_weight": down_weight, "down_bias": down_bias, "up_weight": up_weight, "up_bias": up_bias}
    out, hidden = with_hidden(
        x,
        expert_ids,
        gates,
        experts,
        scale=scale,
        dropout_p=dropout_p,
        residual=residual,
        backend=backend,
        save_hidden=save_hidden,
        seed=seed,
    )
    return out, usage, gates, expert_ids, hidden


class _Routed(torch.autograd.Function):
    """Forward: the two calls. Backward: the adapters' kernel, then the router's gradient into its result."""

    @staticmethod
    def forward(ctx: Any, *call: Any) -> tuple[Tensor, Tensor]:
        x, w_gate, w_noise, noise, down_weight, _, up_weight, up_bias, _, _, scale, dropout_p, _, backend = call
        out, usage, gates, expert_ids, hidden = _two_calls(*call, save_hidden=True)
        ctx.mark_non_differentiable(usage)
        ctx.set_materialize_grads(False)
        router = (w_gate, None if noise is None else w_noise, noise, gates, expert_ids)
        ctx.save_for_backward(x, *router, down_weight, up_weight, up_bias, hidden)
        ctx.scale, ctx.dropout_p = float(scale), float(dropout_p)
        ctx.backends = [dispatch.choose(name, x.device, backend) for name in ("moe_adapter", "top_k_gating")]
        return out, usage

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        if grad is None:
            return (None,) * 14
        x, w_gate, w_noise, noise, gates, expert_ids, *experts, hidden = ctx.saved_tensors
        need_x, need_gate, need_noise, _, *need_experts, need_residual = ctx.needs_input_grad[:9]
        adapters, router = ctx.backends
        grad_x, grad_gates, *weights = library.operator("moe_adapter_backward", adapters)(
            grad, x, expert_ids, gates, *experts, hidden, ctx.scale, ctx.dropout_p, need_x, True, any(need_experts)
        )
        grad_token, grad_gate, grad_noise = autograd.GRADIENTS[router](
            grad_gates, x[:, 0], w_gate, w_noise, noise, gates, expert_ids, need_x, need_gate, need_noise
        )
        if need_x:
            grad_x[:, 0] += grad_token
        return (
            grad_x if need_x else None,
            grad_gate,
            grad_noise,
            None,
            *(weight if needed else None for weight, needed in zip(weights, need_experts, strict=True)),
            grad if need_residual else None,
            *(None,) * 5,
        )
