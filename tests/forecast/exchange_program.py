"""Two processes train for two steps; the second prints, as JSON, the sizes of what it exchanged in the second step.

usage: exchange_program.py OPTION …, those of ``clk run``
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from cl_methods import ranks
from cl_methods.commands.configuration import parse
from cl_methods.ranks import tensors
from cl_methods.training.building import build_method, select_scenario, shard_backbone
from cl_methods.training.distributed import processes
from cl_methods.training.task import TaskTraining


class Noting:
    """``torch.distributed``, and the bytes of every tensor that it sums or gathers."""

    def __init__(self) -> None:
        self.summed: Counter[int] = Counter()
        self.gathered: Counter[int] = Counter()

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)

    def all_reduce(self, tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
        self.summed[tensor.numel() * tensor.element_size()] += 1
        return dist.all_reduce(tensor, *args, **options)

    def all_gather(self, parts: list[torch.Tensor], own: torch.Tensor) -> Any:
        self.gathered[len(parts) * own.numel() * own.element_size()] += 1
        return dist.all_gather(parts, own)


class NotingShards:
    """An exchange of sharded weights as torch makes it, whose size is noted as that of a gathered tensor.

    Gathers or reduces, as ``exchange`` does.
    """

    def __init__(self, noted: Noting, exchange: Any) -> None:
        self._noted, self._exchange = noted, exchange

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
        self._noted.gathered[max(output_tensor.nbytes, input_tensor.nbytes)] += 1
        return self._exchange(output_tensor, input_tensor, *args, **options)


def main() -> None:
    with processes():
        noted = Noting()
        tensors.dist = noted  # type: ignore[assignment]
        config, _ = parse(sys.argv[1:], "")
        scenario = select_scenario(config)
        method = build_method(config, scenario, torch.device("cpu"))
        shard_backbone(config, method, print)
        for part in method.backbone.model.modules():
            if isinstance(part, FSDPModule):
                part.set_custom_all_gather(NotingShards(noted, dist.all_gather_into_tensor))
                part.set_custom_reduce_scatter(NotingShards(noted, dist.reduce_scatter_tensor))
        seen: list[tuple[Counter[int], Counter[int]]] = []
        note = lambda _: seen.append((Counter(noted.summed), Counter(noted.gathered)))  # noqa: E731
        TaskTraining(method, 0, scenario.tasks, on_step=note).execute()
        if ranks.rank() == 1:
            first, second = seen[:2]
            found = [{str(size): n for size, n in (b - a).items()} for a, b in zip(first, second, strict=True)]
            print(json.dumps(found), flush=True)


def start() -> int:
    probe = socket.socket()
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    probe.bind(("", 0))  # and held by all until they end, so that nobody else gets the port
    port = probe.getsockname()[1]
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            main()
            sys.stdout.flush()
            os._exit(0)
        children.append(child)
    ended = [os.waitpid(child, 0)[1] for child in children]
    return int(any(ended))


if __name__ == "__main__":
    sys.exit(start())
