"""What a run says about the machine and about the memory that it took."""

from __future__ import annotations

import sys

import pytest
import torch

from cl_methods.training.environment import peak_memory_bytes, start_peak_memory


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lets a process begin a new measurement")
def test_peak_memory_is_that_since_the_start():
    cpu = torch.device("cpu")
    large = torch.ones(64, 2**20)  # 256 MiB
    before = peak_memory_bytes(cpu)
    del large
    start_peak_memory(cpu)
    assert peak_memory_bytes(cpu) < before - 200 * 2**20
    torch.ones(32, 2**20)
    assert peak_memory_bytes(cpu) > before - 160 * 2**20
