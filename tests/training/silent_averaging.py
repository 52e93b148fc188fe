"""What gloo processes exchange while ZSCL averages weights, beside what they do in the rest of a step; a program of its own.

usage: silent_averaging.py COUNT DISTRIBUTED MEAN PULLED

DISTRIBUTED is ``replicated`` or ``fsdp``; MEAN and PULLED are ZSCL's ``ensemble`` and ``moving_average``. Prints a JSON list, for
every process: exchanges of three steps without averaging, of their averaging, and how far the averages are from the start.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "memory"), str(HERE.parent / "tiny")]

from forked_ranks import fork_ranks, statuses  # noqa: E402
from tiny_clip import build_backbone  # noqa: E402

from cl_methods import ranks  # noqa: E402
from cl_methods.methods import METHODS, Batch  # noqa: E402
from cl_methods.sharding import local, shard  # noqa: E402
from cl_methods.training.distributed import processes  # noqa: E402
from cl_methods.training.gradients import average_gradients  # noqa: E402

COLLECTIVES = ("c10d", "_c10d_functional")


class Exchanged(TorchDispatchMode):
    """Counts operations in which processes exchange something, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in COLLECTIVES:
            self.found[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def measure(distributed: str, mean: str, pulled: str) -> tuple[dict[str, int], dict[str, int], float]:
    from test_memory import given, settings_of

    tasks, reference = given()
    settings = dataclasses.replace(settings_of("zscl"), ensemble=mean, moving_average=pulled, average_every=1)
    method = METHODS["zscl"](build_backbone(), settings, reference)
    if distributed == "fsdp":
        shard(method.backbone)
    method.before_task(0, tasks[0])
    method.stage = method.stages(tasks[0])[0]
    method.before_stage(method.stage)
    optimizer, source = method.optimizer(), method.training_images(tasks[0])
    rest, averaging = Exchanged(), Exchanged()
    torch.manual_seed(1)
    for step in range(3):
        batch = Batch(
            torch.rand(12, 3, 16, 16),
            source.labels[:12],
            step,
            torch.rand(4, 3, 16, 16),
            torch.arange(4),
            None,
            torch.arange(12),
        )
        with rest:
            optimizer.zero_grad(set_to_none=True)
            method.loss(batch)["loss"].backward()
            average_gradients(method.trainable())
            method.before_step(batch)
            optimizer.step()
        with averaging:
            method.after_step(step)
    start, averaged = method.weights.start, method.averaged_weights()
    moved = max(
        float((local(averaged[name]) - local(start[name])).abs().max()) for name in averaged if averaged[name].ndim > 1
    )
    return rest.found, averaging.found, moved


def measure_together(distributed: str, mean: str, pulled: str) -> None:
    with processes():
        found = ranks.gather_values(measure(distributed, mean, pulled))
        if ranks.first():
            print(json.dumps(found))


if __name__ == "__main__":
    sys.exit(int(any(statuses(fork_ranks(int(sys.argv[1]), measure_together, *sys.argv[2:])))))
