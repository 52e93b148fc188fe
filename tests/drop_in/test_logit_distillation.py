"""The distillation of both sides' logits as one operation each way, against its formula in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cl_kernels import use_backend
from cl_kernels.drop_in.distillation import compiled, distillation
from cl_kernels.profile import OperationCount

pytestmark = pytest.mark.native

LAYOUTS = {
    "rows": lambda x: x,
    "columns": lambda x: x.t().contiguous().t(),
    "every second column": lambda x: torch.stack([x, x], 2).flatten(1)[:, ::2],
    "rows of a wider matrix": lambda x: F.pad(x, (3, 2))[:, 3:-2],
    "columns of a wider matrix": lambda x: F.pad(x.t(), (1, 4))[:, 1:-4].t(),
}
SHAPES = [(5, 37), (37, 5), (70, 67), (1, 9), (9, 1), (3, 5000)]


def published(t: Tensor, s: Tensor, T: float) -> Tensor:
    return F.cross_entropy(s / T, F.softmax(t / T, dim=1), reduction="mean") * T**2


def pair(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, spread: float = 5.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [(spread * torch.randn(shape, generator=generator)).to(dtype) for _ in range(2)]


def results(function, t: Tensor, s: Tensor, T: float, needs: tuple[bool, bool] = (True, True)) -> list[Tensor | None]:
    t, s = (x.detach().requires_grad_(need) for x, need in zip((t, s), needs, strict=True))
    loss = function(t, s, T)
    (1.5 * loss).backward()
    return [loss.detach(), t.grad, s.grad]


def check(found: list, expected: list, rtol: float, atol: float) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=rtol, atol=atol * float(other.abs().max().clamp(min=1e-3)))


@pytest.mark.parametrize("layouts", [(a, a) for a in LAYOUTS] + [("rows", "columns"), ("columns", "rows")])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_layout_is_read_where_it_lies(shape, layouts):
    t, s = (LAYOUTS[layout](x) for layout, x in zip(layouts, pair(shape), strict=True))
    found = results(distillation, t, s, 2.0)
    check(found, results(published, t.double(), s.double(), 2.0), 1e-5, 1e-5)
    assert found[1].shape == found[2].shape == shape


@pytest.mark.parametrize(
    ("dtype", "rtol", "atol"),
    [(torch.float64, 1e-12, 1e-12), (torch.bfloat16, 0.01, 1e-3), (torch.float16, 2e-3, 1e-3)],
)
@pytest.mark.parametrize("shape", [(6, 40), (40, 6), (2, 7, 3), (2, 70, 9, 8)])
def test_other_dtypes_and_dimensions(dtype, rtol, atol, shape):
    t, s = pair(shape, dtype)
    found = results(distillation, t, s, 3.0)
    assert {x.dtype for x in found} == {dtype}
    check(found, results(published, t.double(), s.double(), 3.0), rtol, atol)


@pytest.mark.parametrize("spread", [300.0, 1e4, 1e-4])
@pytest.mark.parametrize("turned", [False, True])
def test_logits_of_any_size_are_as_exact_as_published(spread, turned):
    """The teacher's gradient is a difference of nearly equal numbers there, of which float32 has few digits."""
    t, s = (x.t() if turned else x for x in pair((70, 70), spread=spread))
    exact = results(published, t.double(), s.double(), 2.0)
    for found, theirs, expected in zip(
        results(distillation, t, s, 2.0), results(published, t, s, 2.0), exact, strict=True
    ):
        error, own = (float((x.double() - expected).abs().max() / expected.abs().max()) for x in (found, theirs))
        assert error <= max(2e-6, 3 * own)


def test_masked_on_both_sides_is_not_there():
    t, s = pair((6, 80))
    masked = torch.arange(80) % 3 == 0
    loss, of_t, of_s = results(distillation, t.masked_fill(masked, -torch.inf), s.masked_fill(masked, -torch.inf), 2.0)
    check([loss, of_t[:, ~masked], of_s[:, ~masked]], results(published, *(x[:, ~masked].double() for x in (t, s)), 2.0),
          1e-5, 1e-5)  # fmt: skip
    assert not of_t[:, masked].any()
    assert not of_s[:, masked].any()


def test_only_what_is_asked_for():
    t, s = pair((9, 40))
    _, of_t, of_s = results(distillation, t, s, 2.0)
    for needs, expected in (((True, False), (of_t, None)), ((False, True), (None, of_s))):
        for one, other in zip(results(distillation, t, s, 2.0, needs)[1:], expected, strict=True):
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other)
    with torch.no_grad():
        assert not distillation(t.requires_grad_(), s, 2.0).requires_grad


def test_of_nothing_there_is_no_mean():
    loss, of_t, of_s = results(distillation, *pair((0, 5)), 2.0)
    assert loss.isnan()
    assert of_t.shape == of_s.shape == (0, 5)


def test_no_bit_depends_on_threads():
    t, s = pair((64, 3000))
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append([*results(distillation, t, s, 2.0), *results(distillation, t.t(), s.t(), 2.0)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("turned", [False, True])
def test_gradients_by_differences_once_and_twice(turned):
    t, s = (x.requires_grad_() for x in pair((4, 3), torch.float64, 1.0))

    def both(t, s):
        return distillation(*((x.t() if turned else x) for x in (t, s)), 2.0)

    assert torch.autograd.gradcheck(both, (t, s))
    assert torch.autograd.gradgradcheck(both, (t, s))


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_opcheck(layout):
    t, s = (LAYOUTS[layout](x) for x in pair((5, 7)))
    assert compiled(s)
    operations = torch.ops.cl_kernels.distillation.default, torch.ops.cl_kernels.distillation_backward.default
    torch.library.opcheck(operations[0], (t, s, 2.0))
    _, stats = operations[0](t, s, 2.0)
    tests = ("test_schema", "test_faketensor")  # it has no gradient of its own
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(operations[1], (torch.tensor(1.0), t, s, stats, 2.0, *needs), test_utils=tests)


def test_it_is_one_operation_each_way():
    """Both directions of ZSCL's step: four operations where the published function is 38."""

    def count(function) -> dict[str, int]:
        t, s = (x.requires_grad_() for x in pair((8, 30)))
        with OperationCount() as counted:
            (function(t, s, 2.0) + function(t.t(), s.t(), 2.0)).backward()
        return counted.by_name

    ours, theirs = count(distillation), count(published)
    assert {name: n for name, n in ours.items() if name.startswith("cl_kernels")} == {
        "cl_kernels::distillation": 2,
        "cl_kernels::distillation_backward": 2,
    }
    around = {
        "aten::add": 3,
        "aten::ones_like": 1,
    }  # of both losses; of both gradients that each side gets; what backward() begins with
    assert {name: n for name, n in ours.items() if not name.startswith("cl_kernels")} == around
    assert sum(theirs.values()) - 4 >= 9 * 4
    with use_backend("reference"):
        assert sum(count(distillation).values()) > sum(ours.values())


def test_what_does_not_belong_together_is_refused():
    t, s = pair((4, 6))
    forward, backward = torch.ops.cl_kernels.distillation, torch.ops.cl_kernels.distillation_backward
    with pytest.raises(RuntimeError, match="teacher and student differ in dimension 1"):
        forward(t[:, :5], s, 2.0)
    with pytest.raises(RuntimeError, match="of one dtype with M > 0"):
        forward(t.double(), s, 2.0)
    stats = forward(t[:2], s[:2], 2.0)[1]
    with pytest.raises(RuntimeError, match="do not belong to these logits"):
        backward(torch.tensor(1.0), t, s, stats, 2.0, True, True)
