"""What is installed, what this machine has, and which backend runs each operation and why the others do not.

``python -m cl_kernels.doctor`` prints it; :func:`report` returns it. Needs torch alone.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from cl_kernels import dispatch, library


def report() -> dict[str, Any]:
    """Everything that decides which kernels run, as plain values.

    Returns:
        ``versions`` by package (None where it is not installed); ``devices``, a list of ``{"kind", "name", …}``; ``build``, what
        setup.py recorded (``native``, ``reason``, compiler, torch, architectures); ``library``, whether the compiled library is
        loaded, the reason if not, and the instruction set in use; ``environment``, the variables that change the choice;
        ``operations``, for each operation the backend ``chosen`` by device and the status of every one of its ``backends``.
    """
    return {
        "versions": _versions(),
        "devices": _devices(),
        "build": library.build_information(),
        "library": _library(),
        "environment": _environment(),
        "operations": {
            operation: {"chosen": _chosen(statuses), "backends": statuses}
            for operation, statuses in dispatch.backends().items()
        },
    }


def text(found: dict[str, Any] | None = None) -> str:
    """The report as lines for a terminal.

    Args:
        found: a :func:`report`; made now when None.
    """
    found = found or report()
    lines = ["Versions"]
    lines += [f"  {name:<12} {version or 'not installed'}" for name, version in found["versions"].items()]
    lines += ["Devices", *(f"  {device['kind']:<12} {device['name']}" for device in found["devices"])]
    compiled, build = found["library"], found["build"]
    lines.append("Compiled library")
    if compiled["loaded"]:
        lines.append(f"  loaded       built by {build.get('compiler')} against torch {build.get('torch')}")
        lines.append(f"  CPU          {compiled['instruction_set']}")
        architectures = " ".join(f"sm_{a}" for a in build.get("cuda_architectures", []))
        lines.append(f"  CUDA         {architectures or build.get('cuda_reason')}")
    else:
        lines.append(f"  not loaded   {compiled['reason']}")
    if found["environment"]:
        lines += ["Environment", *(f"  {name}={value}" for name, value in found["environment"].items())]
    lines.append("Operations")
    for operation, entry in found["operations"].items():
        chosen = ", ".join(f"{backend} on {device}" for device, backend in entry["chosen"].items())
        lines.append(f"  {operation}: {chosen}")
        lines += [f"    {backend:<10} {status}" for backend, status in entry["backends"].items()]
    return "\n".join(lines)


def _versions() -> dict[str, str | None]:
    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    import cl_kernels

    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "triton": version("triton"),
        "cl_kernels": cl_kernels.__version__,
    }


def _devices() -> list[dict[str, Any]]:
    devices: list[dict[str, Any]] = [
        {"kind": "cpu", "name": _processor(), "threads": torch.get_num_threads(), "machine": platform.machine()}
    ]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            devices.append(
                {
                    "kind": f"cuda:{index}",
                    "name": properties.name,
                    "architecture": f"sm_{properties.major}{properties.minor}",
                    "memory_bytes": properties.total_memory,
                }
            )
    return devices


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _library() -> dict[str, Any]:
    if library.load_error:
        return {"loaded": False, "reason": library.load_error, "instruction_set": None}
    try:
        host = importlib.import_module("cl_kernels._host")
    except ImportError as error:
        # The kernels serve every Python; this module is built for one.
        built = sorted(path.name for path in Path(__file__).parent.glob("_host*"))
        active = f"unknown: {built[0] if built else '_host'} does not import under Python {platform.python_version()} ({error})"
        return {"loaded": True, "reason": "", "instruction_set": active}
    return {"loaded": True, "reason": "", "instruction_set": host.active_instruction_set()}


def _environment() -> dict[str, str]:
    names = ("CL_KERNELS_BACKEND", "CL_KERNELS_ISA", "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
    return {name: os.environ[name] for name in names if name in os.environ}


def _chosen(statuses: dict[str, str]) -> dict[str, str]:
    kinds = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return {kind: next(b for b in dispatch.PREFERENCE[kind] if statuses[b] == dispatch.AVAILABLE) for kind in kinds}


if __name__ == "__main__":
    sys.stdout.write(text() + "\n")
