"""ZSCL's helpers, patched and unpatched: values, gradients, dtypes, memory that models share, ten steps, operations."""

from __future__ import annotations

import copy
import inspect
import sys
from types import ModuleType

import pytest
import torch
import zscl_structures
from torch import nn
from torch.nn import functional as F

from cl_kernels import drop_in, use_backend
from cl_kernels.profile import OperationCount
from cl_kernels.squared_distance import compiled, squared_distance

NAMES = ["distillation", "merge_we", "wise_we", "moving_avg", "l2_loss"]
published = {name: getattr(zscl_structures, name) for name in NAMES}


@pytest.fixture
def helpers():
    """The module, patched; restored at the end."""
    with drop_in.patch_zscl(zscl_structures):
        yield zscl_structures
    assert {name: getattr(zscl_structures, name) for name in NAMES} == published


def network(seed: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(7, 9), nn.ReLU(), nn.Linear(9, 5))
    model.register_parameter("logit_scale", nn.Parameter(torch.tensor(2.0)))
    return model.to(dtype)


def test_report(helpers):
    assert all(inspect.signature(getattr(helpers, n)) is not None for n in NAMES)
    assert [getattr(helpers, n).__name__ for n in NAMES] == NAMES
    for name in NAMES:
        given = inspect.signature(getattr(helpers, name)).parameters
        expected = inspect.signature(published[name]).parameters
        assert [(p.name, p.default) for p in given.values()] == [(p.name, p.default) for p in expected.values()]


@pytest.mark.parametrize("shape", [(6, 40), (40, 6), (2, 5, 3)])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_distillation(helpers, shape, transpose, dtype):
    torch.manual_seed(0)
    leaves = [(3 * torch.randn(shape)).to(dtype) for _ in range(2)]
    results = []
    for function in (published["distillation"], helpers.distillation):
        t, s = (leaf.clone().requires_grad_() for leaf in leaves)
        loss = function(*((x.transpose(0, 1) for x in (t, s)) if transpose else (t, s)), T=3)
        (2 * loss).backward()
        results.append((loss.detach(), s.grad, t.grad))
    tolerance = {"atol": 0.03, "rtol": 0.05} if dtype == torch.bfloat16 else {"atol": 1e-6, "rtol": 1e-6}
    for expected, found in zip(*results, strict=True):
        assert found.dtype == expected.dtype
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(found, expected, **tolerance)


def test_a_teacher_that_needs_no_gradient_gets_none():
    t, s = (torch.randn(4, 9, requires_grad=True) for _ in range(2))
    with drop_in.patch_zscl(zscl_structures, differentiate_teacher=False):
        zscl_structures.distillation(t, s).backward()
    assert t.grad is None
    assert s.grad.abs().max() > 0


