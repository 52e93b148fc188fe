"""A checkpoint as the public code of MoE-Adapters writes it, every name spelt out here, and its block's formula."""

from __future__ import annotations

import torch
from small_clip import LAYERS, TEXT, VISION
from torch import Tensor
from torch.nn import functional as F

EXPERTS, BOTTLENECK, ROUTERS = 5, 64, 11


def public_checkpoint(clip: dict[str, Tensor], learnt: int = 3, *, shared: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return 0.1 * torch.randn(*shape, generator=generator)

    state = dict(clip)
    for prefix, width in (("visual.", VISION), ("", TEXT)):
        for block in range(LAYERS):
            base = f"{prefix}transformer.resblocks.{block}."
            state |= {f"{base}ln_3.weight": torch.ones(width), f"{base}ln_3.bias": torch.zeros(width)}
            state |= {f"{base}mean": torch.tensor([0.0]), f"{base}std": torch.tensor([1.0])}
            for expert in range(EXPERTS):
                here = f"{base}adaptmlp_list.{expert}."
                state[f"{here}down_proj.weight"] = draw(BOTTLENECK, width)
                state[f"{here}down_proj.bias"] = draw(BOTTLENECK)
                state[f"{here}up_proj.weight"] = draw(width, BOTTLENECK)
                state[f"{here}up_proj.bias"] = draw(width)
            for name in ("down_proj.weight", "down_proj.bias", "up_proj.weight", "up_proj.bias"):
                state[f"{base}adaptmlp.{name}"] = state[f"{base}adaptmlp_list.{EXPERTS - 1}.{name}"]
            if shared:
                state |= {f"{base}router1": draw(width, EXPERTS), f"{base}w_noise": draw(width, EXPERTS)}
                continue
            for router in range(ROUTERS):
                for kind in ("router_list", "w_noise_list"):
                    drawn = draw(width, EXPERTS)
                    state[f"{base}{kind}.{router}"] = drawn if router < learnt else torch.zeros(width, EXPERTS)
    return state


def coders(width: int, count: int = 12, code: int = 4) -> dict[str, Tensor]:
    """The public code's list of autoencoders."""
    generator = torch.Generator().manual_seed(2)
    state = {}
    for index in range(count):
        for side, shape in (("encoder", (code, width)), ("decoder", (width, code))):
            state[f"{index}.{side}.0.weight"] = torch.randn(*shape, generator=generator)
            state[f"{index}.{side}.0.bias"] = torch.randn(shape[0], generator=generator)
    return state


def public_block(
    x: Tensor, state: dict[str, Tensor], base: str, router: str, heads: int, mask: Tensor | None
) -> Tensor:
    """``x₁ + MLP(LN₂ x₁) + Σ_{e ∈ top 2} g_e · 0.1 · A_e(x₁)`` with ``x₁ = x + Attn(LN₁ x)`` for x (B, L, D), all experts run."""
    own = {name.removeprefix(base): value for name, value in state.items() if name.startswith(base)}
    width = x.shape[-1]

    def norm(value: Tensor, name: str) -> Tensor:
        return F.layer_norm(value, (width,), own[f"{name}.weight"], own[f"{name}.bias"])

    qkv = F.linear(norm(x, "ln_1"), own["attn.in_proj_weight"], own["attn.in_proj_bias"]).chunk(3, dim=-1)
    q, k, v = (part.unflatten(-1, (heads, width // heads)).transpose(1, 2) for part in qkv)
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
    x1 = x + F.linear(attended, own["attn.out_proj.weight"], own["attn.out_proj.bias"])
    hidden = F.linear(norm(x1, "ln_2"), own["mlp.c_fc.weight"], own["mlp.c_fc.bias"])
    out = x1 + F.linear(hidden * torch.sigmoid(1.702 * hidden), own["mlp.c_proj.weight"], own["mlp.c_proj.bias"])
    top, chosen = (x1[:, 0] @ own[router]).topk(2, dim=1)
    gates = torch.zeros(len(x), EXPERTS).scatter(1, chosen, top.softmax(dim=1))
    for expert in range(EXPERTS):
        here = f"adaptmlp_list.{expert}."
        down = F.relu(F.linear(x1, own[f"{here}down_proj.weight"], own[f"{here}down_proj.bias"]))
        branch = F.linear(down, own[f"{here}up_proj.weight"], own[f"{here}up_proj.bias"])
        out = out + 0.1 * gates[:, expert, None, None] * branch
    return out
