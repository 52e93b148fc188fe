"""The definition of weight averaging, its arguments and its warning."""

from __future__ import annotations

import warnings
import weakref

import average_cases as cases
import pytest
import torch

import cl_kernels as clk
from cl_kernels.weight_average import arguments, plan, reference


@pytest.mark.parametrize(("average_dtype", "value_dtype"), cases.PAIRS)
def test_is_the_formula(average_dtype, value_dtype):
    cases.check_against_float64("reference", average_dtype, value_dtype, 1 / 3)


@pytest.mark.parametrize("weight", [0.0, 1.0, -0.5, 2.0])
def test_any_weight(weight):
    cases.check_against_float64("reference", torch.float32, torch.float32, weight)


def test_three_way():
    cases.check_three_way("reference")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_takes_a_neighbour_and_is_right_on_average(dtype):
    """The two numbers around each exact one, and their mean over many seeds, within five standard deviations of it."""
    exact = cases.between(dtype, 300)[:-7]
    if dtype == torch.float16:
        exact = exact[exact.abs() > 2.0**-20]  # below, 16 bits of chance are coarser than the shares
    magnitude = exact.to(dtype).abs()
    digit = (torch.nextafter(magnitude, torch.tensor(torch.inf, dtype=dtype)).double() - magnitude.double()).abs()
    draws, total = 400, torch.zeros_like(exact, dtype=torch.float64)
    for seed in range(draws):
        rounded = torch.zeros_like(magnitude)
        clk.average_([rounded], [exact], 1.0, rounding="stochastic", seed=seed, backend="reference")
        assert torch.all((rounded.double() - exact.double()).abs() < digit)
        total += rounded.double()
    spread = digit / 2 / draws**0.5  # the standard deviation of the mean is at most this
    assert torch.all((total / draws - exact.double()).abs() <= 5 * spread)
    nearest = (exact.to(dtype).double() - exact.double()).abs()
    assert (nearest > 1e-3 * digit).double().mean() > 0.9  # there was something to round


def test_stochastic_rounding_keeps_what_the_type_holds():
    for dtype in (torch.bfloat16, torch.float16):
        held = cases.between(dtype).to(dtype)
        average = torch.zeros_like(held)
        clk.average_([average], [held], 1.0, rounding="stochastic", seed=9, backend="reference")
        assert torch.equal(average.isnan(), held.isnan())
        assert torch.equal(average.nan_to_num(), held.nan_to_num())


def test_stochastic_rounding_does_not_stall():
    cases.check_stochastic_does_not_stall("reference")


