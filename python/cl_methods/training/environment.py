"""What a result depends on besides its configuration: versions, device, threads, memory."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import cl_kernels
from cl_methods import ranks


def choose_device(name: str) -> torch.device:
    """``auto`` is the first GPU if there is one, else the CPU; of several processes of a machine, each has a GPU of its own.

    Raises:
        ValueError: the device does not exist here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and ranks.joined_count() > 1:
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: expected cpu, cuda, cuda:N or auto, got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: {name} was asked for, but torch {torch.__version__} sees no CUDA device")
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise ValueError(f"device: {name} was asked for, but there are only {torch.cuda.device_count()} CUDA devices")
    return device


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Versions and hardware that a result may depend on; the same on every run of one machine."""
    packages = ("open_clip_torch", "torchvision", "numpy", "triton", "safetensors")
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "cl_kernels": cl_kernels.__version__,
        **{name: version for name in packages if (version := _version(name)) is not None},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "processes": ranks.joined_count(),
        "backends": {
            operation: [name for name, status in backends.items() if status == "available"]
            for operation, backends in cl_kernels.backends().items()
        },
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """The CPU's name, with the widest vector instructions that torch found."""
    name = platform.processor() or platform.machine()
    if platform.system() == "Linux":
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"
