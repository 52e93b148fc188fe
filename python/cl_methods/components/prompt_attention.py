"""Prompts with an attention of their own, added to the frozen attention of a CLIP model's first blocks."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_methods import lazy_open_clip
from cl_methods.backbone import Backbone
from cl_methods.backbone.micro_batches import current_part
from cl_methods.backbone.text_trees import reads_trees
from cl_methods.components.adapters import residual_blocks

_Injection = tuple[int | Tensor, Tensor | float | None]
_injections: ContextVar[dict[int, _Injection]] = ContextVar("prompts", default={})  # noqa: B039  # never changed in place


def residual_prompt_attention(
    x: Tensor,
    attention: nn.MultiheadAttention,
    keys: Tensor,
    values: Tensor,
    weight: Tensor | float | None = None,
    attn_mask: Tensor | None = None,
) -> Tensor:
    """``out( softmax(q kᵀ/√h + M) v + w softmax(q P_Kᵀ/√h) P_V )`` with q, k, v and out of the frozen ``attention``.

    The prompts are keys and values that are already projected, split among the heads like k and v. They have a soft-max of
    their own and no mask, so with P_V = 0 or w = 0 this is the frozen attention, and a prompt never takes attention from the
    tokens. Nothing is computed in place; no host synchronisation.

    Args:
        x: (B, L, D), query, key and value.
        attention: with ``batch_first``; its parameters are used as they are.
        keys, values: P_K and P_V, (p, D) for all samples or (B, p, D).
        weight: w, scalar or (B,); None is 1.
        attn_mask: M (L, L) or (B heads, L, L), added.

    Returns:
        (B, L, D), differentiable in ``x``, ``keys``, ``values`` and ``weight``.

    Source: Tang et al., "Mind the Interference: Retaining Pre-trained Knowledge in Parameter Efficient Continual Learning of
    Vision-Language Models" (DIKI), ECCV 2024.
    """
    samples, length, width = x.shape
    heads = attention.num_heads

    def split(tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (heads, -1)).transpose(-3, -2)

    q, k, v = F.linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(3, dim=-1)
    q = split(q)
    mask = None if attn_mask is None else attn_mask.to(x.dtype)
    if mask is not None and mask.ndim == 3:
        mask = mask.unflatten(0, (samples, heads))
    attended = F.scaled_dot_product_attention(q, split(k), split(v), attn_mask=mask)
    shape = (samples, heads, keys.shape[-2], width // heads)
    injected = F.scaled_dot_product_attention(q, split(keys).expand(shape), split(values).expand(shape))
    if weight is None:
        attended = attended + injected
    elif isinstance(weight, Tensor):
        attended = torch.addcmul(attended, injected, weight.to(x.dtype).view(-1, 1, 1, 1))
    else:
        attended = torch.add(attended, injected, alpha=weight)
    return attention.out_proj(attended.transpose(1, 2).reshape(samples, length, width))


class BlockPrompts(nn.Module):
    """Prompts of one block: for each task keys and values (p, D), tensors of their own, so that only theirs have gradients.

    Args:
        width: D.
        length: p.
    """

    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        self.width, self.length = width, length
        self.keys, self.values = nn.ParameterList(), nn.ParameterList()

    def add(self, like: Tensor) -> None:
        """One more task: keys uniform in (-1, 1), drawn on the CPU, values zero; device and dtype of ``like`` (any shape)."""
        keys = torch.rand(self.length, self.width) * 2 - 1
        self.keys.append(nn.Parameter(keys.to(like.device, like.dtype)))
        self.values.append(nn.Parameter(like.new_zeros(self.length, self.width)))

    def of(self, task: int | Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (p, D) of ``task``, or (B, p, D) for ``task`` (B,) int64 on the device."""
        if isinstance(task, Tensor):
            return torch.stack(list(self.keys))[task], torch.stack(list(self.values))[task]
        return self.keys[task], self.values[task]


