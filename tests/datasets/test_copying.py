"""Batches on their way to the device: their order and bits, one copy ahead, errors in their turn."""

from __future__ import annotations

import pytest
import torch

from cl_methods.datasets.copying import on_device, one_ahead
from cl_methods.datasets.images import DataError


def items(count: int, broken: int | None = None):
    for number in range(count):
        if number == broken:
            raise DataError(f"image {number} is broken")
        images = torch.arange(number, number + 2 * 3 * 4 * 4, dtype=torch.float32).view(2, 3, 4, 4)
        yield {"images": images, "labels": torch.tensor([number, 0]), "indices": torch.tensor([number, 1])}


def test_the_next_item_is_begun_before_the_present_one_is_used():
    seen = []

    def start(number):
        seen.append(f"copy {number}")
        return -number

    for found in one_ahead(range(1, 4), start):
        seen.append(f"use {found}")
    assert seen == ["copy 1", "copy 2", "use -1", "copy 3", "use -2", "use -3"]
    assert list(one_ahead([], start)) == []


def test_an_error_waits_for_its_turn():
    found = one_ahead(items(4, broken=2), lambda item: item)
    assert [int(next(found)["labels"][0]) for _ in range(2)] == [0, 1]
    with pytest.raises(DataError, match=r"^image 2 is broken$"):
        next(found)


def test_a_copy_that_fails_is_raised_too():
    with pytest.raises(RuntimeError, match="out of memory"):
        list(one_ahead(items(3), lambda item: (_ for _ in ()).throw(RuntimeError("out of memory"))))


def test_on_a_cpu_items_are_what_they_were():
    given = list(items(3))
    for found, item in zip(on_device(given, torch.device("cpu")), given, strict=True):
        assert found.keys() == item.keys()
        assert all(found[name] is item[name] for name in item)


@pytest.mark.gpu
def test_on_a_gpu_bits_arrive_before_they_are_read():
    device = torch.device("cuda")
    busy = torch.randn(2048, 2048, device=device)
    given = list(items(20))
    sums, last = [], None
    for found in on_device(iter(given), device):
        assert found["indices"].device.type == "cpu"
        assert found["images"].is_contiguous(memory_format=torch.channels_last)
        busy = busy @ busy / busy.norm()  # the copies overtake what is computed; their readers must not overtake them
        sums.append(found["images"].double().sum() + found["labels"].sum())
        last = found
    expected = [item["images"].double().sum() + item["labels"].sum() for item in given]
    torch.testing.assert_close(torch.stack(sums).cpu(), torch.stack(expected), rtol=0, atol=0)
    assert torch.equal(last["images"].cpu(), given[-1]["images"])
