"""The same runs by 1, 2, 4 … processes; a program of its own, so that nothing else shares its processes.

usage: distributed_runs.py FOLDER COUNTS METHODS [OPTION ...]

COUNTS and METHODS are separated by commas; ``2x3`` are two processes whose encoders take three samples at a time, and with
``--distributed fsdp`` compute blocks again; ``4!RANK@STEP`` are four of which one is killed after a step. Options are those of
``clk run``. Every run is that of ``clk run --resume`` in processes that are forked after the imports, which take longer than
the runs. FOLDER/COUNT/METHOD is the run directory; ``losses.json`` has what every step reported, ``gradients.safetensors`` the
gradients of the first one, and ``bytes.json`` the bytes of weights, gradients and optimiser state that each process held then.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from pathlib import Path

import torch
from forked_ranks import fork_ranks, statuses
from safetensors.torch import save_file

from cl_methods import ranks
from cl_methods.backbone import Backbone
from cl_methods.backbone.micro_batches import MicroBatches
from cl_methods.commands.configuration import parse
from cl_methods.sharding import local, whole_state
from cl_methods.training.distributed import processes
from cl_methods.training.progress import RunProgress
from cl_methods.training.run import Run


class Recorder(RunProgress):
    """Keeps what every step reports and the gradients of the first one; ``killed``: a rank and the step after which it is."""

    def __init__(self, killed: tuple[int, int] | None) -> None:
        super().__init__()
        self.killed = killed
        self.losses: list[dict[str, float]] = []
        self.gradients: dict[str, torch.Tensor] = {}
        self.bytes: dict[str, int] = {}

    def step(self, report) -> None:
        super().step(report)
        self.losses.append(report.log.values())
        if report.optimizer is not None and len(self.losses) == 1:
            every = [value for group in report.optimizer.param_groups for value in group["params"]]
            self.gradients = whole_state(
                {str(n): value.grad.clone() for n, value in enumerate(every) if value.grad is not None}
            )
            held = {
                "weights": every,
                "gradients": [value.grad for value in every if value.grad is not None],
                "optimiser": [one for state in report.optimizer.state.values() for one in state.values() if one.ndim],
            }
            self.bytes = {kind: sum(local(one).nbytes for one in tensors) for kind, tensors in held.items()}
        if self.killed == (int(os.environ["RANK"]), len(self.losses)):
            os.kill(os.getpid(), signal.SIGKILL)


def run_all(folder: Path, methods: list[str], options: list[str], size: int | None, killed) -> None:
    with processes():
        for method in methods:
            recorder = Recorder(killed)
            config, _ = parse(["--method", method, "--device", "cpu", *options], "")
            one = Run(config, folder / method, resume=True, overwrite=False, progress=recorder)
            if size is not None:
                use_parts(one.method, MicroBatches(images=size, texts=size, blocks=config.distributed == "fsdp"))
            one.execute()
            held = ranks.gather_values(recorder.bytes)
            if ranks.first():
                (folder / method / "bytes.json").write_text(json.dumps(held))
                (folder / method / "losses.json").write_text(json.dumps(recorder.losses))
                save_file(recorder.gradients, folder / method / "gradients.safetensors")


def use_parts(method, parts: MicroBatches) -> None:
    held = [value for value in vars(method).values() if isinstance(value, Backbone)]
    for backbone in (method.backbone, *held):
        backbone.micro_batches = parts


def start(count: int, folder: Path, *arguments, work=run_all) -> list[int]:
    """Fork ``count`` processes that ``work(folder, *arguments)`` as one; their ids."""
    folder.mkdir(parents=True, exist_ok=True)
    return fork_ranks(count, work, folder, *arguments)


def report(count: int, children: list[int]) -> int:
    """Wait for the ``count`` processes: 0, or 1 and a sentence if one did not end well."""
    found = statuses(children)
    if any(found):
        print(f"{count} processes ended with {found}", file=sys.stderr)
    return int(any(found))


def main(folder: str, counts: str, methods: str, *options: str) -> int:
    for asked in counts.split(","):
        count, size, rank, step = re.fullmatch(r"(\d+)(?:x(\d+))?(?:!(\d+)@(\d+))?", asked).groups()
        place = Path(folder) / (count if size is None else f"{count}x{size}")
        killed = None if rank is None else (int(rank), int(step))
        parts = None if size is None else int(size)
        children = start(int(count), place, methods.split(","), list(options), parts, killed)
        if report(int(count), children):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
