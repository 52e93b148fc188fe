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

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
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

    def __init__(self, dtype: torch.dtype = torch.float32, random: bool = True, device: torch.device = DEVICE) -> None:
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


def lists(model: Model, average: Model) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return [p.detach() for p in average.parameters()], [p.detach() for p in model.parameters()]


def published_merge(model, average):
    averages, values = lists(model, average)
    n = 1 / WEIGHT - 1

    def run():
        for a, v in zip(averages, values, strict=True):
            a.data = (a.data * n + v.data) / (1 + n)
        return averages

    return run


def foreach_lerp(model, average):
    averages, values = lists(model, average)

    def run():
        torch._foreach_lerp_(averages, values, WEIGHT)
        return averages

    return run


def averaged_model(model, average):
    """torch's class; with a fixed weight, because its running mean would stop moving while it is timed."""
    averaged = AveragedModel(average, multi_avg_fn=lambda a, v, n: torch._foreach_lerp_(a, v, WEIGHT), device=DEVICE)
    averaged.n_averaged += 1  # the first update would be a copy

    def run():
        averaged.update_parameters(model)
        return [p.detach() for p in averaged.module.parameters()]

    return run


def flat_lerp(model, average):
    flat, value = (torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (average, model))
    shapes = [p.shape for p in model.parameters()]

    def run():
        flat.lerp_(value, WEIGHT)
        return [
            piece.view(shape) for piece, shape in zip(flat.split(list(map(math.prod, shapes))), shapes, strict=True)
        ]

    return run


def ours(model, average):
    averages, values = lists(model, average)

    def run():
        clk.average_(averages, values, WEIGHT)
        return averages

    return run


@pytest.mark.parametrize(
    "implementation", [published_merge, foreach_lerp, averaged_model, flat_lerp, ours], ids=lambda f: f.__name__
)
def bench_average(measure, implementation):
    model = Model()
    run = implementation(model, Model(random=False))
    expected = [
        WEIGHT * p.detach() for p in model.parameters()
    ]  # after the first call, which is the one that is checked
    measure(run, expected, tolerance=1e-6, floor_bytes=12 * PARAMETERS, flops=3 * PARAMETERS)


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


def two_passes(averages, values, others):
    torch._foreach_lerp_(averages, values, 0.25)
    torch._foreach_lerp_(averages, others, 0.02)


def one_pass(averages, values, others):
    clk.blend_(averages, values, others, 0.25 * 0.98, 0.02)


one_pass.__name__ = "ours"  # by which the ratios find it


@pytest.mark.parametrize("implementation", [two_passes, one_pass], ids=lambda f: f.__name__)
def bench_three_way(measure, implementation):
    """A snapshot into the mean, and the mean pulled to a third model."""
    averages, values = lists(Model(), Model(random=False))
    others = [value.flip(0) if value.dim() else value.clone() for value in values]

    def run():
        implementation(averages, values, others)
        return averages

    expected = [0.245 * v + 0.02 * o for v, o in zip(values, others, strict=True)]
    measure(run, expected, tolerance=1e-5, floor_bytes=16 * PARAMETERS, flops=6 * PARAMETERS)