def test_random_bits_are_uniform_and_never_shared():
    """The tensors of one list, and their elements, draw from counters of their own."""
    lengths = (5000, 3, 8, 777)
    counters = [sum((n + 7) // 8 for n in lengths[:i]) for i in range(len(lengths))]
    bits = [reference._random_bits(1, c, torch.empty(n)) for c, n in zip(counters, lengths, strict=True)]
    pooled = torch.cat(bits).double()
    assert pooled.min() >= 0
    assert pooled.max() < 2**16
    assert abs(pooled.mean() / 2**16 - 0.5) < 5 * (1 / 12 / len(pooled)) ** 0.5
    assert not torch.equal(bits[0][: lengths[3]], bits[3])
    assert torch.equal(reference._random_bits(1, 1, torch.empty(8)), bits[0][8:16])


def test_without_a_seed_the_default_generator_decides():
    value, results = torch.rand(100), []
    for manual in (1, 1, 2):
        torch.manual_seed(manual)
        average = torch.zeros(100, dtype=torch.bfloat16)
        clk.average_([average], [value], 1.0, rounding="stochastic")
        results.append(average)
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_a_plan_holds_until_something_changes(monkeypatch):
    monkeypatch.setattr(plan, "_recent", ())
    checked = []
    check = plan.check_lists
    monkeypatch.setattr(plan, "check_lists", lambda lists: (checked.append(1), check(lists))[1])
    averages, values = [torch.zeros(4), torch.zeros(2, 3)], [torch.ones(4), torch.ones(2, 3)]
    for weight in (0.5, 0.25, 1.0):
        clk.average_([a.detach() for a in averages], values, weight, backend="reference")
    assert len(checked) == 1
    with pytest.raises(ValueError, match=r"averages\[1\] is \(2, 3\), values\[1\] is \(3, 2\)"):
        clk.average_(averages, [values[0], values[1].view(3, 2)], 0.5, backend="reference")  # the same addresses
    with pytest.raises(TypeError, match=r"values\[0\]: got torch\.int32"):
        clk.average_(averages, [values[0].view(torch.int32), values[1]], 0.5, backend="reference")
    clk.average_(averages, [values[0].clone(), values[1]], 0.5, backend="reference")
    clk.average_([averages[1]], [values[1]], 0.5, backend="reference")
    clk.average_([averages[1].T], [values[1].T], 0.5, backend="reference")
    assert len(checked) == 6
    for _ in range(plan._KEPT + 2):
        clk.average_([torch.zeros(3)], [torch.zeros(3)], 0.5, backend="reference")
    assert len(plan._recent) <= plan._KEPT


def test_another_thread_may_add_a_plan_while_one_is_looked_for():
    class Interrupted:
        """A key whose comparison is where the other thread gets its turn."""

        def __eq__(self, other):
            kept.key = ()
            clk.average_([torch.zeros(5)], [torch.ones(5)], 0.5, backend="reference")
            return False

        __hash__ = None

    clk.average_([torch.zeros(2)], [torch.ones(2)], 0.5, backend="reference")
    kept = plan._recent[0]
    kept.key = Interrupted()
    average = torch.zeros(3)
    clk.average_([average], [torch.ones(3)], 0.5, backend="reference")
    assert average.tolist() == [0.5] * 3
    assert kept.key == ()


def test_a_plan_keeps_no_memory_alive():
    average, value = torch.zeros(1000), torch.zeros(1000)
    gone = weakref.ref(value)
    clk.average_([average], [value], 0.5)
    del value
    assert gone() is None


def test_layouts():
    cases.check_layouts("reference")


def test_running_mean():
    cases.check_running_mean("reference")


def test_autograd_sees_the_change():
    cases.check_autograd_sees_the_change("reference")


def test_nothing_to_average():
    assert clk.average_([], [], 0.5) is None
    assert clk.average_(iter([]), (t for t in ()), 0.5) is None


def same_tensor_twice():
    a = torch.zeros(3)
    return [a, a], [torch.zeros(3)] * 2


def value_is_another_average():
    a, b = torch.zeros(3), torch.zeros(3)
    return [a, b], [b, torch.ones(3)]


@pytest.mark.parametrize(
    ("averages", "values", "error", "message"),
    [
        ([torch.zeros(3)], [], ValueError, "1 tensors against 0"),
        ([torch.zeros(3)], [torch.zeros(4)], ValueError, r"averages\[0\] is \(3,\), values\[0\] is \(4,\)"),
        ([torch.zeros(3, dtype=torch.int64)], [torch.zeros(3)], TypeError, r"averages\[0\]: got torch.int64"),
        ([torch.zeros(3)], [3.0], TypeError, r"values\[0\]: got float"),
        ([torch.zeros(3)], [torch.zeros(3, device="meta")], ValueError, "averages.0. is on cpu, values.0. on meta"),
        (*same_tensor_twice(), ValueError, r"averages\[1\] is the same memory as averages\[0\]"),
        (*value_is_another_average(), ValueError, r"values\[0\] is the same memory as averages\[1\]"),
        ([torch.zeros(1).expand(3)], [torch.zeros(3)], ValueError, r"averages\[0\]: got an expanded tensor"),
    ],
)
def test_errors_name_the_argument(averages, values, error, message):
    with pytest.raises(error, match=message):
        clk.average_(averages, values, 0.5)


def test_weight_must_be_a_number():
    with pytest.raises(TypeError, match="weight: got str, expected a number"):
        clk.average_([torch.zeros(1)], [torch.zeros(1)], "0.5")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rounding": "up"}, ValueError, "rounding: got 'up', expected one of nearest, stochastic"),
        ({"seed": 1}, ValueError, "seed: got 1 with rounding='nearest'"),
        ({"rounding": "stochastic", "seed": 0.5}, TypeError, "seed: got float"),
        ({"rounding": "stochastic", "seed": -1}, ValueError, "seed: got -1, expected 0 to"),
    ],
)
def test_rounding_errors_name_the_argument(options, error, message):
    with pytest.raises(error, match=message):
        clk.average_([torch.zeros(1)], [torch.zeros(1)], 0.5, **options)


def test_three_way_errors_name_the_argument():
    a, v = torch.zeros(3), torch.zeros(3)
    with pytest.raises(ValueError, match="averages and others: 1 tensors against 2"):
        clk.blend_([a], [v], [v, v], 0.5, 0.1)
    with pytest.raises(ValueError, match=r"averages\[0\] is \(3,\), others\[0\] is \(4,\)"):
        clk.blend_([a], [v], [torch.zeros(4)], 0.5, 0.1)
    with pytest.raises(ValueError, match=r"others\[0\] is the same memory as averages\[1\]"):
        clk.blend_([a, v], [torch.ones(3), torch.ones(3)], [v, torch.ones(3)], 0.5, 0.1)
    with pytest.raises(TypeError, match="other_weight: got str, expected a number"):
        clk.blend_([a], [v], [v], 0.5, "0.1")


def test_an_average_with_itself_stays():
    a = torch.randn(5)
    before = a.clone()
    clk.average_([a], [a], 0.7)
    assert torch.equal(a, before)


@pytest.mark.parametrize(("dtype", "weight"), [(torch.bfloat16, 0.001), (torch.float16, 0.0004)])
def test_warns_once_where_a_half_average_would_stall(dtype, weight, monkeypatch):
    monkeypatch.setattr(arguments, "_warned", set())
    average, value = torch.ones(4, dtype=dtype), torch.full((4,), 1.0 + 0.5 * (dtype == torch.bfloat16))
    with pytest.warns(RuntimeWarning, match="can stand still.*float32"):
        clk.average_([average], [value], weight)
    assert torch.equal(average, torch.ones(4, dtype=dtype))  # it does stand still
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clk.average_([average], [value], weight)
        clk.average_([torch.ones(4)], [value], weight)
