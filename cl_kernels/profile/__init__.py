"""Counting what code costs: dispatched operations, memory. Exact where clocks are not."""

from cl_kernels.profile.counting import OperationCount
from cl_kernels.profile.memory import ExtraMemory, peak_memory_bytes, start_peak_memory
from cl_kernels.profile.waiting import HostWaits

__all__ = ["ExtraMemory", "HostWaits", "OperationCount", "peak_memory_bytes", "start_peak_memory"]