def test_ten_steps(helpers):
    """Distillation both ways, consolidation, a running mean with and without pull, and a pull on the model itself."""
    x, anchors, labels = torch.randn(8, 7), torch.randn(11, 5), torch.arange(8) % 5
    runs = []
    for functions in (published, {name: getattr(helpers, name) for name in NAMES}):
        teacher, model = network(0), network(1)
        start, mean, wise = (copy.deepcopy(model) for _ in range(3))
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
        for step in range(10):
            z_t, z_s = (model.logit_scale * m(x) @ anchors.T for m in (teacher, model))
            loss = F.cross_entropy(model(x), labels) + functions["l2_loss"](model, start)
            loss = loss + functions["distillation"](z_t, z_s) + functions["distillation"](z_t.t(), z_s.t())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            mean = functions["merge_we"](model, mean, step + 1)
            wise = functions["wise_we"](model, wise, step + 1, start)
            assert functions["moving_avg"](model, start, 0.99) is None
        runs.append([p.detach() for m in (model, mean, wise, start) for p in m.parameters()])
    assert (runs[0][0] - runs[0][-5]).abs().max() > 1e-3
    for expected, found in zip(*runs, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


CALLS = {
    "merge_we": lambda f, a, b, _: f(a, b, 3),
    "wise_we": lambda f, a, b, c: f(a, b, 3, c, alpha=0.7),
    "moving_avg": lambda f, a, b, _: f(a, b, 0.9),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    "dtypes", [(torch.float32,) * 3, (torch.float64,) * 3, (torch.float32, torch.float16, torch.float32)]
)
def test_who_shares_memory_keeps_its_values(helpers, name, dtypes):
    """A state dict taken earlier, a model whose ``.data`` was assigned from the average, a tied copy."""
    results = []
    for function in (published[name], getattr(helpers, name)):
        models = [network(i, dtype) for i, dtype in enumerate(dtypes)]
        written = models[0 if name == "moving_avg" else 1]
        snapshot, alias = written.state_dict(), network(9)
        for p, q in zip(alias.parameters(), written.parameters(), strict=True):
            p.data = q.data
        parameters = list(written.parameters())
        returned = CALLS[name](function, *models)
        assert returned is (None if name == "moving_avg" else written)
        assert all(p is q for p, q in zip(parameters, written.parameters(), strict=True))
        results.append([p.detach() for m in (*models, alias) for p in m.parameters()] + list(snapshot.values()))
    for expected, found in zip(*results, strict=True):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def test_an_average_of_its_own_is_updated_in_place(helpers):
    model, mean = network(0), network(1)
    addresses = [p.data_ptr() for p in mean.parameters()]
    versions = [p._version for p in mean.parameters()]
    helpers.merge_we(model, mean, 1)
    assert [p.data_ptr() for p in mean.parameters()] == addresses
    assert [p._version for p in mean.parameters()] == versions  # as assigning .data leaves it


def on_lists(model: nn.Module, reference: nn.Module) -> torch.Tensor:
    """What a GPU runs."""
    with use_backend("reference"):
        return squared_distance(list(model.parameters()), list(reference.parameters()))


def test_l2_loss(helpers):
    results = []
    for function in (published["l2_loss"], helpers.l2_loss, on_lists):
        model, reference = network(0), network(1)
        model[0].bias.requires_grad_(False)
        loss = function(model, reference)
        (3 * loss).backward()
        assert all(p.grad is None for p in reference.parameters())
        results.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
        assert model[0].bias.grad is None
    for expected, *both in zip(*results, strict=True):
        for found in both:
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    assert helpers.l2_loss(nn.Identity(), nn.Identity()) == 0.0
    half = network(0, torch.float16)
    assert helpers.l2_loss(half, network(1, torch.float16)).dtype == published["l2_loss"](half, half).dtype


@pytest.mark.native
def test_l2_loss_over_several_pieces():
    """Tensors longer than what one thread takes at a time, of every kind that can hide at their ends; the same twice."""
    sizes = [(1,), (3, 70001), (0,), (), (65536,), (131, 1009)]
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-13)):
        tensors, references = ([torch.randn(s, dtype=dtype) for s in sizes] for _ in range(2))
        for t in tensors:
            t.requires_grad_()
        assert compiled([*tensors, *references])
        loss, again = (squared_distance(tensors, references) for _ in range(2))
        assert torch.equal(loss, again)
        exact = sum((a.detach().double() - b.double()).square().sum() for a, b in zip(tensors, references, strict=True))
        torch.testing.assert_close(loss.double(), exact, rtol=tolerance, atol=0)
        with OperationCount() as count:
            (3 * loss).backward()
        assert count.by_name["cl_kernels::squared_distance_backward"] == 1
        for t, r in zip(tensors, references, strict=True):
            torch.testing.assert_close(t.grad, 6 * (t.detach() - r), rtol=tolerance, atol=0)
    t = torch.randn(5, requires_grad=True)
    (grad,) = torch.autograd.grad(squared_distance([t], [torch.zeros(5)]), t, create_graph=True)
    grad.sum().backward()
    torch.testing.assert_close(t.grad, torch.full((5,), 2.0))
    assert not compiled([torch.randn(4, 4).T])
    with pytest.raises(RuntimeError, match="of the same shape"):
        torch.ops.cl_kernels.squared_distance([torch.randn(3)], [torch.randn(4)])


@pytest.mark.native
def test_operations(helpers):
    model, other, third = (nn.ModuleList(nn.Linear(4, 4) for _ in range(150)) for _ in range(3))

    def operations(function, *arguments) -> int:
        model.zero_grad()
        with OperationCount() as count:
            result = function(*arguments)
            if isinstance(result, torch.Tensor):
                result.backward()
        return count.operations

    for name, arguments in {
        "merge_we": (model, other, 2),
        "wise_we": (model, other, 2, third),
        "moving_avg": (model, other),
        "l2_loss": (model, other),
    }.items():
        before, after = (operations(f[name], *arguments) for f in (published, vars(helpers)))
        assert before >= 100 * after, (name, before, after)
        assert after == (3 if name == "l2_loss" else 1), name
    assert operations(published["l2_loss"], model, other) >= 20 * operations(on_lists, model, other)


def test_refusals_and_reports(monkeypatch):
    with pytest.raises(TypeError, match="helpers_module: got str"):
        drop_in.patch_zscl("src.models.helpers")
    with pytest.raises(ValueError, match=r"patch_zscl: found nothing to replace, expected .*merge_we"):
        drop_in.patch_zscl(ModuleType("empty"))
    user, other = ModuleType("user_training"), ModuleType("helpers_of_a_fork")
    user.merge_we = published["merge_we"]
    monkeypatch.setitem(sys.modules, "user_training", user)
    other.moving_avg = lambda model_0, model_1, alpha=0.999: None
    other.wise_we = lambda a, b: None
    other.l2_loss = "a string"
    other.merge_we = published["merge_we"]
    with drop_in.patch_zscl(other) as patch:
        assert patch.replaced == ["helpers_of_a_fork.merge_we"]
        assert patch.left["helpers_of_a_fork.moving_avg"].startswith("it computes something else")
        assert patch.left["helpers_of_a_fork.wise_we"].startswith("its parameters are ['a', 'b'], expected")
        assert patch.left["helpers_of_a_fork.l2_loss"] == "it is str, not a function"
        assert "patch this module too" in patch.left["user_training.merge_we"]
        with pytest.raises(ValueError, match=r"merge_we: already patched"):
            drop_in.patch_zscl(other)
    assert other.merge_we is published["merge_we"]
