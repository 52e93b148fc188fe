"""Top-k mixture of adapters."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from cl_kernels import dispatch
from cl_kernels.moe_adapter import autograd, dropout, reference

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def moe_adapter(
    x: Tensor,
    expert_ids: Tensor,
    gates: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    *,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``residual + Σ_j gates_j · scale · (dropout(relu(x W_down[e_j]ᵀ + b_down[e_j])) W_up[e_j]ᵀ + b_up[e_j])``.

    With ``x`` (B, L, D) each sample chooses its experts once for all of its L tokens; with ``x`` (N, D) each token chooses its own.
    Differentiable in ``x``, ``gates``, ``residual`` and the four weights; an expert that nobody chose gets a zero gradient. An
    expert id outside [0, E) contributes nothing, and its gate gets a zero gradient. Arithmetic is fp32 for 16-bit inputs.

    Args:
        x: (B, L, D) or (N, D); float32, float64, bfloat16 or float16.
        expert_ids: (B, k) or (N, k), int64 or int32.
        gates: (B, k) or (N, k), floating point; weighs the experts in fp32 (fp64 for fp64 ``x``).
        down_weight: (E, R, D), as in ``nn.Linear``; of ``x``'s dtype, like the next three. Under autocast all are cast.
        down_bias: (E, R).
        up_weight: (E, D, R).
        up_bias: (E, D).
        scale: factor on every expert's output.
        dropout_p: probability in [0, 1) of zeroing a bottleneck element; the others grow by ``1 / (1 − p)``. The mask comes from
            one number of torch's default generator of x's device, and is the same on every backend for the same number; replays
            of a CUDA graph draw new ones. 0 draws nothing.
        residual: same shape as ``x``, any floating dtype; added in the same pass when its dtype is ``x``'s.
        backend: see :func:`cl_kernels.backends`; chosen by device when None. float64 on CUDA runs on
            the reference, with a warning.

    Returns:
        The shape of ``x``; the dtype of ``residual`` if given, else of ``x`` (under autocast, the autocast dtype).

    Raises:
        ValueError: shapes or devices do not fit, ``dropout_p`` is outside [0, 1), or the backend cannot run the call.
        TypeError: an argument is not a tensor of one of those dtypes.

    Source: MoE-Adapters4CL (Yu et al., CVPR 2024), equations 2 to 4.
    """
    weights = {"down_weight": down_weight, "down_bias": down_bias, "up_weight": up_weight, "up_bias": up_bias}
    return with_hidden(
        x, expert_ids, gates, weights, scale=scale, dropout_p=dropout_p, residual=residual, backend=backend
    )[0]


def with_hidden(
    x: Tensor,
    expert_ids: Tensor,
    gates: Tensor,
    weights: dict[str, Tensor],
    *,
    scale: float,
    dropout_p: float,
    residual: Tensor | None,
    backend: str | None,
    save_hidden: bool = False,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """:func:`moe_adapter`, and what its backward pass needs: the bottleneck (B, k, L, R) after ReLU and dropout.

    Args:
        x: (B, L, D) or (N, D).
        expert_ids: (B, k) or (N, k).
        gates: the same shape.
        weights: the four weights by name.
        scale: as there.
        dropout_p: as there.
        residual: as there.
        backend: as there.
        save_hidden: keep the bottleneck even where autograd records nothing. It has zero elements where nobody needs it, and is
            None on the reference.
        seed: of the dropout, int64 () or :func:`~cl_kernels.moe_adapter.dropout.seed_of_part` on x's device; drawn when None.

    Raises:
        ValueError: as there.
        TypeError: as there.
    """
    _check_types(x, expert_ids, gates, weights, residual)
    _check_shapes(x, expert_ids, gates, weights, residual)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: got {dropout_p}, expected a probability in [0, 1)")
    dtype = _autocast_dtype(x)
    _check_dtypes(dtype, x, weights)
    chosen = dispatch.choose("moe_adapter", x.device, backend)
    if chosen == "triton" and dtype == torch.float64:
        chosen = _without_float64(backend)

    compute = torch.float64 if dtype == torch.float64 else torch.float32
    tokens = x.dim() == 2
    inside = residual if residual is not None and residual.dtype == dtype else None
    inputs: tuple[Any, ...] = (
        (x.unsqueeze(1) if tokens else x).to(dtype),
        expert_ids.to(torch.int64),
        gates.to(compute),
        *(weight.to(dtype) for weight in weights.values()),
        inside.unsqueeze(1) if tokens and inside is not None else inside,
        (dropout.draw_seed(x.device) if seed is None else seed) if dropout_p > 0.0 else None,
        float(scale),
        float(dropout_p),
    )
    hidden = None
    if chosen == "reference":
        out = reference.moe_adapter(*inputs)
    else:
        differentiable = (x, gates, inside, *weights.values())
        recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiable)
        out, hidden = autograd.operator(chosen)(*inputs, save_hidden or recorded)
    if tokens:
        out = out.squeeze(1)
    return out if residual is None or inside is not None else (residual + out).to(residual.dtype), hidden


