"""Noisy top-k gating: which experts a sample goes to, and with which weights."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from cl_kernels import dispatch
from cl_kernels.gating import autograd, reference

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def top_k_gating(
    x: Tensor,
    w_gate: Tensor,
    w_noise: Tensor | None = None,
    *,
    k: int,
    noise: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``gates = softmax(top_k(ℓ))`` with ``ℓ = x w_gate + noise ⊙ (softplus(x w_noise) + 0.01)``.

    The k largest logits of a sample are kept, by decreasing value and of equal ones the lower expert id first. The host never
    waits for the device. Logits and gates are fp64 for fp64 ``x`` and fp32 otherwise, under autocast too. Differentiable in
    ``x``, ``w_gate`` and ``w_noise``, through the kept logits; ``noise`` is a constant.

    Args:
        x: (B, D) router input, one row per sample or token; float32, float64, bfloat16 or float16.
        w_gate: (D, E) router weight.
        w_noise: (D, E) weight of the noise's standard deviation, or None.
        k: number of experts per row, 1 ≤ k ≤ E.
        noise: (B, E) standard normal, or None for the clean gate.
        backend: see :func:`cl_kernels.backends`; chosen by device when None. ``"triton"`` holds at most 128 experts, 32 in
            float64, in its tiles: more run on the reference on CUDA, with a warning.

    Returns:
        ``gates`` (B, k) fp32 or fp64, rows sum to one; ``expert_ids`` (B, k) int64 by decreasing gate; ``usage`` (E,) int64, how
        many rows chose each expert.

    Raises:
        ValueError: shapes or devices do not fit, k is out of range, noise comes without ``w_noise``, or the backend cannot run it.
        TypeError: an argument is not a floating-point tensor, or k not an integer.

    Source: Shazeer et al., 2017, section 2.1; MoE-Adapters (Yu et al., 2024), equations 4 to 6.
    """
    _check(x, w_gate, w_noise, k, noise)
    noise = None if noise is None else noise.detach()
    if noise is None:
        w_noise = None
    chosen = dispatch.choose("top_k_gating", x.device, backend)
    if chosen == "triton" and not autograd.fused(x, w_gate.shape[1]):
        chosen = _without_tiles(backend, x, w_gate.shape[1])
    with torch.autocast(dispatch.autocast_device(x.device), enabled=False):
        if chosen == "reference":
            return reference.top_k_gating(x, w_gate, w_noise, noise, k)
        return autograd.operator(chosen)(x, w_gate, w_noise, noise, k)


def _without_tiles(backend: str | None, x: Tensor, experts: int) -> str:
    """Large products and a sort are torch's own trade: more experts than a tile holds run on the reference."""
    most = autograd.FUSED_EXPERTS_FLOAT64 if x.dtype == torch.float64 else autograd.FUSED_EXPERTS
    limit = f"{experts} experts of {x.dtype}, only on up to {most}"
    if backend == "triton":
        raise ValueError(f"backend='triton' cannot run top_k_gating on {limit}; use backend='reference'")
    warnings.warn(
        f"cl_kernels: top_k_gating runs on its plain PyTorch reference on CUDA: its kernel cannot run on {limit}",
        RuntimeWarning,
        stacklevel=3,
    )
    return "reference"


def _check(x: Tensor, w_gate: Tensor, w_noise: Tensor | None, k: int, noise: Tensor | None) -> None:
    for name, tensor in (("x", x), ("w_gate", w_gate), ("w_noise", w_noise), ("noise", noise)):
        if tensor is None and name in ("w_noise", "noise"):
            continue
        if not isinstance(tensor, Tensor) or tensor.dtype not in _DTYPES:
            given = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name}: got {given}, expected a float32, float64, bfloat16 or float16 tensor")
        if tensor.dim() != 2:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected two dimensions")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}: expected one device")
    if w_gate.shape[0] != x.shape[1]:
        raise ValueError(f"w_gate: got shape {tuple(w_gate.shape)}, expected ({x.shape[1]}, E) for x {tuple(x.shape)}")
    experts = w_gate.shape[1]
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k: got {type(k).__name__}, expected an integer")
    if not 1 <= k <= experts:
        raise ValueError(f"k: got {k}, expected 1 to {experts} for w_gate {tuple(w_gate.shape)}")
    if w_noise is not None and w_noise.shape != w_gate.shape:
        raise ValueError(f"w_noise: got shape {tuple(w_noise.shape)}, expected that of w_gate, {tuple(w_gate.shape)}")
    if noise is not None:
        if w_noise is None:
            raise ValueError("noise was given without w_noise, which sets its standard deviation: pass both or neither")
        if noise.shape != (x.shape[0], experts):
            raise ValueError(
                f"noise: got shape {tuple(noise.shape)}, expected {(x.shape[0], experts)} for x {tuple(x.shape)} and "
                f"w_gate {tuple(w_gate.shape)}"
            )
