"""In-place averaging of CLIP ViT-B/16: ours against the published merge loop, torch's own averages and a flat tensor.

All 302 tensors and 149,620,737 weights, whose two copies take 1.2 GB in fp32. ``flat_lerp`` is what torch reaches at best: one
in-place operation on one tensor as large as the model.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

import cl_kernels as clk

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WEIGHT = 1 / 3
PARAMETERS = 149_620_737


def tower(layers: int, width: int) -> list[tuple[int, ...]]:
    """Shapes of one transformer's blocks: two norms, attention, multi-layer perceptron."""
    attention = [(3 * width, width), (3 * width,), (width, width), (width,)]
    perceptron = [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return [(width,), (width,), *attention, (width,), (width,), *perceptron] * layers


def vit_b_16() -> list[tuple[int, ...]]:
    """Shapes of every parameter of open_clip's ViT-B-16, in its order."""
    image = [(768,), (197, 768), (768, 512), (768, 3, 16, 16), *[(768,)] * 2, *tower(12, 768), *[(768,)] * 2]
    return [(77, 512), (512, 512), (), *image, *tower(12, 512), (49408, 512), *[(512,)] * 2]


class Model(torch.nn.Module):
    """Nothing but the parameters, starting at zero or random."""

    def __init__(self, dtype: torch.dtype = torch.float32, random: bool = True, device: str = DEVICE) -> None:
        super().__init__()
        shapes = vit_b_16()
        assert (len(shapes), sum(map(math.prod, shapes))) == (302, PARAMETERS)
        noise = torch.randn(
            max(map(math.prod, shapes)), generator=torch.Generator(device).manual_seed(0), device=device
        )
        for i, shape in enumerate(shapes):
            value = torch.zeros(shape, dtype=dtype, device=device)
            if random:
                value.copy_(noise[: value.numel()].view(shape))
            self.register_parameter(f"p{i}", torch.nn.Parameter(value))


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
    values = [p.detach() for p in Model().parameters()]
    averages = [torch.zeros_like(value) for value in values]

    def run():
        implementation(averages, values)
        return averages

    expected = [WEIGHT * value for value in values]  # after the first call, which is the one that is checked
    measure(run, expected, tolerance=1e-6, floor_bytes=12 * PARAMETERS, flops=3 * PARAMETERS)


def bench_averaged_model(measure):
    """torch's class for the same thing; a fixed weight, because its running mean would stop moving while it is timed."""
    model = Model()
    averaged = AveragedModel(
        Model(random=False),
        multi_avg_fn=lambda a, v, n: torch._foreach_lerp_(a, v, WEIGHT),
        device=torch.device(DEVICE),
    )
    averaged.n_averaged += 1  # the first update would be a copy

    def run():
        averaged.update_parameters(model)
        return [p.detach() for p in averaged.module.parameters()]

    expected = [WEIGHT * p.detach() for p in model.parameters()]
    measure(run, expected, tolerance=1e-6, floor_bytes=12 * PARAMETERS, flops=3 * PARAMETERS)


def bench_flat_lerp(measure):
    value = torch.cat([p.detach().flatten() for p in Model().parameters()])
    average = torch.zeros_like(value)

    def run():
        return [average.lerp_(value, WEIGHT)]

    measure(run, [WEIGHT * value], tolerance=1e-6, floor_bytes=12 * PARAMETERS, flops=3 * PARAMETERS)


MIXED = {
    "fp32_from_bf16": (torch.float32, torch.bfloat16, "nearest"),
    "bf16_from_bf16": (torch.bfloat16, torch.bfloat16, "nearest"),
    "bf16_from_bf16_stochastic": (torch.bfloat16, torch.bfloat16, "stochastic"),
}


@pytest.mark.parametrize("pair", MIXED)
def bench_sixteen_bits(measure, pair):
    average_dtype, value_dtype, rounding = MIXED[pair]
    values = [p.detach() for p in Model(value_dtype).parameters()]
    averages = [torch.zeros_like(value, dtype=average_dtype) for value in values]
    options = {"rounding": rounding, "seed": 1} if rounding == "stochastic" else {}

    def run():
        clk.average_(averages, values, WEIGHT, **options)
        return averages

    size = 2 * average_dtype.itemsize + value_dtype.itemsize
    expected = [WEIGHT * value.float() for value in values]
    tolerance = 1e-6 if average_dtype == torch.float32 else 2.0**-7
    measure(run, expected, tolerance=tolerance, floor_bytes=size * PARAMETERS, flops=3 * PARAMETERS)


def blend_in_two_passes(averages, values, others):
    torch._foreach_lerp_(averages, values, 0.25)
    torch._foreach_lerp_(averages, others, 0.02)


def ours_three_way(averages, values, others):
    clk.blend_(averages, values, others, 0.25 * 0.98, 0.02)


@pytest.mark.parametrize("implementation", [blend_in_two_passes, ours_three_way], ids=lambda f: f.__name__)
def bench_three_way(measure, implementation):
    """A snapshot into the mean, and the mean pulled to a third model."""
    values = [p.detach() for p in Model().parameters()]
    others = [value.flip(0) if value.dim() else value.clone() for value in values]
    averages = [torch.zeros_like(value) for value in values]

    def run():
        implementation(averages, values, others)
        return averages

    expected = [0.245 * v + 0.02 * o for v, o in zip(values, others, strict=True)]
    measure(run, expected, tolerance=1e-5, floor_bytes=16 * PARAMETERS, flops=6 * PARAMETERS)
