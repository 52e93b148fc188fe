"""A step in each of several gloo processes of this machine: processor seconds, bytes that are exchanged.

Started by ``step_scaling.py measure``; prints one line of JSON.

usage: step_ranks.py CASE, a :class:`~step_cases.Case` as JSON
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from step_cases import Case, step_of
from yardsticks import Yardsticks

from cl_methods import ranks
from cl_methods.ranks import tensors
from cl_methods.training.distributed import processes

ROUNDS, FLOATS = 5, 2**20
"""Rounds; of the tensor that is summed as a yardstick of exchange."""


class Noting:
    """``torch.distributed``, and the bytes of every tensor that it sums or gathers."""

    def __init__(self) -> None:
        self.bytes = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)

    def all_reduce(self, tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
        self.bytes += tensor.numel() * tensor.element_size()
        return dist.all_reduce(tensor, *args, **options)

    def all_gather(self, parts: list[torch.Tensor], own: torch.Tensor) -> None:
        self.bytes += len(parts) * own.numel() * own.element_size()
        dist.all_gather(parts, own)


def take(case: Case) -> dict[str, Any]:
    """In one of the processes: best processor seconds of some steps, of a sum, and of the yardsticks between them."""
    torch.set_num_threads(1)
    tensors.dist = noted = Noting()  # type: ignore[assignment]
    step, sticks, tensor = step_of(case), Yardsticks(), torch.zeros(FLOATS)
    best = dict.fromkeys(("seconds", "sum"), float("inf"))
    for _ in range(ROUNDS):
        before = noted.bytes
        best["seconds"] = min(best["seconds"], _seconds(step.run))
        exchanged = noted.bytes - before
        if case.ranks > 1:
            best["sum"] = min(best["sum"], _seconds(lambda: dist.all_reduce(tensor)))
        sticks.measure()
    return {**best, **sticks.seconds, "exchanged": exchanged}


def _seconds(work: Any) -> float:
    if ranks.count() > 1:
        dist.barrier()
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    """Start the processes; means over them."""
    case = Case(**json.loads(sys.argv[1]))
    with socket.socket() as probe, TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        children = [_start(case, rank, port, Path(folder)) for rank in range(case.ranks)]
        if any(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children):
            raise SystemExit("a process failed")
        found = [json.loads((Path(folder) / str(rank)).read_text()) for rank in range(case.ranks)]
    print(json.dumps(_mean(found)))


def _start(case: Case, rank: int, port: int, folder: Path) -> int:
    child = os.fork()
    if child:
        return child
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(case.ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    status = 1
    try:
        with processes():
            (folder / str(rank)).write_text(json.dumps(take(case)))
        status = 0
    finally:
        sys.stderr.flush()
        os._exit(status)


def _mean(found: list[Any]) -> Any:
    if isinstance(found[0], dict):
        return {name: _mean([one[name] for one in found]) for name in found[0]}
    return sum(found) / len(found)


if __name__ == "__main__":
    main()
