"""The counts and the memory figures that benchmarks and run results are made of."""

from __future__ import annotations

import sys

import pytest
import torch

from cl_kernels.profile import ExtraMemory, OperationCount, peak_memory_bytes, start_peak_memory

CPU = torch.device("cpu")
MIB = 2**20
linux = pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell")


def test_views_are_not_operations():
    x = torch.ones(3, 4)
    with OperationCount() as count:
        (x.T.reshape(2, 6)[0] + 1).mul_(2)
    assert count.by_name == {"aten::clone": 1, "aten::_unsafe_view": 1, "aten::add": 1, "aten::mul_": 1}
    assert count.operations == 4


@linux
def test_peak_memory_is_that_since_the_start():
    with ExtraMemory(CPU):  # gives back what earlier tests freed, in which tensors would take no new memory
        start_peak_memory(CPU)  # whatever they needed
    large = torch.ones(64, MIB)  # 256 MiB
    before = peak_memory_bytes(CPU)
    del large
    start_peak_memory(CPU)
    assert peak_memory_bytes(CPU) < before - 200 * MIB
    torch.ones(32, MIB)
    assert peak_memory_bytes(CPU) > before - 160 * MIB


@linux
@pytest.mark.parametrize(
    ("mebibytes", "slack"), [(1, 0.5), (40, 4.5)]
)  # large ones may begin and end in huge pages of 2 MiB
def test_extra_memory_sees_what_was_needed_for_a_moment(mebibytes, slack):
    torch.ones(mebibytes, MIB // 4).sum()  # whatever a first call sets up, and memory that the allocator might keep
    with ExtraMemory(CPU) as extra:
        torch.ones(mebibytes, MIB // 4).sum()
    assert extra.bytes is not None
    assert abs(extra.bytes - mebibytes * MIB) < slack * MIB


def test_a_failure_inside_is_not_hidden():
    with pytest.raises(ZeroDivisionError), ExtraMemory(CPU):
        1 / 0  # noqa: B018


def test_a_numbered_gpu_is_woken_before_its_peak_is_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch answers "Invalid device argument" otherwise, which would end every run on cuda:0 at its first line."""
    calls: list[object] = []
    monkeypatch.setattr(torch.cuda, "init", lambda: calls.append("init"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", calls.append)
    start_peak_memory(torch.device("cuda:1"))
    assert calls == ["init", torch.device("cuda:1")]
