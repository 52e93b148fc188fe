"""What is counted of operations, and how counts become seconds."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from cl_methods.forecast.hardware import Hardware
from cl_methods.forecast.time_model import Reached, seconds
from cl_methods.forecast.work import Work, WorkCount

GPU = Hardware("x", {"fp32": 1.0}, memory_gib=8, bandwidth=100, link=10, gpus=2, network=8)
ALL = Reached(products=1, memory=1, links=1, call=1e-6, exchange=0, decoding=100)


def test_operations_are_counted_with_what_they_read_and_write() -> None:
    a, b = torch.empty(4, 8, device="meta"), torch.empty(8, 2, device="meta")
    table, rows = torch.empty(1000, 8, device="meta"), torch.empty(3, dtype=torch.int64, device="meta")
    with WorkCount() as count:
        product = a @ b  # 2 · 4 · 8 · 2 FLOPs; 128 + 64 bytes read, 32 written
        product.T.add_(1)  # a view is nothing; 32 read, 32 written
        torch.empty(99, device="meta")
        torch._foreach_add_([a, b], 1.0)  # one operation; 192 read, 192 written
        table[rows]  # not the whole table: 3 rows of 32 bytes read and written
        product.copy_(product.new_empty(()).expand(4, 2))  # 4 read, 32 written
    assert count.calls == Counter({(128, 224): 1, (0, 64): 1, (0, 384): 1, (0, 192): 1, (0, 36): 1})
    assert (count.work.flops, count.work.operations, count.work.bytes) == (128, 5, 900)


def test_what_backward_needs_is_counted_once_and_without_weights() -> None:
    weight = torch.empty(8, 8, device="meta", requires_grad=True)
    x = torch.empty(2, 8, device="meta")
    with WorkCount([weight, x]) as count:
        hidden = (x @ weight).relu()  # the sign of its result is kept
        (hidden @ weight).sum()  # and the result again, as an argument
    assert count.saved == 2 * 8 * 4


def test_sums_and_multiples_are_exact() -> None:
    work = Work(Counter({(10, 4): 2}), Counter({8: 1}), Counter({6: 3}), images=5)
    twice = work + work
    assert twice == work * 2
    assert (twice.flops, twice.bytes, twice.exchanged, twice.images) == (40, 16, 52, 10)
    assert (work + work * -1).flops == 0


def test_every_operation_runs_at_the_speed_of_what_limits_it() -> None:
    work = Work(Counter({(10**12, 10): 2, (5, 10**11): 3}))  # 2 s of arithmetic, 3 s of memory
    found = seconds(work, GPU, reached=ALL)
    assert found.parts == pytest.approx({"arithmetic": 2, "memory": 3, "host": 5e-6, "exchange": 0, "reading": 0})
    assert (found.total, found.binds) == (pytest.approx(5), "memory")
    assert seconds(work, GPU, reached=Reached(products=0.5, memory=1, call=0)).total == pytest.approx(7)


def test_small_products_reach_less_of_the_peak() -> None:
    """Half of it where the product proper takes as long as its start; what has no FLOPs has no start."""
    slow = replace(ALL, products=0.5, start=1e-3)
    half = 1e-3 * 0.5 * 1e12
    for flops, share in ((half / 100, 1 / 101), (half, 1 / 2), (half * 100, 100 / 101)):
        found = seconds(Work(Counter({(flops, 0): 3})), GPU, reached=slow)
        assert flops / (found.products / 3) == pytest.approx(share * 0.5e12)
    assert seconds(Work(Counter({(0, 100): 3})), GPU, reached=slow).products == 0


def test_memory_is_as_fast_as_it_is_for_operations_of_this_size() -> None:
    card = replace(GPU, traffic_shares={1e7: 4.0, 1e9: 1.0})
    found = seconds(Work(Counter({(0, 10**7): 100, (0, 10**11): 1})), card, reached=replace(ALL, memory=0.5))
    assert found.memory == pytest.approx((100 * 1e-4 / 4 + 1) / 0.5)


def test_a_gpu_waits_for_the_host_and_a_cpu_is_the_host() -> None:
    work = Work(Counter({(0, 100): 1000}))  # 1 µs in all; the host needs 1 ms
    ahead, alone = (seconds(work, GPU, reached=ALL, asynchronous=flag) for flag in (True, False))
    assert (ahead.total, ahead.binds) == (pytest.approx(1e-3), "host")
    assert alone.total == pytest.approx(1e-3 + 1e-6)


def test_exchange_takes_the_ring_and_the_slowest_link() -> None:
    work = Work(summed=Counter({10**10: 1}), gathered=Counter({10**10: 1}))
    assert seconds(work, GPU, 1, reached=ALL).exchange == 0
    assert seconds(work, GPU, 2, reached=ALL).exchange == pytest.approx(3 * 0.5)  # 10 GB/s within the machine
    assert seconds(work, GPU, 4, reached=ALL).exchange == pytest.approx(3 * 0.75 * 10)  # 1 GB/s between machines


def test_reading_hides_behind_workers_only() -> None:
    work = Work(Counter({(10**12, 0): 1}), images=400)
    alone, two, eight = (seconds(work, GPU, workers=count, reached=ALL) for count in (0, 2, 8))
    assert [one.total for one in (alone, two, eight)] == pytest.approx([5, 2, 1])
    assert [one.binds for one in (alone, two, eight)] == ["reading", "reading", "arithmetic"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"products": 0}, "products: expected a share > 0, got 0"),
        ({"decoding": 0}, "decoding: expected images a second > 0"),
    ],
)
def test_impossible_shares_are_refused(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Reached(**wrong)
    with pytest.raises(ValueError, match="expected processes >= 1"):
        seconds(Work(), GPU, 0)
