"""What code costs: :func:`profile_adapter` for an adapter over a frozen model, and the counters that it is made of.

Counts of operations, FLOPs, bytes and host waits are exact where clocks are not.
"""

from cl_kernels.profile.adapter import profile_adapter, profile_workloads
from cl_kernels.profile.ceilings import Ceilings, measure_ceilings
from cl_kernels.profile.costs import Cost, costs
from cl_kernels.profile.counting import OperationCount
from cl_kernels.profile.layers import Layer
from cl_kernels.profile.memory import ExtraMemory, peak_memory_bytes, resident_bytes, start_peak_memory
from cl_kernels.profile.recorder import Operation, Recorder, StepRecord
from cl_kernels.profile.result import AdapterProfile
from cl_kernels.profile.timing import Spread, Trust, Watch
from cl_kernels.profile.trace import chrome_trace
from cl_kernels.profile.variants import Variant
from cl_kernels.profile.waiting import HostWaits
from cl_kernels.profile.workload import Workload, plain_pytorch, record_step

__all__ = [
    "AdapterProfile",
    "Ceilings",
    "Cost",
    "ExtraMemory",
    "HostWaits",
    "Layer",
    "Operation",
    "OperationCount",
    "Recorder",
    "Spread",
    "StepRecord",
    "Trust",
    "Variant",
    "Watch",
    "Workload",
    "chrome_trace",
    "costs",
    "measure_ceilings",
    "peak_memory_bytes",
    "plain_pytorch",
    "profile_adapter",
    "profile_workloads",
    "record_step",
    "resident_bytes",
    "start_peak_memory",
]
