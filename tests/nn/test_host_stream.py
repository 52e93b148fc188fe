"""Tensors of the host brought to a device through two slots: all of them, in order, in bounded memory, and without a race."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from pretended_streams import Device, Event

from cl_kernels.host_copy import HostCopy
from cl_kernels.host_stream import SLOTS, HostStream, staging_bytes

CPU = torch.device("cpu")


def ragged(seed=0):
    """Five parts of unlike sizes and dtypes, one of them empty, one with an empty tensor and a single number."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [[(3, 5), (7,)], [(1,), (0, 4), ()], [], [(2, 2, 9), (11, 3)], [(13,)]]
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.int64]
    numbers = iter(range(100))
    return [
        [(9 * torch.randn(shape, generator=generator)).to(dtypes[next(numbers) % len(dtypes)]) for shape in part]
        for part in shapes
    ]


def copies(parts: Iterator[list[torch.Tensor]]) -> list[list[torch.Tensor]]:
    return [[value.clone() for value in part] for part in parts]


def same(found, expected) -> bool:
    assert [len(part) for part in found] == [len(part) for part in expected]
    rows = [(a, b) for one, other in zip(found, expected, strict=True) for a, b in zip(one, other, strict=True)]
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in rows)


def test_every_part_comes_through_two_slots():
    parts, stream = ragged(), HostStream(CPU)
    assert stream.nbytes == 0
    for number, part in enumerate(stream.stream(parts)):
        rooms = [slot.room.untyped_storage().data_ptr() for slot in stream._slots]
        held = {value.untyped_storage().data_ptr() for value in part if value.numel()}
        assert held <= {rooms[number % SLOTS]}
        assert all(value.data_ptr() % value.element_size() == 0 for value in part)
    assert same(copies(stream.stream(parts)), parts)
    # The largest part has 36 bfloat16 and 33 float64 numbers, each tensor at a multiple of 16 bytes.
    largest = max(sum(-(-value.nbytes // 16) * 16 for value in part) for part in parts)
    assert stream.nbytes == staging_bytes(parts) == 2 * largest
    assert copies(stream.stream([])) == []


def test_slots_grow_for_a_larger_part_and_stay():
    stream, small, large = HostStream(CPU), [[torch.ones(3)]], [[torch.arange(50.0)], [torch.ones(2)]]
    assert same(copies(stream.stream(small)), small)
    assert stream.nbytes == 2 * 16
    assert same(copies(stream.stream(large)), large)
    assert same(copies(stream.stream(small)), small)
    assert stream.nbytes == 2 * 208


def test_what_takes_no_place_is_handed_on():
    """Tensors that lie on the device, and those that are not contiguous."""
    turned, elsewhere = torch.arange(6.0).view(2, 3).T, torch.empty(2, device="meta")
    stream = HostStream(CPU)
    (found,) = stream.stream([[turned, torch.ones(2)]])
    assert found[0] is turned
    assert found[1].tolist() == [1, 1]
    assert stream.nbytes == 2 * 16
    other = HostStream(torch.device("meta"))
    (found,) = other.stream([[elsewhere]])
    assert found[0] is elsewhere
    assert other.nbytes == 0


def test_a_pass_that_ends_early_leaves_the_next_one_whole():
    parts, stream = ragged(), HostStream(CPU)
    passing = stream.stream(parts)
    next(passing)
    passing.close()
    assert same(copies(stream.stream(parts)), parts)


def test_nothing_is_read_before_it_has_come_or_overwritten_before_it_was_read(monkeypatch):
    """Order on the device, by vector clocks; with copies that are made as late as the order allows, so data would be wrong too."""
    parts = [part for part in ragged() if part]
    with Device(monkeypatch) as device:
        stream = HostStream(CPU)
        for _ in range(3):
            passing = stream.stream(parts)
            first = [value.clone() for value in next(passing)]
            assert device.used[-len(first) :] == [("main", "reads")] * len(first)
            copied = device.used.count(("side", "writes"))
            assert copied % len(parts) == SLOTS % len(
                parts
            )  # the second part is on its way before the first is worked on
            found = [first, *copies(passing)]
            assert same(found, parts)
        broken = stream.stream(parts)
        next(broken)[0].clone()
        broken.close()
        assert (
            device.main.clock["side"] == device.side.clock["side"]
        )  # nothing is under way into slots that may be given up now
        larger = [[torch.arange(100.0)], *parts]
        assert same(copies(stream.stream(larger)), larger)


def test_copies_that_are_still_on_their_way_to_the_host_come_first(monkeypatch):
    order = []

    class Copy(HostCopy):
        def precede(self, stream) -> None:
            order.append(stream.name)

    with Device(monkeypatch) as device:
        passing = HostStream(CPU).stream([[torch.ones(2)]], Copy({}))
        next(passing)
        assert order == ["side"]
        passing.close()
    copy = HostCopy({})
    copy._done = {CPU: Event()}
    copy._done[CPU].clock["copying"] = 7
    copy.precede(device.side)
    assert device.side.clock["copying"] == 7


@pytest.mark.gpu
def test_on_a_gpu():
    """Through pinned memory while the device is busy, without waiting for it; slots are all that is taken."""
    from gpu_steps import waiting_is_an_error

    generator = torch.Generator().manual_seed(0)
    held = [torch.randn(size, generator=generator).cuda() for size in (3_000_000, 5, 700_001, 1_000_003)]
    named = {str(n): value for n, value in enumerate(held)}
    copy = HostCopy(named)
    copy.start(named)
    expected = [value.clone() for value in held]
    for value in held:
        value.fill_(-1)  # enqueued at once: may not overtake the copy
    parts = [[copy.tensors[str(n)]] for n in range(4)]
    stream, before = HostStream(torch.device("cuda", torch.cuda.current_device())), torch.cuda.memory_allocated()
    sums = [torch.empty(len(expected), device="cuda") for _ in range(5)]
    for turn in range(5):
        with waiting_is_an_error():
            torch.cuda._sleep(50_000_000)
            for n, (value,) in enumerate(stream.stream(parts, copy)):
                sums[turn][n] = value.sum()
    wanted = torch.stack([value.sum() for value in expected])
    assert all(torch.equal(found, wanted) for found in sums)
    del expected, wanted, sums
    assert stream.nbytes == staging_bytes(parts) == 2 * 12_000_000
    assert 0 < torch.cuda.memory_allocated() - before <= stream.nbytes + 4096
