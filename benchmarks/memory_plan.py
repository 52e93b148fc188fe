"""Predicted and measured peak memory of training steps on a CPU, within a budget: one method at a time, in one process or several.

    python benchmarks/memory_plan.py zscl --model ViT-B-16-quickgelu --budget 8GiB --precision bf16 --optimizer-state 8bit
    python benchmarks/memory_plan.py zscl --layers 6 --batch-size 16 --processes 2 --distributed fsdp

The weights are random and made here, images are noise; what is measured is memory and time. The step that is measured is the second
one, which finds the optimiser's state in place; the first has few samples, to save time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import socket
import sys
import time
from typing import Any

import torch
from torch import nn

from cl_kernels.profile import peak_memory_bytes, resident_bytes, start_peak_memory
from cl_methods import ranks
from cl_methods.backbone import Backbone
from cl_methods.backbone.open_clip_loading import untrained_open_clip
from cl_methods.datasets.images import TensorImages
from cl_methods.datasets.task import Reference, Task
from cl_methods.methods import METHODS, Batch
from cl_methods.seeding import seed_everything
from cl_methods.sharding import local, shard
from cl_methods.training.distributed import processes
from cl_methods.training.gradients import average_gradients
from cl_methods.training.memory.levers import Levers, use_levers
from cl_methods.training.memory.optimizer_state import with_state
from cl_methods.training.memory.plan import MemoryPlan
from cl_methods.training.memory.planner import give_back_freed_memory, plan_memory
from cl_methods.training.sizes import parse_size
from cl_methods.training.task import use_micro_batches


def noise(count: int, classes: int) -> TensorImages:
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
    return TensorImages(images, torch.arange(count) % classes)


def main() -> None:
    """The command line; starts the processes where there are several."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=[name for name, method in METHODS.items() if method.trains])
    parser.add_argument("--model", default="ViT-B-16-quickgelu")
    parser.add_argument("--layers", type=int, help="of both towers; all by default")
    parser.add_argument("--budget", default="8GiB")
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--captions", type=int, default=512)
    parser.add_argument("--images", type=int, default=64, help="per task, and of the reference set")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--optimizer-state", choices=("fp32", "8bit"), default="fp32")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--distributed", choices=("replicated", "fsdp"), default="replicated")
    options = parser.parse_args()
    if options.processes == 1:
        measure(options)
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = [_child(options, rank, port) for rank in range(options.processes)]
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))


def _child(options: argparse.Namespace, rank: int, port: int) -> int:
    child = os.fork()
    if child:
        return child
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(options.processes)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    status = 1
    try:
        with processes():
            measure(options)
        status = 0
    except BaseException:  # noqa: BLE001  # a child must not go on as a copy of its parent
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        os._exit(status)


def measure(options: argparse.Namespace) -> None:
    """Plan, take two steps, print what the second needed in each process."""
    levers = Levers(options.precision, options.optimizer_state)
    sharded = options.distributed == "fsdp" and options.processes > 1
    seed_everything(0)
    start_peak_memory(torch.device("cpu"))
    backbone = build_backbone(options.model, options.layers)
    tasks, reference = build_data(options)
    method_type = METHODS[options.method]
    settings = method_type.default_config("mtil")
    if hasattr(settings, "ddas"):  # which else needs weights of AlexNet
        settings = dataclasses.replace(settings, ddas=dataclasses.replace(settings.ddas, features="backbone"))
    sizes = {name: options.batch_size for name in ("batch_size", "reference_batch_size") if hasattr(settings, name)}
    settings = dataclasses.replace(settings, **sizes)

    give_back_freed_memory()

    def planned() -> MemoryPlan:
        return plan_memory(
            method_type,
            settings,
            backbone,
            tasks,
            reference,
            parse_size(options.budget),
            levers=levers,
            processes=options.processes,
            sharded=sharded,
            evaluated=settings.batch_size,
        )

    clock = time.perf_counter()
    plan = ranks.from_first(planned)
    planning = time.perf_counter() - clock
    if ranks.first():
        print(*plan.lines(), sep="\n", flush=True)
    method = method_type(backbone, settings, reference)
    use_levers(method, levers)
    use_micro_batches(method, plan.micro_batches)
    if sharded:
        shard(backbone)
    seconds = take_steps(method, tasks, reference, levers, options)
    measured = ranks.gather_values(peak_memory_bytes(torch.device("cpu")))
    row = {
        "method": options.method,
        "model": options.model,
        "layers": options.layers,
        "batch_size": settings.batch_size,
        "processes": options.processes,
        "distributed": options.distributed,
        "plan": plan.as_dict(),
        "predicted_bytes": plan.peak,
        "measured_bytes": measured,
        "difference": max(measured) / plan.peak - 1,
        "resident_after": resident_bytes(),
        "planning_seconds": planning,
        "step_seconds": seconds,
    }
    if ranks.first():
        print(plan.measured(measured))
        print(json.dumps(row))


def take_steps(
    method: Any, tasks: list[Task], reference: Reference, levers: Levers, options: argparse.Namespace
) -> float:
    """Two steps of the second task, the first with two images for each process; seconds of the second."""
    transform = method.backbone.train_transform
    for index, task in enumerate(tasks):  # the first task is not trained: its end would need detectors, memories, …
        method.before_task(index, task)
        method.stage = method.stages(task)[0]
        method.before_stage(method.stage)
        if index == 0:
            learn(method)
            if options.method in ("replay", "icarl", "clap4clip", "proof", "ewc"):
                method.after_task(index, task)
    optimizer = with_state(method.optimizer(), levers.optimizer_state)
    source = method.training_images(tasks[1])
    seconds = 0.0
    for step, count in enumerate((2 * options.processes, options.batch_size)):
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
        if options.processes > 1:
            average_gradients(method.trainable())
        method.before_step(batch)
        optimizer.step()
        method.after_step(step)
        seconds = time.perf_counter() - clock
        del terms, batch, shown, others
    return seconds


@torch.no_grad()
def learn(method: Any) -> None:
    """Move what trains, as a learnt task does: a start that equals the pre-trained teacher would lie in the teacher's memory."""
    for _, value in method.trainable():
        local(value).mul_(1.01)


def build_backbone(model: str, layers: int | None) -> Backbone:
    """With random weights."""
    network, tokenize, _, _ = untrained_open_clip(model)
    for tower in (network.visual, getattr(network, "text", network)):
        if layers is not None:
            tower.transformer.resblocks = nn.ModuleList(tower.transformer.resblocks[:layers])
    size = network.visual.image_size
    side = size if isinstance(size, int) else size[0]

    def transform(image: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.interpolate(image[None].float() / 255, size=side)[0]

    return Backbone(network.eval(), tokenize, transform, transform, name=model)


def build_data(options: argparse.Namespace) -> tuple[list[Task], Reference]:
    """Two tasks and reference data, all noise."""
    names = tuple(f"class number {number}" for number in range(options.classes))
    tasks = [
        Task(f"task {index}", names, ("a photo of a {}.",), *(noise(options.images, options.classes) for _ in range(3)))
        for index in range(2)
    ]
    captions = tuple(f"a photo of thing number {number} in some place" for number in range(options.captions))
    return tasks, Reference(noise(options.images, 1), captions)


if __name__ == "__main__":
    main()