def _autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that ``nn.Linear`` would work in: float64 is left alone by autocast."""
    if torch.is_autocast_enabled(dispatch.autocast_device(x.device)) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(dispatch.autocast_device(x.device))
    return x.dtype


def _without_float64(backend: str | None) -> str:
    """Triton's matrix products have no portable float64: such inputs are for checking, and run on the reference."""
    if backend == "triton":
        raise ValueError("backend='triton' cannot run moe_adapter on float64 x; use backend='reference'")
    warnings.warn(
        "cl_kernels: moe_adapter runs on its plain PyTorch reference for float64 x on CUDA",
        RuntimeWarning,
        stacklevel=3,
    )
    return "reference"


def _check_types(
    x: Tensor, expert_ids: Tensor, gates: Tensor, weights: dict[str, Tensor], residual: Tensor | None
) -> None:
    floating = {"x": x, "gates": gates, **weights} | ({} if residual is None else {"residual": residual})
    for name, tensor in floating.items():
        if not isinstance(tensor, Tensor) or tensor.dtype not in _DTYPES:
            given = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name}: got {given}, expected a float32, float64, bfloat16 or float16 tensor")
    if not isinstance(expert_ids, Tensor) or expert_ids.dtype not in (torch.int64, torch.int32):
        given = expert_ids.dtype if isinstance(expert_ids, Tensor) else type(expert_ids).__name__
        raise TypeError(f"expert_ids: got {given}, expected an int64 or int32 tensor")
    for name, tensor in {"expert_ids": expert_ids, **floating}.items():
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}: expected one device for all")


def _check_shapes(
    x: Tensor, expert_ids: Tensor, gates: Tensor, weights: dict[str, Tensor], residual: Tensor | None
) -> None:
    shape = tuple(x.shape)
    if x.dim() not in (2, 3):
        raise ValueError(f"x: got shape {shape}, expected (B, L, D) or (N, D)")
    if expert_ids.dim() != 2 or expert_ids.shape[0] != shape[0]:
        raise ValueError(f"expert_ids: got shape {tuple(expert_ids.shape)} for x {shape}, expected ({shape[0]}, k)")
    if gates.shape != expert_ids.shape:
        raise ValueError(
            f"gates: got shape {tuple(gates.shape)} for expert_ids {tuple(expert_ids.shape)}, expected the same"
        )
    down = weights["down_weight"]
    if down.dim() != 3 or down.shape[2] != shape[-1]:
        raise ValueError(f"down_weight: got shape {tuple(down.shape)} for x {shape}, expected (E, R, {shape[-1]})")
    experts, rank, width = down.shape
    expected = {"down_bias": (experts, rank), "up_weight": (experts, width, rank), "up_bias": (experts, width)}
    for name, wanted in expected.items():
        if weights[name].shape != wanted:
            raise ValueError(
                f"{name}: got shape {tuple(weights[name].shape)} for down_weight {tuple(down.shape)}, expected {wanted}"
            )
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual: got shape {tuple(residual.shape)} for x {shape}, expected the same")


def _check_dtypes(dtype: torch.dtype, x: Tensor, weights: dict[str, Tensor]) -> None:
    if dtype != x.dtype or torch.is_autocast_enabled(dispatch.autocast_device(x.device)):
        return
    for name, weight in weights.items():
        if weight.dtype != dtype:
            raise TypeError(f"{name}: got {weight.dtype} for x of {dtype}, expected the same (or autocast)")
