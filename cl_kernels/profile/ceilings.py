"""What the machine at hand reaches at best, measured in the same run as what is compared with it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cl_kernels.profile.timing import interleaved


@dataclass(frozen=True)
class Ceilings:
    """Best rates of a large fp32 matrix product and of a large copy.

    Attributes:
        flops_per_second: of the product, 2 for each multiply-add.
        bytes_per_second: of the copy, read and written.
    """

    flops_per_second: float
    bytes_per_second: float

    @property
    def ridge(self) -> float:
        """FLOPs per byte from which on the product's rate is the limit."""
        return self.flops_per_second / self.bytes_per_second

    def floor(self, flops: float, moved: float) -> float:
        """Seconds below which so many FLOPs on so many bytes cannot come."""
        return max(flops / self.flops_per_second, moved / self.bytes_per_second)


def measure_ceilings(device: torch.device, repeats: int = 5) -> Ceilings:
    """Both ceilings of ``device``, from the fastest fifth of the repetitions.

    Args:
        device: a CPU or a GPU.
        repeats: of each.
    """
    size, length = (8192, 2**28) if device.type == "cuda" else (1024, 2**25)
    a, b, product = (torch.ones(size, size, device=device) for _ in range(3))
    source, target = torch.ones(length, device=device), torch.empty(length, device=device)
    times = interleaved(
        {"product": lambda: torch.mm(a, b, out=product), "copy": lambda: target.copy_(source)}, repeats, device
    )
    return Ceilings(2 * size**3 / times["product"].p20, 2 * 4 * length / times["copy"].p20)
