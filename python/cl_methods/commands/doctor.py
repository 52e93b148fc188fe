"""``clk doctor``: versions, devices, and which backend runs each operation and why the others do not."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata

from cl_kernels import doctor
from cl_methods.torchvision_compat import prepare_torchvision

PACKAGES = (
    "open_clip_torch",
    "torchvision",
    "numpy",
    "pillow",
    "safetensors",
    "matplotlib",
    "scikit-learn",
    "rich",
    "tyro",
)


def main(arguments: Sequence[str]) -> int:
    """Print the kernels' report and what the methods stand on.

    Raises:
        ValueError: there are arguments.
    """
    if any(argument in ("-h", "--help") for argument in arguments):
        print(
            "usage: clk doctor\n\nVersions, devices, and which backend runs each operation and why the others do not."
        )
        return 0
    if arguments:
        raise ValueError(f"expected no arguments, got {' '.join(arguments)}")
    print(doctor.text())
    print("Methods")
    for name in PACKAGES:
        print(f"  {name:<16} {_version(name)}")
    if prepare_torchvision():
        print("  torchvision's own operators do not load under this torch; nothing here needs them")
    return 0


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
