"""Bytes of tensors that each of several processes holds in training steps; a program of its own, which forks them.

usage: ranks_memory.py COUNT METHOD DISTRIBUTED SIZES

DISTRIBUTED is ``replicated`` or ``fsdp``; SIZES are separated by commas: the images of a part, 0 for everything at once. Prints a
JSON list, for every process: for every size the most bytes alive in a step of the second task, and at last those alive between
steps.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "tiny")]

from forked_ranks import fork_ranks, statuses  # noqa: E402
from tiny_clip import build_backbone  # noqa: E402

from cl_methods import ranks  # noqa: E402
from cl_methods.backbone import Backbone  # noqa: E402
from cl_methods.backbone.micro_batches import MicroBatches  # noqa: E402
from cl_methods.methods import METHODS, Batch  # noqa: E402
from cl_methods.sharding import shard  # noqa: E402
from cl_methods.training.distributed import processes  # noqa: E402
from cl_methods.training.gradients import average_gradients  # noqa: E402
from cl_methods.training.memory.live import LiveMemory  # noqa: E402
from cl_methods.training.task import use_micro_batches  # noqa: E402

BATCH = 48


def backbone_of() -> Backbone:
    """With a text tower that is large beside a batch of its class texts."""
    return build_backbone(width=64, vocab_size=3000)


def settings_for(name: str) -> Any:
    from test_memory import settings_of

    return dataclasses.replace(settings_of(name), batch_size=BATCH)


def parts_of(size: int, distributed: str) -> MicroBatches | None:
    """Sharded weights compute blocks again, whole ones parts."""
    return MicroBatches(size, 4 * size, blocks=distributed == "fsdp") if size else None


def measure(name: str, distributed: str, sizes: list[int]) -> list[int]:
    """What this process found; a step as the training loop takes it."""
    from test_memory import given

    tasks, reference = given()
    memory, backbone = LiveMemory(), backbone_of()
    peaks = []
    with memory:
        method = METHODS[name](backbone, settings_for(name), reference)
        if distributed == "fsdp":
            shard(backbone)
        for value in (*backbone.model.parameters(), *backbone.model.buffers()):
            memory.count(value)
        for index, task in enumerate(tasks):
            method.before_task(index, task)
            if not index:
                method.after_task(index, task)
                with torch.no_grad():  # learnt: the start of the next task is no copy of the pre-trained model
                    for _, value in method.trainable():
                        value.mul_(1.01)
        method.stage = method.stages(tasks[1])[0]
        method.before_stage(method.stage)
        optimizer, source = method.optimizer(), method.training_images(tasks[1])
        others = method.reference_source(tasks[1]) if method.uses_reference else None
        for step, size in enumerate((0, *sizes)):  # the first makes the optimiser's state
            use_micro_batches(method, parts_of(size, distributed))
            rows, shown, places = torch.arange(BATCH) % len(source), None, None
            if others is not None:
                places = torch.arange(getattr(method.config, "reference_batch_size", BATCH)) % len(others)
                shown = torch.rand(len(places), 3, 16, 16)
            batch = Batch(torch.rand(BATCH, 3, 16, 16), source.labels[rows], 0, shown, places, None, rows)
            memory.peak = memory.bytes
            optimizer.zero_grad(set_to_none=True)
            terms = method.loss(batch)
            terms["loss"].backward()
            average_gradients(method.trainable())
            method.before_step(batch)
            optimizer.step()
            method.after_step(step)
            peaks.append(memory.peak)
            del terms, batch, shown
        return [*peaks[1:], memory.bytes]


def measure_together(name: str, distributed: str, sizes: list[int]) -> None:
    with processes():
        found = ranks.gather_values(measure(name, distributed, sizes))
        if ranks.first():
            print(json.dumps(found))


def main(count: int, name: str, distributed: str, sizes: list[int]) -> int:
    return int(any(statuses(fork_ranks(count, measure_together, name, distributed, sizes))))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], sys.argv[3], [int(size) for size in sys.argv[4].split(",")]))
