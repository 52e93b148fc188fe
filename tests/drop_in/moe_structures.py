"""Blocks with the names and the behaviour of MoE-Adapters4CL, written from its description: what drop_in recognises and replaces.

Each expert is a module of its own and sees the samples that were routed to it; the load-balancing loss is computed and thrown
away; counts go to a tensor of the host one by one. The variants differ in where the active task is kept: ``mtil`` has per-block
settings and a global ``val_task_id``, ``cil`` (mammoth's form too) a global ``global_taskid``.
"""

from __future__ import annotations

import cil_task
import mtil_task
import torch
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn import functional as F

WIDTH, RANK, TASKS, LAYERS = 32, 64, 3, 2


class Expert(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.adapter_layer_norm_before = None
        self.scale, self.dropout = 0.1, dropout
        self.down_proj, self.non_linear_func, self.up_proj = nn.Linear(width, RANK), nn.ReLU(), nn.Linear(RANK, width)

    def forward(self, x: Tensor, add_residual: bool = True, residual: Tensor | None = None) -> Tensor:
        hidden = F.dropout(self.non_linear_func(self.down_proj(x)), self.dropout, self.training)
        out = self.up_proj(hidden) * self.scale
        return out + (x if residual is None else residual) if add_residual else out


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class BlockBase(nn.Module):
    def __init__(self, width: int, kind: str, mask: Tensor | None, experts: int, k: int, dropout: float) -> None:
        super().__init__()
        self.attn, self.attn_mask = nn.MultiheadAttention(width, 2), mask
        self.ln_1, self.ln_2, self.ln_3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), QuickGELU(), nn.Linear(4 * width, width))
        self.register_buffer("mean", torch.zeros(1))
        self.register_buffer("std", torch.ones(1))
        self.text_or_image, self.top_k, self.experts_num = kind, k, experts
        self.noisy_gating = self.is_train = True
        setattr(self, f"choose_map_{kind}", torch.zeros(experts))
        self.adaptmlp_list = nn.ModuleList(Expert(width, dropout) for _ in range(experts))
        self.adaptmlp = self.adaptmlp_list[-1]

    def attention(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x, need_weights=False, attn_mask=self.attn_mask)[0]

    def gate(self, token: Tensor, w_gate: Tensor, w_noise: Tensor) -> Tensor:
        """(B, E), zero for the experts that were not chosen."""
        clean = token @ w_gate.to(token)
        logits, width = clean, None
        if self.noisy_gating and self.is_train:
            width = F.softplus(token @ w_noise.to(token)) + 0.01
            logits = clean + torch.randn_like(clean) * width
        top, ids = logits.topk(min(self.top_k + 1, self.experts_num), dim=1)
        gates = torch.zeros_like(logits).scatter(1, ids[:, : self.top_k], top[:, : self.top_k].softmax(1))
        if width is not None and self.top_k < self.experts_num:
            normal = Normal(self.mean, self.std)
            inside, outside = (normal.cdf((clean - top[:, [self.top_k - i]]) / width) for i in (0, 1))
            load = torch.where(logits > top[:, [self.top_k]], inside, outside).sum(0)
            (load.var() / load.mean() ** 2 + gates.sum(0).var() / gates.sum(0).mean() ** 2).mul(1e-2)
        return gates

    def mixture(self, x: Tensor, w_gate: Tensor, w_noise: Tensor, count: bool = True) -> Tensor:
        tokens = x.permute(1, 0, 2)
        gates = self.gate(tokens[:, 0], w_gate, w_noise)
        if count:
            counts = getattr(self, f"choose_map_{self.text_or_image}")
            for expert in gates.nonzero()[:, 1].tolist():
                counts[expert] = counts[expert] + 1
        outputs, rows = [], []
        for e, expert in enumerate(self.adaptmlp_list):
            row = gates[:, e].nonzero().flatten()
            output = expert(tokens.index_select(0, row), add_residual=False)
            if len(row):
                outputs.append(output * gates[row, e][:, None, None])
                rows.append(row)
        mixed = torch.zeros(tokens.shape, device=x.device)
        return mixed.index_add(0, torch.cat(rows), torch.cat(outputs).float()).permute(1, 0, 2)


class MtilBlock(BlockBase):
    def __init__(self, *args, task_id: int = 1, autorouter: bool = True, adapter_flag: bool = True) -> None:
        super().__init__(*args)
        self.ffn_adapt, self.ffn_option, self.apply_moe = True, "parallel", True
        self.task_id, self.autorouter, self.adapter_flag = task_id, autorouter, adapter_flag
        width, experts = self.ln_1.normalized_shape[0], self.experts_num
        if task_id > -1:
            self.router_list = nn.ParameterList(torch.zeros(width, experts) for _ in range(TASKS))
            self.w_noise_list = nn.ParameterList(torch.zeros(width, experts) for _ in range(TASKS))
        else:
            self.router1, self.w_noise = (nn.Parameter(torch.zeros(width, experts)) for _ in range(2))

    forward = mtil_task.forward


class CilBlock(BlockBase):
    def __init__(self, *args) -> None:
        super().__init__(*args)
        width, experts = self.ln_1.normalized_shape[0], self.experts_num
        self.router_list = nn.ParameterList([torch.zeros(width, experts)])
        self.w_noise_list = nn.ParameterList([torch.zeros(width, experts)])

    forward = cil_task.forward


class Towers(nn.Module):
    """Image and text blocks of a CLIP; everything but routers and experts is frozen."""

    def __init__(self, block: type[BlockBase], experts: int, k: int = 2, dropout: float = 0.0, **options) -> None:
        super().__init__()
        mask = torch.full((7, 7), float("-inf")).triu(1)
        make = {
            kind: nn.Sequential(*[block(WIDTH, kind, m, experts, k, dropout, **options) for _ in range(LAYERS)])
            for kind, m in (("image", None), ("text", mask))
        }
        self.visual, self.transformer = make["image"], make["text"]
        with torch.no_grad():
            for name, p in self.named_parameters():
                if "adaptmlp" in name or "router" in name or "noise" in name:
                    p.normal_(std=0.3)
                else:
                    p.requires_grad_(False)

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        """(B, C) similarities of images (B, L, D) and texts (C, 7, D)."""
        image = self.visual(images.permute(1, 0, 2))[0]
        text = self.transformer(texts.permute(1, 0, 2))[-1]
        return 5 * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
