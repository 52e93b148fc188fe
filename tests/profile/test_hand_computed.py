"""Counts of a profile against what shapes say by hand: a ViT-B/16 block, its adapters, the whole image tower."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from cl_kernels.nn import MoEAdapter
from cl_kernels.profile import Recorder, costs
from cl_kernels.profile.static import comparable_attention

B, L, D, HEADS = 4, 197, 768, 12
E, K, R = 22, 2, 64
FLOAT = 4

# Per image and block, 2 for each multiply-add: queries, keys and values, scores and their sum of values, projection, MLP.
BLOCK = 2 * L * D * 3 * D + 2 * L * L * D + 2 * L * L * D + 2 * L * D * D + 2 * L * D * 4 * D + 2 * L * 4 * D * D
ADAPTER = K * (2 * L * D * R + 2 * L * R * D)
ROUTER = 2 * D * E  # token 0 alone, once more for the noise


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    """A CLIP block in the published layout, tokens first."""

    def __init__(self):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.attention = nn.MultiheadAttention(D, HEADS)
        self.mlp = nn.Sequential(nn.Linear(D, 4 * D), QuickGELU(), nn.Linear(4 * D, D))

    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


def record(modules, inputs, step, device="meta"):
    with (
        comparable_attention(),
        Recorder(modules, [p for m in modules.values() for p in m.parameters()] + inputs) as recorder,
    ):
        out = step()
        recorder.phase = "backward"
        if out.requires_grad:
            out.sum().backward()
    return recorder.record


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_frozen_block_is_thirteen_operations(device):
    block = Block().to(device).requires_grad_(False)
    x = torch.zeros(L, B, D, device=device)
    record_ = record({"block": block}, [x], lambda: block(x))
    counted = Counter(operation.name.partition("::")[2] for operation in record_.operations)
    assert counted == {
        "native_layer_norm": 2,
        "addmm": 4,  # queries, keys and values; projection; two of the MLP
        "clone": 1,  # queries, keys and values apart from each other
        "_scaled_dot_product_flash_attention_for_cpu": 1,
        "mul": 2, "sigmoid": 1,  # QuickGELU
        "add": 2,
    }  # fmt: skip
    cost = costs([record_], {"block": block})["block"]
    assert cost.operations_forward == 13
    assert cost.flops_forward == B * BLOCK
    assert cost.bytes_saved == cost.waits == cost.flops_backward == cost.trainable == 0
    assert cost.parameters == 4 * D * D + 4 * D + 8 * D * D + 5 * D + 4 * D


def test_backward_through_a_frozen_block_costs_its_forward_and_half_of_attention_more():
    block = Block().to("meta").requires_grad_(False)
    x = torch.zeros(L, B, D, device="meta", requires_grad=True)
    cost = costs([record({"block": block}, [x], lambda: block(x))], {"block": block})["block"]
    scores = 2 * L * L * D
    assert cost.flops_backward == B * (BLOCK + 3 * scores)  # 5 products for 2: the scores again, and 4 gradients
    trained = Block().to("meta")
    x = torch.zeros(L, B, D, device="meta", requires_grad=True)
    cost = costs([record({"block": trained}, [x], lambda: trained(x))], {"block": trained})["block"]
    linear = BLOCK - 2 * scores
    assert cost.flops_backward == B * (2 * linear + 5 * scores)
    assert cost.trainable == cost.parameters


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_the_adapters_of_a_block(device):
    adapter = MoEAdapter(D, E, bottleneck=R, k=K).to(device)
    x = torch.zeros(B, L, D, device=device, requires_grad=True)
    found = record({"adapter": adapter}, [x], lambda: adapter(x, x))
    cost = costs([found], {"adapter": adapter})["adapter"]
    assert cost.flops_forward == B * (ADAPTER + 2 * ROUTER)
    # Bottleneck gradient, input, and two for the experts: twice the forward pass. The router: x, gate, noise and its deviation.
    assert cost.flops_backward == B * (2 * ADAPTER + 5 * ROUTER)
    assert cost.waits == 0
    names = Counter(operation.name for operation in found.operations if operation.phase == "forward")
    assert names == {
        "aten::randn": 1, "cl_kernels::top_k_gating": 1, "aten::randint": 1, "cl_kernels::moe_adapter": 1, "aten::add_": 1,
    }  # fmt: skip
    hidden, gates, ids, noise = B * K * L * R * FLOAT, B * K * FLOAT, B * K * 8, B * E * FLOAT
    assert cost.bytes_saved == hidden + gates + ids + noise
    assert cost.parameters == E * (2 * D * R + R + D) + 2 * D * E


def test_peak_and_live_bytes_are_those_of_the_tensors_that_exist():
    x = torch.zeros(1024, dtype=torch.float32, device="meta")
    with Recorder({}, [x]) as recorder:
        y = x + 1
        z = y + 1
        del y
        z.mul_(2)
        z = z + 1
    assert [operation.live for operation in recorder.record.operations] == [4096, 8192, 4096, 8192]
    assert [operation.bytes for operation in recorder.record.operations] == [8192, 8192, 4096, 8192]
    assert z.shape == x.shape


def test_what_was_there_before_the_step_is_not_counted_when_it_is_written_to():
    parameter, moment = nn.Parameter(torch.zeros(256)), torch.zeros(256)
    with Recorder({}, [parameter]) as recorder:
        moment.mul_(0.9)
        parameter.grad = moment + 1
    assert [operation.live for operation in recorder.record.operations] == [0, 1024]


def test_nonzero_on_meta_tensors_finds_the_given_share_in_total():
    mask = torch.zeros(64, 2, dtype=torch.bool, device="meta")
    with Recorder({}, [mask], true_share=1 / 22) as recorder:
        rows = [len(mask.nonzero()) for _ in range(22)]
    assert sum(rows) == 128
    assert set(rows) <= {5, 6}
    assert all(operation.waits for operation in recorder.record.operations)


def test_backward_operations_belong_to_what_they_differentiate():
    net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    x = torch.ones(4, 3, requires_grad=True)
    modules = {"net": net, **{name: module for name, module in net.named_modules() if name}}
    found = record(modules, [x], lambda: net(x))
    mine = [(o.name.partition("::")[2], o.stack) for o in found.operations if o.phase == "backward" and o.stack]
    assert [stack for name, stack in mine if name == "mm"] == [("net", "2")] * 2 + [("net", "0")] * 2
    assert [stack for name, stack in mine if name == "threshold_backward"] == [("net", "1")]
    assert costs([found], modules)["0"].flops_backward == 2 * (2 * 4 * 3 * 5)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_recomputed_operations_go_to_the_module_that_recomputes():
    from torch.utils.checkpoint import checkpoint

    net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    x = torch.ones(4, 3, requires_grad=True)
    modules = {"net": net, **{name: module for name, module in net.named_modules() if name}}
    found = record(modules, [x], lambda: checkpoint(net, x, use_reentrant=False))
    again = [o.stack for o in found.operations if o.phase == "backward" and o.name == "aten::addmm"]
    assert again == [("net", "0")]  # the second one's result is not needed
    assert all(o.stack[0] == "net" for o in found.operations if o.name == "aten::mm")
