"""Predicted and measured peak memory of training steps on a CPU, within a budget: one method per process.

    python benchmarks/memory_plan.py zscl --model ViT-B-16-quickgelu --budget 8GiB --precision bf16 --optimizer-state 8bit

The weights are random and made here, images are noise; what is measured is memory and time. The step that is measured is the second
one, which finds the optimiser's state in place; the first has few samples, to save time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time

import torch

from cl_kernels.profile import peak_memory_bytes, resident_bytes, start_peak_memory
from cl_methods.backbone import Backbone
from cl_methods.backbone.open_clip_loading import untrained_open_clip
from cl_methods.datasets.images import TensorImages
from cl_methods.datasets.task import Reference, Task
from cl_methods.methods import METHODS, Batch
from cl_methods.seeding import seed_everything
from cl_methods.training.memory.levers import Levers, use_levers
from cl_methods.training.memory.optimizer_state import with_state
from cl_methods.training.memory.planner import give_back_freed_memory, plan_memory
from cl_methods.training.sizes import format_size, parse_size


def noise(count: int, classes: int) -> TensorImages:
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
    return TensorImages(images, torch.arange(count) % classes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=[name for name, method in METHODS.items() if method.trains])
    parser.add_argument("--model", default="ViT-B-16-quickgelu")
    parser.add_argument("--budget", default="8GiB")
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--captions", type=int, default=512)
    parser.add_argument("--images", type=int, default=64, help="per task, and of the reference set")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--optimizer-state", choices=("fp32", "8bit"), default="fp32")
    options = parser.parse_args()
    levers = Levers(options.precision, options.optimizer_state)

    seed_everything(0)
    start_peak_memory(torch.device("cpu"))
    network, tokenize, _, _ = untrained_open_clip(options.model)
    size = network.visual.image_size
    side = size if isinstance(size, int) else size[0]

    def transform(image: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.interpolate(image[None].float() / 255, size=side)[0]

    backbone = Backbone(network.eval(), tokenize, transform, transform, name=options.model)
    names = tuple(f"class number {number}" for number in range(options.classes))
    tasks = [
        Task(f"task {index}", names, ("a photo of a {}.",), *(noise(options.images, options.classes) for _ in range(3)))
        for index in range(2)
    ]
    captions = tuple(f"a photo of thing number {number} in some place" for number in range(options.captions))
    reference = Reference(noise(options.images, 1), captions)
    method_type = METHODS[options.method]
    settings = method_type.default_config("mtil")
    if hasattr(settings, "ddas"):  # which else needs weights of AlexNet
        settings = dataclasses.replace(settings, ddas=dataclasses.replace(settings.ddas, features="backbone"))

    settings = dataclasses.replace(settings, batch_size=options.batch_size)

    give_back_freed_memory()
    clock = time.perf_counter()
    plan = plan_memory(method_type, settings, backbone, tasks, reference, parse_size(options.budget), levers=levers)
    planning = time.perf_counter() - clock
    print(*plan.lines(), sep="\n", flush=True)

    backbone.micro_batches = plan.micro_batches
    method = method_type(backbone, settings, reference)
    use_levers(method, levers)
    for index, task in enumerate(tasks):  # the first task is not trained: its end would need detectors, memories, …
        method.before_task(index, task)
        method.stage = method.stages(task)[0]
        method.before_stage(method.stage)
        if index == 0 and options.method in ("replay", "icarl", "clap4clip", "proof", "ewc"):
            method.after_task(index, task)
    optimizer = with_state(method.optimizer(), levers.optimizer_state)
    source = method.training_images(tasks[1])
    seconds = 0.0
    for step, count in enumerate((2, settings.batch_size)):
        rows = torch.arange(count) % len(source)
        shown = torch.stack([transform(source.image(row)) for row in rows.tolist()])
        others, places = None, None
        if method.uses_reference:
            places = torch.arange(count) % options.images
            others = torch.stack([transform(reference.images.image(row)) for row in places.tolist()])
        batch = Batch(shown, source.labels[rows], step, others, places, tasks[1], rows)
        if step == 1:
            start_peak_memory(torch.device("cpu"))
        clock = time.perf_counter()
        seed_everything(step)
        optimizer.zero_grad(set_to_none=True)
        terms = method.loss(batch)
        terms["loss"].backward()
        method.before_step(batch)
        optimizer.step()
        method.after_step(step)
        seconds = time.perf_counter() - clock
    measured = peak_memory_bytes(torch.device("cpu"))
    row = {
        "method": options.method,
        "model": options.model,
        "batch_size": settings.batch_size,
        "plan": plan.as_dict(),
        "predicted_bytes": plan.peak,
        "measured_bytes": measured,
        "difference": measured / plan.peak - 1,
        "resident_after": resident_bytes(),
        "planning_seconds": planning,
        "step_seconds": seconds,
    }
    print(f"measured {format_size(measured)}, {100 * row['difference']:+.1f} % of the prediction")
    print(json.dumps(row))


if __name__ == "__main__":
    main()
