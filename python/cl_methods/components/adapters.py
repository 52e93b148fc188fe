"""Mixtures of adapters mounted beside the MLPs of a CLIP model, instance by instance, and taken off again."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from cl_kernels.moe_adapter import dropout
from cl_kernels.nn import AdapterExperts
from cl_methods import lazy_open_clip
from cl_methods.backbone import Backbone
from cl_methods.backbone.micro_batches import Part, current_part
from cl_methods.backbone.read_out import current_read_out, leaves_out, read_parts
from cl_methods.backbone.self_attention import self_attention, takes_self_attention
from cl_methods.backbone.text_trees import open_clip_blocks, reads_trees

_states: ContextVar[dict[int, tuple[int | None, bool, bool]]] = ContextVar("adapters", default={})  # noqa: B039  # never changed in place


class BlockAdapters(AdapterExperts):
    """Experts of one residual block and one router per task, the routers added as tasks come.

    ``y = x + r + Σ_{e ∈ top-k} g_e · scale · A_e(x)``, see :class:`cl_kernels.nn.AdapterExperts`. Routers start at zero.

    Attributes:
        routers, noises: per task (D, E).
        usage: (E,) int64, activations (sample x step) since :meth:`reset_usage`.
        step_usage: (E,) int64, the same since :meth:`MountedAdapters.end_backward`.
        frozen: (E,) bool, experts that no longer train.
        updates: (E,) bool, experts that the coming optimiser step may change.
        last: whether the block is the last of its tower, of whose output one position is read.

    Args:
        width: D.
        experts: E.
        bottleneck: R.
        top_k: experts per sample.
        scale: factor of the branch.
        dropout: probability after the ReLU, in training.
    """

    step_usage: Tensor
    frozen: Tensor
    updates: Tensor

    def __init__(self, width: int, experts: int, bottleneck: int, top_k: int, scale: float, dropout: float) -> None:
        super().__init__(width, experts, bottleneck, top_k, scale, dropout)
        self.routers, self.noises = nn.ParameterList(), nn.ParameterList()
        self.register_buffer("step_usage", torch.zeros(experts, dtype=torch.int64))
        self.register_buffer("frozen", torch.zeros(experts, dtype=torch.bool))
        self.register_buffer("updates", torch.zeros(experts, dtype=torch.bool), persistent=False)
        self.last = False

    def add_routers(self, count: int) -> None:
        """Create routers, all zero, until there are ``count``."""
        experts, _, width = self.down_weight.shape
        while len(self.routers) < count:
            self.routers.append(nn.Parameter(self.down_weight.new_zeros(width, experts)))
            self.noises.append(nn.Parameter(self.down_weight.new_zeros(width, experts)))

    def forward(self, x: Tensor, added: Tensor, task: int, *, training: bool, noise: bool) -> Tensor:
        """``x + added`` (B, L, D) plus the branch on ``x``, routed by router ``task``; no host synchronisation.

        Args:
            x: (B, L, D), adapter input.
            added: (B, L, D), what the MLP beside the adapters gave.
            task: index of the router.
            training: whether dropout is on and activations are counted in ``step_usage``.
            noise: whether gates are noisy.
        """
        part = current_part()
        drawn = {} if part is None else self._draw(x, part, training=training, noise=noise)
        router = self.routers[task], self.noises[task]
        out, usage = self.mix(x, added, *router, training=training, noisy=noise, add_input=True, **drawn)
        if training and not (part is not None and part.repeated):
            self.step_usage += usage
        return out

    def _draw(self, x: Tensor, part: Part, *, training: bool, noise: bool) -> dict[str, Tensor]:
        """The random numbers of a part ``x`` (n, L, D) of a batch, in the order in which a whole batch draws them."""
        drawn = {}
        if noise:
            shape = part.total, len(self.down_weight)
            whole = part.draw(self, "noise", lambda: torch.randn(shape, dtype=x.dtype, device=x.device))
            drawn["noise"] = part.of(whole)
        if training and self.dropout > 0:
            seed = part.draw(self, "seed", lambda: dropout.draw_seed(x.device))
            drawn["seed"] = dropout.seed_of_part(seed, part.first)
        return drawn

    def reset_usage(self) -> None:
        """Forget all activations."""
        self.usage.zero_()
        self.step_usage.zero_()

    @torch.no_grad()
    def freeze_most_used(self, count: int) -> Tensor:
        """Freeze the ``count`` experts with most activations, frozen ones included; their ids, most used first."""
        chosen = self.usage.topk(count).indices
        self.frozen[chosen] = True
        return chosen


class MountedAdapters(nn.Module):
    """:class:`BlockAdapters` on every residual block of both towers of one CLIP model, parallel to the MLP.

    ``x₁ = x + Attn(LN₁ x)``, ``out = x₁ + MLP(LN₂ x₁) + Σ_e g_e A_e(x₁)``: the adapters read x₁ without LayerNorm.
    Nothing but the ``forward`` of these block instances changes: the model's state-dict names stay, :meth:`remove` undoes it,
    and outside :meth:`active` the blocks run their own code. Which router is active is a context variable, so that activations that
    are computed again (:mod:`cl_methods.backbone.micro_batches`) go the same way.

    Source: Yu et al., "Boosting Continual Learning of Vision-Language Models via Mixture-of-Experts Adapters", CVPR 2024.

    Args:
        backbone: gets the adapters.
        experts, bottleneck, top_k, scale, dropout: see :class:`BlockAdapters`.
        text: whether the text tower gets adapters too.

    Raises:
        TypeError: a block is not open_clip's residual attention block.
        ValueError: a block already carries adapters, or ``top_k`` exceeds ``experts``.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        experts: int,
        bottleneck: int = 64,
        top_k: int = 2,
        scale: float = 0.1,
        dropout: float = 0.1,
        text: bool = True,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= experts:
            raise ValueError(f"top_k: expected 1 to experts = {experts}, got {top_k}")
        self._hosts = residual_blocks(backbone, text)
        self.blocks = nn.ModuleDict(
            {
                name: BlockAdapters(block.ln_2.weight.shape[0], experts, bottleneck, top_k, scale, dropout)
                for name, block in self._hosts.items()
            }
        ).to(backbone.device)
        last = {name.partition("_")[0]: name for name in self._hosts}.values()
        for name, adapters in self.blocks.items():
            assert isinstance(adapters, BlockAdapters)
            adapters.last = name in last
        for name, block in self._hosts.items():
            block.forward = functools.partial(_adapted_forward, self, self.blocks[name], block)

    def remove(self) -> None:
        """Take the adapters off; the blocks run as they did before."""
        for block in self._hosts.values():
            del block.forward
        self._hosts = {}

    @contextmanager
    def active(self, task: int | None, *, training: bool = False, noise: bool = False) -> Iterator[None]:
        """Inside, the blocks use router ``task``; None bypasses the adapters exactly.

        Args:
            task: index of the router.
            training: dropout, and counting of activations.
            noise: noisy gates.
        """
        token = _states.set({**_states.get(), id(self): (task, training, noise)})
        try:
            yield
        finally:
            _states.reset(token)

    @torch.no_grad()
    def end_backward(self) -> None:
        """Before the optimiser step: experts that got samples and are not frozen may change. Starts a new step's counts."""
        blocks = list(self.each())
        steps = [block.step_usage for block in blocks]
        updates = (torch.stack(steps) > 0) & ~torch.stack([block.frozen for block in blocks])
        torch._foreach_copy_([block.updates for block in blocks], list(updates.unbind()))
        torch._foreach_add_([block.usage for block in blocks], steps)
        torch._foreach_zero_(steps)

    @property
    def state(self) -> tuple[int | None, bool, bool]:
        """The arguments of the innermost :meth:`active`."""
        return _states.get().get(id(self), (None, False, False))

    def each(self) -> Iterator[BlockAdapters]:
        """The adapters of every block, image tower first."""
        for block in self.blocks.values():
            assert isinstance(block, BlockAdapters)
            yield block