class MountedPrompts(nn.Module):
    """:class:`BlockPrompts` on the first blocks of both towers of one CLIP model, and the attention that reads them.

    Nothing but the ``forward`` of these block instances changes: the model's state-dict names stay, :meth:`remove` undoes it,
    and outside :meth:`active` the blocks run their own code.

    Args:
        backbone: gets the prompts.
        depth: blocks of each tower, from the first; all of them where a tower has fewer.
        length: p, prompts per task and block.

    Raises:
        TypeError: a block is not open_clip's plain residual attention block, batch first.
        ValueError: a block already carries adapters or prompts.
    """

    def __init__(self, backbone: Backbone, *, depth: int = 8, length: int = 8) -> None:
        super().__init__()
        self._hosts: dict[str, Any] = {
            name: block
            for name, block in residual_blocks(backbone, text=True).items()
            if int(name.rpartition("_")[2]) < depth
        }
        for name, block in self._hosts.items():
            if type(block) is not lazy_open_clip.transformer.ResidualAttentionBlock or not block.attn.batch_first:
                raise TypeError(
                    f"model: prompts need open_clip's ResidualAttentionBlock, batch first; {name} is another"
                )
        self.blocks = nn.ModuleDict(
            {name: BlockPrompts(block.attn.embed_dim, length) for name, block in self._hosts.items()}
        )
        for prompts, block in zip(self._each(), self._hosts.values(), strict=True):
            block.forward = functools.partial(_prompted_forward, self, prompts, block)

    def __len__(self) -> int:
        """Tasks that have prompts."""
        return len(next(self._each()).keys)

    def add(self, count: int) -> None:
        """Draw prompts until ``count`` tasks have some."""
        for prompts, block in zip(self._each(), self._hosts.values(), strict=True):
            while len(prompts.keys) < count:
                prompts.add(block.attn.in_proj_weight)

    def of_task(self, task: int) -> list[tuple[str, nn.Parameter]]:
        """Named prompts of one task, image tower first."""
        return [
            (f"{place}.{part}.{task}", getattr(prompts, part)[task])
            for place, prompts in self.blocks.items()
            for part in ("keys", "values")
        ]

    @contextmanager
    def active(self, task: int | Tensor, weight: Tensor | float | None = None) -> Iterator[None]:
        """Inside, the blocks add the prompts of ``task``, times ``weight``.

        Args:
            task: one for all samples, or (B,) int64 on the device.
            weight: scalar or (B,); None is 1.
        """
        token = _injections.set({**_injections.get(), id(self): (task, weight)})
        try:
            yield
        finally:
            _injections.reset(token)

    @property
    def injection(self) -> tuple[int | Tensor, Tensor | float | None] | None:
        """The arguments of the innermost :meth:`active`, None outside of it; of a batch in parts, those of the present part."""
        given, part = _injections.get().get(id(self)), current_part()
        if given is None or part is None:
            return given
        task, weight = given
        if isinstance(task, Tensor) and task.ndim:
            task = part.of(task)
        return task, part.of(weight) if isinstance(weight, Tensor) and weight.ndim else weight

    def remove(self) -> None:
        """Take the prompts off; the blocks run as they did before."""
        for block in self._hosts.values():
            del block.forward
        self._hosts = {}

    def _each(self) -> Iterator[BlockPrompts]:
        for prompts in self.blocks.values():
            assert isinstance(prompts, BlockPrompts)
            yield prompts


@reads_trees
def _prompted_forward(
    mounted: MountedPrompts,
    prompts: BlockPrompts,
    block: Any,
    x: Tensor,
    k_x: Tensor | None = None,
    v_x: Tensor | None = None,
    attn_mask: Tensor | None = None,
) -> Tensor:
    """The forward of an open_clip block with the prompts beside its tokens."""
    injection = mounted.injection
    if injection is None:
        return type(block).forward(block, x, attn_mask=attn_mask)
    task, weight = injection
    attended = residual_prompt_attention(block.ln_1(x), block.attn, *prompts.of(task), weight, attn_mask)
    x = x + block.ls_1(attended)
    return x + block.ls_2(block.mlp(block.ln_2(x)))
