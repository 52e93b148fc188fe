"""What a routed block costs on the host and in memory: exact counts, the same on every machine."""

from __future__ import annotations

import pytest
import torch

from cl_kernels import dispatch, library
from cl_kernels.nn import MoEAdapter
from cl_kernels.profile import OperationCount

BATCH, LENGTH, WIDTH, RANK, EXPERTS, K = 6, 9, 24, 8, 22, 2

pytestmark = pytest.mark.native


def block() -> tuple[MoEAdapter, torch.Tensor]:
    torch.manual_seed(0)
    adapter = MoEAdapter(WIDTH, EXPERTS, bottleneck=RANK, k=K).train()
    torch.nn.init.normal_(adapter.up_weight)
    return adapter, torch.randn(BATCH, LENGTH, WIDTH, requires_grad=True)


def test_router_and_adapter_dispatch_few_operations():
    adapter, x = block()
    assert dispatch.backends()["moe_adapter"]["cpu"] == dispatch.AVAILABLE
    with OperationCount() as forward:
        out = adapter(x, x)
    upstream = torch.randn_like(out)
    with OperationCount() as backward:
        out.backward(upstream)
    assert forward.by_name["cl_kernels::moe_adapter"] == 1
    assert backward.by_name["cl_kernels::moe_adapter_backward"] == 1
    assert forward.operations <= 12, forward.by_name
    assert backward.operations <= 16, backward.by_name
    # Whoever asks for a value on the host waits for the device.
    waiting = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero"}
    assert waiting.isdisjoint(forward.by_name | backward.by_name)


def test_only_the_bottleneck_and_small_tensors_are_saved():
    adapter, x = block()
    saved: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        adapter(x, x)
    given = {t.untyped_storage().data_ptr() for t in (x, *adapter.parameters(), *adapter.buffers())}
    extra = {t.untyped_storage().data_ptr(): t for t in saved if t.untyped_storage().data_ptr() not in given}
    hidden = [t for t in extra.values() if t.shape == (BATCH, K, LENGTH, RANK)]
    assert len(hidden) == 1
    rest = [t for t in extra.values() if t is not hidden[0]]
    # Gates, ids and noise of the router: nothing that grows with the number of tokens of a sample.
    assert sum(t.numel() for t in rest) <= BATCH * (2 * K + EXPERTS)
    assert all(t.shape[0] == BATCH and t.dim() == 2 for t in rest)


def test_nothing_is_saved_without_gradients():
    adapter, x = block()
    t = [adapter.down_weight, adapter.down_bias, adapter.up_weight, adapter.up_bias]
    ids, gates = torch.zeros(BATCH, K, dtype=torch.int64), torch.ones(BATCH, K)
    _, hidden = library.operator("moe_adapter", "cpu")(x, ids, gates, *t, None, None, 1.0, 0.0, False)
    assert hidden.numel() == 0


@pytest.mark.parametrize("experts", [2, 40])
def test_the_gradient_of_the_bottleneck_is_held_for_a_piece_of_the_tokens(experts):
    """Of 6,000 tokens of width 768: in their own order, or slot by slot."""
    torch.manual_seed(0)
    x, grad = torch.randn(2, 6000, 1, 768)
    ids, gates = torch.randint(experts, (6000, 2)), torch.rand(6000, 2)
    down, up, bias = torch.randn(experts, 8, 768), torch.randn(experts, 768, 8), torch.randn(experts, 768)
    hidden = torch.rand(6000, 2, 1, 8)
    needs = (False, False, True)
    with torch.profiler.profile(profile_memory=True) as profiler:
        found = library.operator("moe_adapter_backward", "cpu")(
            grad, x, ids, gates, down, up, bias, hidden, 1.0, 0.0, *needs
        )
    events = profiler.profiler.kineto_results.events()
    taken = sum(max(e.nbytes(), 0) for e in events if e.name() == "[memory]")
    results = sum(t.nbytes for t in found)
    assert 0 < taken - results < hidden.nbytes / 2
