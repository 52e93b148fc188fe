"""In-place averaging of a ViT-B/16-sized CLIP: ours against the published merge loop and torch's foreach."""

from __future__ import annotations

import pytest
import torch

import cl_kernels as clk

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WEIGHT = 1 / 3


def model_like(layers: int, width: int) -> list[torch.Tensor]:
    """Parameters of the shapes of one transformer tower."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3 * width, width), (3 * width,), (width, width), (width,), (4 * width, width), (4 * width,)]
    shapes += [(width, 4 * width), (width,), (width,), (width,), (width,), (width,)]
    return [torch.randn(shape, generator=generator).to(DEVICE) for _ in range(layers) for shape in shapes]


def published_merge(averages, values):
    n = 1 / WEIGHT - 1
    for average, value in zip(averages, values, strict=True):
        average.data = (average.data * n + value.data) / (1 + n)


def foreach_lerp(averages, values):
    torch._foreach_lerp_(averages, values, WEIGHT)


def ours(averages, values):
    clk.average_(averages, values, WEIGHT)


@pytest.mark.parametrize("implementation", [published_merge, foreach_lerp, ours], ids=lambda f: f.__name__)
def bench_average(measure, implementation):
    values = model_like(layers=6, width=768)
    averages = [torch.zeros_like(value) for value in values]

    def run():
        implementation(averages, values)
        return averages

    parameters = sum(value.numel() for value in values)
    expected = [WEIGHT * value for value in values]  # after the first call, which is the one that is checked
    measure(run, expected, tolerance=1e-6, floor_bytes=12 * parameters, flops=3 * parameters)