def residual_blocks(backbone: Backbone, text: bool) -> dict[str, Any]:
    """Blocks on which nothing is mounted yet, by name: ``visual_0``, …, and ``text_0``, … if ``text``.

    Raises:
        TypeError: a block is not open_clip's residual attention block.
        ValueError: a block already carries something.
    """
    towers = {"visual": backbone.model.visual} | ({"text": backbone.text_tower} if text else {})
    found: dict[str, Any] = {}
    for tower_name, tower in towers.items():
        blocks = getattr(getattr(tower, "transformer", None), "resblocks", None)
        if blocks is None:
            raise TypeError(f"model: the {tower_name} tower of {backbone.name} has no open_clip residual blocks")
        for index, block in enumerate(blocks):
            if type(block) not in open_clip_blocks():
                raise TypeError(f"model: expected open_clip residual blocks, got {type(block).__name__}")
            if "forward" in vars(block):
                raise ValueError(f"model: block {index} of the {tower_name} tower already carries adapters")
            found[f"{tower_name}_{index}"] = block
    return found


@reads_trees
def _adapted_forward(
    mounted: MountedAdapters,
    adapters: nn.Module,
    block: Any,
    x: Tensor,
    k_x: Tensor | None = None,
    v_x: Tensor | None = None,
    attn_mask: Tensor | None = None,
) -> Tensor:
    """The forward of an open_clip block with the adapters beside its MLP."""
    task, training, noise = mounted.state
    if task is None:
        return type(block).forward(block, x, attn_mask=attn_mask)
    place = current_read_out() if adapters.last and training and torch.is_grad_enabled() else None
    if place is not None and leaves_out(block, attn_mask):
        x, added = read_parts(block, x, attn_mask, place)
        return adapters(x, added, task, training=training, noise=noise)[:, -1:]
    compiled = vars(block).get("compiled_parts")
    parts = block_parts if compiled is None or not torch.is_grad_enabled() else compiled
    x, added = parts(block, x, attn_mask)
    return adapters(x, added, task, training=training, noise=noise)


def block_parts(block: Any, x: Tensor, attn_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """What adapters read and what is added to it beside them: ``x₁ = x + Attn(LN₁ x)`` and ``MLP(LN₂ x₁)``.

    Args:
        block: open_clip's residual block.
        x: (B, L, D).
        attn_mask: (L, L) or (B heads, L, L), added.

    Returns:
        Two tensors (B, L, D).
    """
    if isinstance(block, lazy_open_clip.transformer.ResidualAttentionBlock):
        if takes_self_attention(block.attn):
            attended = self_attention(block.ln_1(x), block.attn, attn_mask)
        else:
            attended = block.attention(q_x=block.ln_1(x), attn_mask=attn_mask)
    else:
        attended = block.ln_attn(block.attn(block.ln_1(x), attn_mask=attn_mask))
    x = x + block.ls_1(attended)
    return x, block.ls_2(block.mlp(block.ln_2(x)))


def carries_adapters(block: nn.Module) -> bool:
    """Whether ``block`` is one that :class:`MountedAdapters` are mounted on."""
    own = vars(block).get("forward")
    return isinstance(own, functools.partial) and own.func is _adapted_forward
