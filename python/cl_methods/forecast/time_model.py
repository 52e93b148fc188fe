"""Seconds of counted work on given hardware: every operation at the speed of what limits it, then exchange and reading."""

from __future__ import annotations

from dataclasses import dataclass

from cl_methods.forecast.hardware import Hardware
from cl_methods.forecast.work import Work


@dataclass(frozen=True)
class Reached:
    """How much of a peak is reached, and what does not depend on the hardware's table.

    The defaults are assumptions for GPUs, between what published kernels reach and what whole training steps do; nothing was
    measured. :mod:`benchmarks.step_scaling <benchmarks>` fits shares, ``call`` and ``start`` on the CPU at hand.

    Attributes:
        products: share of the peak that matrix products and attention reach.
        memory: share of the memory's bandwidth that everything reaches; above 1 where caches serve much of it.
        links: share of the links' bandwidth that an exchange reaches.
        call: seconds that the host needs for one operation.
        start: seconds that a product or attention takes on the device besides, so that small ones reach less of the peak than
            large ones: half of ``products`` with ``start · products · peak`` FLOPs.
        exchange: seconds before an exchange moves anything.
        decoding: images a second that one data-loading process reads, decodes and transforms.
    """

    products: float = 0.6
    memory: float = 0.8
    links: float = 0.7
    call: float = 7e-6
    start: float = 0.0
    exchange: float = 50e-6
    decoding: float = 220.0

    def __post_init__(self) -> None:
        for name in ("products", "memory", "links"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a share > 0, got {getattr(self, name)}")
        for name in ("call", "start", "exchange"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected seconds >= 0, got {getattr(self, name)}")
        if not self.decoding > 0:
            raise ValueError(f"decoding: expected images a second > 0, got {self.decoding}")


@dataclass(frozen=True)
class Seconds:
    """Where time goes; some of it at the same time.

    Attributes:
        products: in operations that arithmetic limits.
        memory: in operations that memory limits.
        host: that the host needs to start all of them.
        exchange: among the processes; nothing else goes on meanwhile.
        reading: images, by all data-loading processes of this process together.
        ahead: whether reading goes on beside everything else.
        asynchronous: whether the host starts operations while earlier ones run.
    """

    products: float = 0.0
    memory: float = 0.0
    host: float = 0.0
    exchange: float = 0.0
    reading: float = 0.0
    ahead: bool = True
    asynchronous: bool = True

    @property
    def computing(self) -> float:
        """Products, memory and host."""
        busy = self.products + self.memory
        return max(busy, self.host) if self.asynchronous else busy + self.host

    @property
    def total(self) -> float:
        """Wall clock."""
        busy = self.computing + self.exchange
        return max(busy, self.reading) if self.ahead else busy + self.reading

    @property
    def parts(self) -> dict[str, float]:
        """Seconds by what takes them."""
        return {
            "arithmetic": self.products,
            "memory": self.memory,
            "host": self.host,
            "exchange": self.exchange,
            "reading": self.reading,
        }

    @property
    def binds(self) -> str:
        """What a faster piece of would help most: a key of :attr:`parts`."""
        parts = self.parts
        if self.ahead and self.reading > self.computing + self.exchange:
            return "reading"
        if self.asynchronous:  # of device and host only the slower one counts
            slower = ("host",) if self.host > self.products + self.memory else ("arithmetic", "memory")
            parts = {name: parts[name] for name in (*slower, "exchange", *(() if self.ahead else ("reading",)))}
        return max(parts, key=lambda name: parts[name])


def seconds(
    work: Work,
    hardware: Hardware,
    processes: int = 1,
    *,
    precision: str = "fp32",
    workers: int = 0,
    reached: Reached | None = None,
    asynchronous: bool = True,
) -> Seconds:
    """Seconds of ``work`` in each of ``processes``, one GPU each.

    ``Σ_operations max(start + FLOPs / peak, bytes / bandwidth)`` on the device, without ``start`` where there are no FLOPs; the
    host's time per operation beside it; ``2 (N-1)/N`` of every summed and ``(N-1)/N`` of every gathered tensor over the slowest
    link of a ring.

    Args:
        work: of one process.
        hardware: of each.
        processes: N.
        precision: of the products; everything else is fp32.
        workers: data-loading processes of each; with none the process reads by itself, and nothing else goes on.
        reached: shares of the peaks.
        asynchronous: as on a GPU.

    Raises:
        ValueError: ``processes`` or ``workers`` is impossible, or the hardware has no such precision.
    """
    if processes < 1 or workers < 0:
        raise ValueError(f"expected processes >= 1 and workers >= 0, got {processes} and {workers}")
    reached = reached or Reached()
    peak = hardware.peak(precision) * reached.products
    products = memory = 0.0
    for (flops, moved), times in work.calls.items():
        arithmetic = flops / peak + (reached.start if flops else 0.0)
        traffic = moved / (hardware.bytes_a_second(moved) * reached.memory)
        if arithmetic > traffic:
            products += times * arithmetic
        else:
            memory += times * traffic
    sent = sum(2 * size * n for size, n in work.summed.items()) + sum(size * n for size, n in work.gathered.items())
    share = (processes - 1) / processes
    exchanges = sum(work.summed.values()) + sum(work.gathered.values())
    exchange = share * sent / (hardware.between(processes) * reached.links) + exchanges * reached.exchange
    return Seconds(
        products,
        memory,
        work.operations * reached.call,
        exchange if processes > 1 else 0.0,
        work.images / (max(1, workers) * reached.decoding),
        ahead=workers > 0,
        asynchronous=asynchronous,
    )
