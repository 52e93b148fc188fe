"""Hardware as data: published peaks of known GPUs, and what a user writes down of others."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import TypeAdapter, ValidationError

TABLE = files("cl_methods") / "forecast" / "hardware.yaml"
"""Known GPUs, with the source of every figure."""

PRECISIONS = ("fp32", "tf32", "bf16")
"""Of the matrix products. `clk run` computes in fp32, PyTorch's default; the others say what faster products would bring."""


@dataclass(frozen=True)
class Hardware:
    """One GPU and the machine that it is part of.

    Attributes:
        name: for tables.
        tflops: 10^12 operations a second of dense matrix products, by precision; ``fp32`` at least.
        memory_gib: of the GPU.
        bandwidth: 10^9 bytes a second of its memory.
        link: 10^9 bytes a second to the other GPUs of its machine, in one direction.
        gpus: of one machine.
        network: 10^9 bits a second that leave a machine, in one direction.
        source: where the figures come from.
        traffic_shares: bytes of one operation -> share of ``bandwidth`` that caches give it, where somebody measured that, with
            straight lines of logarithms between them. Empty: 1 for all.
    """

    name: str
    tflops: Mapping[str, float]
    memory_gib: float
    bandwidth: float
    link: float
    gpus: int = 8
    network: float = 100.0
    source: str = "given"
    traffic_shares: Mapping[float, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for field in ("memory_gib", "bandwidth", "link", "gpus", "network"):
            if not getattr(self, field) > 0:
                raise ValueError(f"{field}: expected a number > 0, got {getattr(self, field)}")
        if not all(size > 0 and share > 0 for size, share in self.traffic_shares.items()):
            raise ValueError(f"traffic_shares: expected sizes > 0 and shares > 0, got {dict(self.traffic_shares)}")
        unknown = [name for name in self.tflops if name not in PRECISIONS]
        if "fp32" not in self.tflops or unknown or not all(value > 0 for value in self.tflops.values()):
            raise ValueError(
                f"tflops: expected numbers > 0 for fp32 and, if known, {' and '.join(PRECISIONS[1:])}; got {dict(self.tflops)}"
            )

    @property
    def memory(self) -> int:
        """Bytes of the GPU."""
        return int(self.memory_gib * 2**30)

    def peak(self, precision: str) -> float:
        """FLOPs a second of matrix products in a precision.

        Raises:
            ValueError: it is unknown, or this GPU has no figure for it.
        """
        if precision not in self.tflops:
            raise ValueError(f"precision: {self.name} has figures for {', '.join(self.tflops)}, got {precision!r}")
        return self.tflops[precision] * 1e12

    def bytes_a_second(self, size: float) -> float:
        """Of an operation that reads and writes ``size`` bytes, at least 0.

        One that is smaller than the smallest of ``traffic_shares`` takes as long as that; one that is larger than the largest
        reaches the same share.
        """
        if not self.traffic_shares:
            return self.bandwidth * 1e9
        known = sorted(self.traffic_shares)
        shares = [math.log(self.traffic_shares[one]) for one in known]
        share = math.exp(float(np.interp(math.log(max(size, known[0])), [math.log(one) for one in known], shares)))
        return self.bandwidth * 1e9 * share * min(1.0, max(size, 1.0) / known[0])

    def between(self, processes: int) -> float:
        """Bytes a second along a ring of so many GPUs: its slowest part, which is the network once there are several machines."""
        link = self.link * 1e9
        return link if processes <= self.gpus else min(link, self.network * 1e9 / 8)


def known_hardware() -> dict[str, Hardware]:
    """Every GPU of the table, by the name that the command line takes."""
    return {name: Hardware(**entry) for name, entry in yaml.safe_load(TABLE.read_text()).items()}


def find_hardware(name: str) -> Hardware:
    """A GPU of the table, or the one that a YAML file describes by the same fields.

    Args:
        name: a key of :func:`known_hardware`, or the path of a file.

    Raises:
        ValueError: neither; or the file lacks a field, has an unknown one or a wrong value.
    """
    known = known_hardware()
    if name in known:
        return known[name]
    path = Path(name)
    if not path.is_file():
        raise ValueError(
            f"hardware: expected one of {', '.join(known)}, or a YAML file with the same fields, got {name!r}"
        )
    try:
        given: Any = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"hardware: {path} is not valid YAML: {error}") from error
    fields = [entry.name for entry in dataclasses.fields(Hardware)]
    if not isinstance(given, dict) or not set(given) <= set(fields):
        found = (
            f"also {', '.join(sorted(map(str, set(given) - set(fields))))}" if isinstance(given, dict) else repr(given)
        )
        raise ValueError(f"hardware: {path} may hold {', '.join(fields)}; found {found}")
    try:
        return TypeAdapter(Hardware).validate_python(given)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, one['loc'])) or 'file'}: {one['msg']}" for one in error.errors())
        raise ValueError(f"hardware: {path}: {problems}") from error
