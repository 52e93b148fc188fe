"""Every operation on meta tensors: shapes, dtypes and gradients of the computation, and nothing computed."""

from __future__ import annotations

import pytest
import torch

import cl_kernels as clk
from cl_kernels import dispatch


def both(step, *tensors):
    """What ``step`` gives on meta tensors and on real ones, with the shapes of all gradients."""
    found = []
    for device in ("meta", "cpu"):
        inputs = [t.to(device).requires_grad_(t.is_floating_point()) for t in tensors]
        outputs = step(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        outputs[0].sum().backward()
        gradients = [None if t.grad is None else (t.grad.shape, t.grad.dtype) for t in inputs]
        found.append(([(o.shape, o.dtype) for o in outputs], gradients))
        assert all(o.device.type == device for o in outputs)
    return found


@pytest.mark.parametrize(
    ("step", "shapes"),
    [
        (
            lambda x, g, n: clk.top_k_gating(x, g, n, k=2, noise=torch.ones(3, 5, device=x.device)),
            [(3, 8), (8, 5), (8, 5)],
        ),
        (clk.distill_kl, [(3, 7), (3, 7)]),
        (lambda s, t, a: clk.feature_distill_kl(s, t, a, logit_scale=10.0), [(3, 8), (3, 8), (7, 8)]),
    ],
)
def test_shapes_and_gradients(step, shapes):
    meta, real = both(step, *(torch.rand(shape) for shape in shapes))
    assert meta == real


def test_adapters_and_averages():
    weights = [torch.rand(shape) for shape in ((5, 4, 8), (5, 4), (5, 8, 4), (5, 8))]
    meta, real = both(
        lambda x, g, *w: clk.moe_adapter(x, torch.ones(3, 2, dtype=torch.int64, device=x.device), g, *w, dropout_p=0.1, residual=x),
        torch.rand(3, 6, 8), torch.rand(3, 2), *weights,
    )  # fmt: skip
    assert meta == real
    average = torch.zeros(4, device="meta")
    clk.average_([average], [torch.ones(4, device="meta")], 0.5)
    assert average.shape == (4,)


def test_the_reference_runs_there_only_when_it_is_asked_for():
    assert dispatch.choose("moe_adapter", torch.device("meta")) == "cpu"
    assert dispatch.choose("moe_adapter", torch.device("meta"), "reference") == "reference"
    with pytest.raises(ValueError, match="backend: got 'fast'"):
        dispatch.choose("moe_adapter", torch.device("meta"), "fast")
