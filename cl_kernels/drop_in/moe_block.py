"""The residual attention block of MoE-Adapters4CL and its relatives, with router and experts in one kernel."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_kernels.drop_in import experts
from cl_kernels.drop_in.patch import Patch, Patched
from cl_kernels.drop_in.probe import COUNTERS, relative_difference, undisturbed
from cl_kernels.moe_adapter import moe_adapter
from cl_kernels.routed import routed_adapter
from cl_kernels.routed_block import routed_block, serves

_PARTS = ("attention", "ln_1", "ln_2", "mlp", "adaptmlp_list", "top_k", "is_train")
Router = tuple[Tensor, Tensor, str | None]


class MoEBlock(Patched):
    """``x₁ + MLP(LN₂ x₁) + Σ_{e ∈ top-k} g_e A_e(x₁)`` with ``x₁ = x + Attn(LN₁ x)``; x is (L, B, D), routed by token 0 of x₁.

    Subclasses say which router is active. Where none is, or the experts are not all in the same mode, the class's own forward runs.
    """

    _globals: dict[str, Any]

    def _router(self) -> Router | None:
        """Gate and noise weights (D, E) and the attribute that counts activations, or None to run the block's own forward."""
        raise NotImplementedError

    def forward(self: Any, x: Tensor) -> Tensor:
        """The block's output for ``x`` (L, B, D)."""
        router = self._router()
        modes = {expert.training for expert in self.adaptmlp_list}
        if router is None or len(modes) > 1:
            return self._cl_kernels_original.forward(self, x)
        w_gate, w_noise, counter = router
        x = x + self.attention(self.ln_1(x))
        autocast = torch.is_autocast_enabled(x.device.type)
        # Drawn where, in the dtype and in the order in which the published code draws it.
        dtype = torch.get_autocast_dtype(x.device.type) if autocast and x.dtype != torch.float64 else x.dtype
        noise = None
        if getattr(self, "noisy_gating", True) and self.is_train:
            noise = torch.randn(x.shape[1], w_gate.shape[1], dtype=dtype, device=x.device)
        added = self.mlp(self.ln_2(x))
        exact = noise is not None and not autocast and x.dtype in (torch.float32, torch.float64)
        out, usage = self._mix(x.permute(1, 0, 2), added.permute(1, 0, 2), (w_gate.to(x), w_noise.to(x), noise), exact)
        if counter is not None:
            self._count(counter, usage)
        return out.permute(1, 0, 2)

    def _mix(
        self: Any, x: Tensor, added: Tensor, router: tuple[Tensor, Tensor, Tensor | None], exact: bool
    ) -> tuple[Tensor, Tensor]:
        """``(x + added) + Σ_e g_e A_e(x)`` (B, L, D) and how many samples chose each expert (E,).

        ``exact`` says whether the choice is the published one however logits are computed, see :func:`_plain_gating`.
        """
        parameters = experts.tensors(self.adaptmlp_list)
        first = self.adaptmlp_list[0]
        options = {"scale": first.scale, "dropout_p": first.dropout if first.training else 0.0}
        w_gate, w_noise, noise = router
        if exact and noise is not None and serves(x, (added, w_gate, w_noise, noise, *parameters)):
            return routed_block(x, added, w_gate, w_noise, noise, parameters, k=self.top_k, **options)
        base, chosen = x + added, experts.Chosen()
        stacks = experts.stack(parameters, chosen)
        if exact:
            out, usage = routed_adapter(
                x, w_gate, w_noise, *stacks, k=self.top_k, noise=noise, residual=base, **options
            )
        else:
            gates, ids = _plain_gating(x[:, 0], *router, self.top_k)
            mixed = moe_adapter(x, ids, gates, *stacks, **options)
            out = base + mixed.to(torch.promote_types(mixed.dtype, torch.float32))
            usage = _usage(ids, w_gate.shape[1])
        chosen.set(usage)
        return out, usage

    def _count(self: Any, name: str, usage: Tensor) -> None:
        counts = self.__dict__[name]
        if counts.device == usage.device:
            counts += usage
            return
        # Adding to a tensor of the host would wait for the device at every block; reading the counts does.
        pending = self.__dict__["_pending"].setdefault(name, {})
        if usage.device not in pending:
            pending[usage.device] = torch.zeros_like(usage)
        pending[usage.device] += usage

    def _settle(self: Any, name: str) -> Tensor:
        if name not in self.__dict__:
            raise AttributeError(name)
        counts = self.__dict__[name]
        for usage in self.__dict__.get("_pending", {}).get(name, {}).values():
            counts += usage.to(counts.device)
            usage.zero_()
        return counts

    @property
    def choose_map_image(self) -> Tensor:
        """(E,) how often each expert was chosen by an image."""
        return self._settle("choose_map_image")

    @choose_map_image.setter
    def choose_map_image(self: Any, value: Tensor) -> None:
        """Replace the counts by ``value`` (E,)."""
        self._settle("choose_map_image")
        self.__dict__["choose_map_image"] = value

    @property
    def choose_map_text(self) -> Tensor:
        """(E,) how often each expert was chosen by a text."""
        return self._settle("choose_map_text")

    @choose_map_text.setter
    def choose_map_text(self: Any, value: Tensor) -> None:
        """Replace the counts by ``value`` (E,)."""
        self._settle("choose_map_text")
        self.__dict__["choose_map_text"] = value

    def _before_undo(self: Any) -> None:
        for name in COUNTERS:
            if name in self.__dict__:
                self._settle(name)
        self.__dict__.pop("_pending", None)

    def _state(self: Any) -> dict[str, Any]:
        for name in self.__dict__.get("_pending", {}):
            self._settle(name)
        return {key: value for key, value in self.__dict__.items() if key != "_pending"}


