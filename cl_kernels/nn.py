"""Modules around the operations: a mixture of adapters with its routers, the distillation loss, an average of a model's weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cl_kernels.distill_kl import distill_kl
from cl_kernels.gating import top_k_gating
from cl_kernels.moe_adapter import moe_adapter
from cl_kernels.weight_average import average_


class AdapterExperts(nn.Module):
    """The experts of a mixture of adapters, ``A_e(x) = dropout(relu(x W_down[e]ᵀ + b_down[e])) W_up[e]ᵀ + b_up[e]``.

    Experts start as zero functions: ``W_down`` Kaiming-uniform with a = √5, the rest 0. Routers belong to whoever mixes them.

    Attributes:
        down_weight (E, R, D), down_bias (E, R), up_weight (E, D, R), up_bias (E, D): the experts.
        usage: (E,) int64, a count for whoever mixes them.

    Args:
        width: D, the tokens' features.
        experts: E.
        bottleneck: R.
        k: experts per sample.
        scale: factor on every expert's output.
        dropout: probability of zeroing a bottleneck element in training.

    Raises:
        ValueError: k is not in 1 … experts.

    Source: MoE-Adapters (Yu et al., CVPR 2024), section 3.2 and its public code for the initial values.
    """

    usage: Tensor

    def __init__(self, width: int, experts: int, bottleneck: int, k: int, scale: float, dropout: float) -> None:
        super().__init__()
        if not 1 <= k <= experts:
            raise ValueError(f"k: got {k}, expected 1 to {experts} experts")
        self.k, self.scale, self.dropout = k, scale, dropout
        bound = 1 / math.sqrt(width)  # what Kaiming-uniform with a = √5 comes to
        self.down_weight = nn.Parameter(torch.empty(experts, bottleneck, width).uniform_(-bound, bound))
        self.down_bias = nn.Parameter(torch.zeros(experts, bottleneck))
        self.up_weight = nn.Parameter(torch.zeros(experts, width, bottleneck))
        self.up_bias = nn.Parameter(torch.zeros(experts, width))
        self.register_buffer("usage", torch.zeros(experts, dtype=torch.int64))

    @property
    def experts(self) -> list[nn.Parameter]:
        """The four stacked tensors, experts along dimension 0."""
        return [self.down_weight, self.down_bias, self.up_weight, self.up_bias]

    def mix(
        self, x: Tensor, residual: Tensor | None, w_gate: Tensor, w_noise: Tensor, *, training: bool, noisy: bool
    ) -> tuple[Tensor, Tensor]:
        """``residual + Σ_{e ∈ top-k} g_e · scale · A_e(x)`` with the experts that a router chooses from token 0 of each sample.

        Differentiable in ``x``, ``residual``, the router and the experts. The host never waits for the device.

        Args:
            x: (B, L, D) tokens of each sample.
            residual: (B, L, D), what the output is added to, or None.
            w_gate, w_noise: (D, E) the router.
            training: whether dropout is on.
            noisy: whether the gates are noisy.

        Returns:
            The mixture (B, L, D), and how many samples chose each expert (E,) int64.

        Raises:
            ValueError: shapes do not fit.
        """
        noise = torch.randn(len(x), w_gate.shape[1], dtype=x.dtype, device=x.device) if noisy else None
        gates, expert_ids, usage = top_k_gating(x[:, 0], w_gate, w_noise if noisy else None, k=self.k, noise=noise)
        dropout = self.dropout if training else 0.0
        out = moe_adapter(x, expert_ids, gates, *self.experts, scale=self.scale, dropout_p=dropout, residual=residual)
        return out, usage


class MoEAdapter(AdapterExperts):
    """A mixture of adapters with one router per task: ``residual + Σ_{e ∈ top-k} g_e · scale · A_e(x)``.

    The router reads token 0 of a sample, whose experts then serve all of its tokens. Routers start at zero. In training mode gates
    are noisy, dropout is on, and :attr:`usage` counts how often each expert was chosen.

    Args:
        width: D, the tokens' features.
        experts: E.
        bottleneck: R.
        k: experts per sample.
        scale: factor on every expert's output.
        dropout: probability of zeroing a bottleneck element in training.
        routers: number of tasks.

    Raises:
        ValueError: k is not in 1 … experts.

    Source: MoE-Adapters (Yu et al., CVPR 2024), section 3.2.
    """

    def __init__(
        self,
        width: int,
        experts: int,
        *,
        bottleneck: int = 64,
        k: int = 2,
        scale: float = 0.1,
        dropout: float = 0.1,
        routers: int = 1,
    ) -> None:
        super().__init__(width, experts, bottleneck, k, scale, dropout)
        self.w_gate = nn.Parameter(torch.zeros(routers, width, experts))
        self.w_noise = nn.Parameter(torch.zeros(routers, width, experts))

    def forward(self, x: Tensor, residual: Tensor | None = None, *, task: int = 0) -> Tensor:
        """The adapters' output for ``x`` (B, L, D), added to ``residual`` (B, L, D) if given; the shape of ``x``.

        Args:
            x: tokens of each sample.
            residual: what the output is added to.
            task: which router.

        Raises:
            ValueError: shapes do not fit.
            IndexError: there is no such router.
        """
        training = self.training
        out, usage = self.mix(x, residual, self.w_gate[task], self.w_noise[task], training=training, noisy=training)
        if training:
            self.usage += usage
        return out


class DistillKL(nn.Module):
    """:func:`cl_kernels.distill_kl` with its options fixed: ``T² · mean Σ_j −p_t[j] log p_s[j]``, ``p = softmax(logits / T)``.

    Args:
        temperature: ``T > 0``.
        dim: the dimension of the softmax.
        target: ``"cross_entropy"`` or ``"kl"``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Source: Hinton et al., 2015; ZSCL (Zheng et al., 2023), section 3.2.
    """

    def __init__(
        self, temperature: float = 2.0, *, dim: int = -1, target: str = "cross_entropy", reduction: str = "mean"
    ) -> None:
        super().__init__()
        self.temperature, self.dim, self.target, self.reduction = temperature, dim, target, reduction

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        """The loss of two tensors of the same shape such as (N, M), differentiable in the student's.

        Args:
            student_logits: any shape.
            teacher_logits: the same shape.
            sample_weight: broadcasts to the shape without ``dim``.

        Raises:
            ValueError: shapes or options do not fit.
            TypeError: a tensor is not floating point.
        """
        return distill_kl(
            student_logits,
            teacher_logits,
            temperature=self.temperature,
            dim=self.dim,
            target=self.target,
            sample_weight=sample_weight,
            reduction=self.reduction,
        )


class WeightAverager:
    """An average of a model's weights over time: running mean or exponential, ``a ← a + w · (θ − a)`` in place.

    Starts as a copy of the model, which counts as the first snapshot. :meth:`update` uses ``w = 1/(snapshots + 1)`` (so the
    average is the plain mean of all snapshots), or ``w = 1 − decay``; :meth:`interpolate` any ``w``. Floating-point parameters and
    buffers are averaged, all others copied from the latest model. Parameters that are tied appear once.

    Attributes:
        snapshots: models in the average, the first included; a Python number, so no device is asked for it.
        tensors: the averages by their state-dict names.

    Args:
        model: the start of the average; later models must have the same names and shapes.
        decay: of an exponential average, in [0, 1); None for the running mean.
        dtype: of the floating-point averages; float32 keeps those of 16-bit models from standing still, None is the model's own.

    Raises:
        ValueError: decay is out of range.

    Source: Izmailov et al., 2018 (running mean); ZSCL (Zheng et al., 2023), section 3.3; Wortsman et al., 2022 (interpolation).
    """

    def __init__(
        self, model: nn.Module, *, decay: float | None = None, dtype: torch.dtype | None = torch.float32
    ) -> None:
        if decay is not None and not 0.0 <= decay < 1.0:
            raise ValueError(f"decay: got {decay}, expected a number in [0, 1) or None for the running mean")
        self.decay = decay
        self.snapshots = 1
        self.tensors = {
            name: tensor.detach().to(dtype or tensor.dtype, copy=True) if tensor.is_floating_point() else tensor.clone()
            for name, tensor in _named_tensors(model).items()
        }

    def update(self, model: nn.Module) -> None:
        """Take the model's weights in as the next snapshot.

        Raises:
            ValueError: the model's names or shapes differ from the first one's.
        """
        self.interpolate(model, 1 / (self.snapshots + 1) if self.decay is None else 1 - self.decay)
        self.snapshots += 1

    @torch.no_grad()
    def interpolate(self, model: nn.Module, weight: float) -> None:
        """Move the average by ``weight`` of the way to the model, without counting a snapshot (WiSE-FT).

        Args:
            model: where to.
            weight: share of the model in the result.

        Raises:
            ValueError: the model's names or shapes differ from the first one's.
        """
        tensors = self._matching(model)
        floating = [name for name, tensor in self.tensors.items() if tensor.is_floating_point()]
        average_([self.tensors[name] for name in floating], [tensors[name].detach() for name in floating], weight)
        for name, tensor in self.tensors.items():
            if not tensor.is_floating_point():
                tensor.copy_(tensors[name])

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Write the average into the model's parameters and buffers, in their dtypes.

        Raises:
            ValueError: the model's names or shapes differ from the first one's.
        """
        for name, tensor in self._matching(model).items():
            tensor.copy_(self.tensors[name])

    def state_dict(self) -> dict[str, Any]:
        """``{"snapshots", "decay", "tensors"}``: plain numbers and tensors, loadable with ``weights_only=True``. Not copies."""
        return {"snapshots": self.snapshots, "decay": self.decay, "tensors": dict(self.tensors)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a :meth:`state_dict`, in this average's dtypes and on its devices.

        Raises:
            ValueError: names, shapes or the decay differ.
        """
        if state["decay"] != self.decay:
            raise ValueError(f"decay: the state was made with {state['decay']}, this average has {self.decay}")
        _check_same(state["tensors"], self.tensors, "state")
        for name, tensor in self.tensors.items():
            tensor.copy_(state["tensors"][name])
        self.snapshots = int(state["snapshots"])

    def _matching(self, model: nn.Module) -> dict[str, Tensor]:
        tensors = _named_tensors(model)
        _check_same(tensors, self.tensors, "model")
        return tensors


def _named_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _check_same(given: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    different = sorted(given.keys() ^ expected.keys())
    if different:
        raise ValueError(f"{what}: its tensors are not those of the average; first difference: {different[0]}")
    for name, tensor in expected.items():
        if given[name].shape != tensor.shape:
            raise ValueError(f"{what}: {name} is {tuple(given[name].shape)}, expected {tuple(tensor.shape)}")
