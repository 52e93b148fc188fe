"""QuickGELU that keeps its input alone: open_clip's bits and gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from open_clip.transformer import QuickGELU
from torch import nn

from cl_methods.backbone.quick_gelu import fuse_quick_gelu, quick_gelu, separate_quick_gelu


def test_the_bits_of_open_clip_and_its_gradient():
    x = torch.linspace(-30, 30, 999, dtype=torch.float64)
    assert torch.equal(quick_gelu(x.float()), QuickGELU()(x.float()))
    assert torch.autograd.gradcheck(quick_gelu, (x[::50].clone().requires_grad_(),))
    given = [x.float().requires_grad_() for _ in range(2)]
    for value, function in zip(given, (quick_gelu, QuickGELU()), strict=True):
        function(value).backward(torch.cos(x).float())
    torch.testing.assert_close(given[0].grad, given[1].grad, rtol=1e-6, atol=1e-7)


def test_one_tensor_is_kept_and_none_is_computed_with_gradients_off():
    model = nn.Sequential(nn.Linear(3, 4), QuickGELU())
    fuse_quick_gelu(model)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        copied = copy.deepcopy(model)
        middle = copied[0](torch.ones(2, 3))
        saved.clear()
        copied[1](middle)
    assert [t.data_ptr() for t in saved] == [middle.data_ptr()]
    with torch.no_grad():
        assert copied[1](middle).grad_fn is None
    separate_quick_gelu(model)
    assert "forward" not in vars(model[1])
    assert list(model.state_dict()) == ["0.weight", "0.bias"]


def test_it_is_differentiable_once():
    x = torch.ones(2, requires_grad=True)
    (grad,) = torch.autograd.grad(quick_gelu(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
