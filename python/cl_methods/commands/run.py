"""``clk run``: train and evaluate a method over a whole task sequence."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from cl_methods import ranks
from cl_methods.backbone import planned_weights
from cl_methods.commands.configuration import Invocation, parse
from cl_methods.commands.series import SeriesRun, expand, parse_series
from cl_methods.evaluation.report import compare, print_run_report, write_run_report
from cl_methods.methods.find import find_method
from cl_methods.training.building import check_distributed, select_scenario
from cl_methods.training.checkpoints import RunDirectory
from cl_methods.training.checkpoints.atomic import writing
from cl_methods.training.config import RunConfig, shared
from cl_methods.training.distributed import processes, read_together
from cl_methods.training.environment import choose_device
from cl_methods.training.memory.evaluation_batch import choose_batch
from cl_methods.training.planning.plan import make_plan, readable_flops
from cl_methods.training.planning.time_bound import product_speed
from cl_methods.training.progress import RunProgress, progress_for
from cl_methods.training.run import Run
from cl_methods.training.signals import StopOnSignal, StoppedError
from cl_methods.training.starting_point import StartingPoint, start_sentence

DESCRIPTION = """Train a method on a sequence of tasks, evaluating all tasks after each.

Writes result.json, report.md and figures into the output directory, and checkpoints on the way.

examples:
  clk run
  clk run --method zscl --seed 1 --output runs/zscl-1
  clk run --method zscl --method.lr 3e-4 --method.iterations 200
  clk run --method zero_shot,finetune,zscl --seed 0,1,2 --output runs/all     every combination, then `clk compare`
  clk run --scenario folders --data.root my_images --model ViT-B-16-quickgelu --pretrained openai
  clk run --scenario cil --data.root /data --data.dataset CIFAR100 --data.steps 10 --method zscl
  clk run --config runs/zscl-1/config.yaml --seed 2 --output runs/zscl-2
  clk run --output runs/zscl-1 --method zscl --seed 1 --resume
  clk run --weights runs/zscl-1 --scenario folders --data.root my_images    go on from what it has learnt; also: exported folders
  torchrun --nproc-per-node 4 -m cl_methods.cli run --method zscl --workers 4     four processes or GPUs, see docs/distributed.md
  clk run --method my_method.py:MyMethod                        a method of your own, see docs/new_method.md