def _plain_gating(x: Tensor, w_gate: Tensor, w_noise: Tensor, noise: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """Gates and expert ids (B, k) by the operations of the published code, for what depends on them.

    Without noise logits can be equal, as those of an untrained router are, and which expert wins is then ``torch.topk``'s choice
    among k + 1. Under autocast and in 16 bits logits are rounded before they are compared.
    """
    logits = x @ w_gate
    if noise is not None:
        logits = logits + noise * (F.softplus(x @ w_noise) + 0.01)
    values, ids = logits.topk(min(k + 1, logits.shape[1]), dim=1)
    return values[:, :k].softmax(1), ids[:, :k]


def _usage(ids: Tensor, experts_: int) -> Tensor:
    ids = ids.flatten()
    return torch.zeros(experts_, dtype=torch.int64, device=ids.device).index_add_(0, ids, torch.ones_like(ids))


def patch_blocks(
    patch: Patch, model: nn.Module, variant: Callable[[Any, dict[str, Any]], type[MoEBlock] | str]
) -> Patch:
    """Patch every block of ``model`` for which ``variant(block, globals of its forward)`` is a class, not a reason why not."""
    for name, block in model.named_modules():
        if not all(hasattr(block, part) for part in _PARTS):
            continue
        if isinstance(block, Patched):
            patch.left[name] = "already patched"
            continue
        variables = inspect.unwrap(type(block).forward).__globals__
        behaviour = variant(block, variables)
        reason = behaviour if isinstance(behaviour, str) else experts.why_not(block.adaptmlp_list)
        if isinstance(behaviour, str) or reason is not None:
            patch.left[name] = str(reason)
            continue
        expected = _probe(block)
        patch.change_class(name, block, behaviour, _globals=variables)
        block.__dict__["_pending"] = {}
        difference = relative_difference(expected, _probe(block))
        if not difference < _AGREES:
            patch.take_back(f"its forward computes something else: outputs differ by {difference:.1e} of the largest")
    return patch


_AGREES = 1e-2
"""A block that is not the published one differs by far more; the published one under autocast or in 16 bits by less."""


def _probe(block: Any) -> Tensor:
    """The block's output for random tokens, routers and experts, without dropout; nothing of the block or of torch's state changes.

    Experts start as zero functions, so that with the weights as they are any two mixtures would agree.
    """
    like = next(block.ln_1.parameters())
    mask = getattr(block, "attn_mask", None)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(like)

    places = [
        (module._parameters, key, p)
        for name, module in block.named_modules()
        for key, p in module._parameters.items()
        if p is not None and any(part in f"{name}.{key}" for part in ("adaptmlp", "router", "noise"))
    ]
    x = normal(2, 5 if mask is None else mask.shape[-1], like.shape[-1]).permute(1, 0, 2)
    try:
        # Not torch.func.functional_call: it leaves plain tensors in the place of the last expert, which has two names.
        for parameters, key, p in places:
            parameters[key] = nn.Parameter(0.1 * normal(*p.shape), requires_grad=False)
        with undisturbed(block, like):
            return block(x).float()
    finally:
        for parameters, key, p in places:
            parameters[key] = p