`clk methods` lists methods and scenarios; --debug shows where an error comes from."""


def main(arguments: Sequence[str]) -> int:
    """Parse, run, report; several runs one after the other, and their comparison. With ``torchrun``: all its processes together."""
    with processes():
        return _main(arguments)


def _main(arguments: Sequence[str]) -> int:
    runs, folder = read_together(lambda: _read(arguments), _shared)
    if folder is None:
        config, invocation, _ = runs[0]
        return _run(config, invocation, invocation.output or _default_output(config, invocation))
    for _, invocation, output in runs:  # nothing starts if one of them may not
        RunDirectory(output).check(resume=invocation.resume, overwrite=invocation.overwrite)
    for config, invocation, output in runs:
        status = _run(config, invocation, output)
        if status:
            return status
    if not runs[0][1].dry_run:
        ranks.from_first(lambda: _compare([output for _, _, output in runs], folder / "compare"))
    return 0


def _read(arguments: Sequence[str]) -> tuple[list[SeriesRun], Path | None]:
    """The runs, and the folder of a series; of a single one the directory is not known yet."""
    lines = expand(arguments)
    if len(lines) > 1:
        return parse_series(lines, DESCRIPTION)
    return [(*parse(arguments, DESCRIPTION), Path())], None


def _shared(read: tuple[list[SeriesRun], Path | None]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for number, (config, invocation, _) in enumerate(read[0], 1):
        asked = {name: getattr(invocation, name) for name in ("resume", "overwrite", "dry_run")}
        own = {**shared(config.as_dict()), **asked}
        found |= own if len(read[0]) == 1 else {f"run {number}: {name}": value for name, value in own.items()}
    return found


def _compare(runs: list[Path], output: Path) -> None:
    compare(runs, output, Console())


def _run(config: RunConfig, invocation: Invocation, output: Path) -> int:
    if invocation.dry_run:
        ranks.from_first(lambda: _print_plan(config, output))
        return 0
    stopping = StopOnSignal(speaks=ranks.count() == 1)
    with progress_for() if ranks.first() else RunProgress() as reporter, stopping:
        run = Run(config, output, resume=invocation.resume, overwrite=invocation.overwrite, progress=reporter)
        writable = run.directory.held()
        try:
            if writable:
                run.directory.write_text("config.yaml", yaml.safe_dump(config.as_dict(), sort_keys=False))
            stopping.run = run
            result = run.execute()
        except StoppedError as stopped:
            reporter.note(str(stopped))
            return 128 + (_signalled(stopping) or signal.SIGINT)
        finally:
            run.directory.release()
        stopping.run = None  # everything is written; the report can be made again
        received = _signalled(stopping)
        if received:
            reporter.note("stopped at the end of the run, which is complete")
    ranks.from_first(lambda: _report(result, output, writable))
    return 128 + received if received else 0  # a series ends here too


def _signalled(stopping: StopOnSignal) -> int:
    """Number of the signal that some process was stopped with, in all of them; 0 if there was none."""
    return max(ranks.gather_values(stopping.received or 0))


def _report(result: dict[str, Any], output: Path, writable: bool) -> None:
    console = Console()
    if writable:
        with writing(output):
            write_run_report(result, output, console)
        return
    print_run_report(result, output, console)
    console.print(
        f"{output} may only be read: nothing in it has been written", soft_wrap=True, highlight=False, markup=False
    )


def _default_output(config: RunConfig, invocation: Invocation) -> Path:
    """A fresh directory under ``runs``; with --resume or --overwrite, the one that the same command made last."""
    return ranks.from_first(lambda: _free_output(config, invocation))


def _free_output(config: RunConfig, invocation: Invocation) -> Path:
    base = Path("runs") / f"{config.scenario}-{find_method(config.method).name}-seed{config.seed}"
    candidates = [base, *(base.with_name(f"{base.name}-{number}") for number in range(2, 1000))]
    existing = [path for path in candidates if path.exists()]
    if invocation.resume or invocation.overwrite:
        return existing[-1] if existing else base
    return next(path for path in candidates if not path.exists() or not any(path.iterdir()))


def _print_plan(config: RunConfig, output: Path) -> None:
    check_distributed(config)
    console, settings = Console(), config.effective_settings()
    scenario = select_scenario(config)
    plan = make_plan(config, scenario)
    table = Table(title=f"{config.method} on {config.scenario}, order {config.order}, seed {config.seed}")
    for column in ("task", "classes", "train", config.evaluation.split, "steps", "training"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for task in plan.tasks:
        images = f"{task.evaluated:,}" + (f" of {task.available:,}" if task.evaluated < task.available else "")
        flops = "" if not task.flops else readable_flops(task.flops)
        table.add_row(task.name, f"{task.classes:,}", f"{task.train:,}", images, f"{task.steps:,}", flops)
    console.print(table)
    method = find_method(config.method)
    if config.learns(method):
        sessions, batch = 1 if method.joint else len(scenario.tasks), f"of {settings.batch_size} images"
        epochs = 1 if method.closed_form else getattr(settings, "epochs", None)
        passes = f"{'pass' if epochs == 1 else 'passes'} in batches {batch}"
        steps = f"{settings.iterations + 1} optimiser steps {batch}" if epochs is None else f"{epochs} {passes}"
        times = "x "
        console.print(f"{sessions} {times}{steps}, model {config.model}")
    for sentence in plan.sentences():
        console.print(sentence, soft_wrap=True, highlight=False)
    device = choose_device(config.device)
    console.print(plan.time_sentence(product_speed(device), str(device)), soft_wrap=True, highlight=False)
    memory = None
    if config.plans_memory:
        from cl_methods.training.memory.planner import plan_run  # which takes a second to load

        memory = plan_run(config, scenario, device)
        for line in memory.lines() if memory is not None else ():
            console.print(line, soft_wrap=True, highlight=False)
    console.print(choose_batch(config, scenario, method, device, plan=memory).sentence, soft_wrap=True, highlight=False)
    console.print(planned_weights(config.model, config.pretrained), soft_wrap=True, highlight=False, markup=False)
    if config.weights is not None:
        start = StartingPoint.read(config.weights)
        console.print(start_sentence(start.as_dict()), soft_wrap=True, highlight=False, markup=False)
    console.print(f"would write to {output}; nothing has been written", soft_wrap=True)
    console.print(yaml.safe_dump(config.as_dict(), sort_keys=False).rstrip(), highlight=False)
