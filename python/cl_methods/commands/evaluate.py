"""``clk evaluate``: the checkpoints of a run measured again, in other label spaces and scopes, on other images or other data."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from cl_methods import ranks
from cl_methods.commands.configuration import option_given, parse
from cl_methods.evaluation.report import print_tables, write_run_report, write_tables
from cl_methods.evaluation.tables import TextTable, rows_table
from cl_methods.training.checkpoints import RunDirectory
from cl_methods.training.config import RunConfig, shared
from cl_methods.training.distributed import processes, read_together
from cl_methods.training.evaluating import Evaluated, Evaluating
from cl_methods.training.export.files import NewFolder
from cl_methods.training.export.learnt import ADAPTER_CONFIG, ExportError
from cl_methods.training.progress import RunProgress, progress_for

_NOT_HERE = ("--weights", "--config", "--resume", "--overwrite", "--dry-run")
_OF_OTHER_TASKS = ("order", "limit_tasks")
_OF_THE_DATA = (
    "root",
    "cache",
    "cache_gib",
    "sizes",
    "split",
    "reference_images",
    "reference_captions",
    "reference_limit",
)

DESCRIPTION = """Measure the checkpoints of a run again; nothing is learnt.

clk evaluate RUN [--checkpoints all|N,N,…|last] [--output DIR] [options of `clk run`]

RUN is the directory of a run, whose settings hold where no others are given. Others may be those of --evaluation, --scenario and
--data, and those of --method that scores read. Checkpoints are counted by tasks learnt, 0 is the model before learning. With all of
them and the run's own tasks DIR/result.json is one that `clk compare` takes; else DIR/evaluation.json has the rows.

examples:
  clk evaluate runs/zscl                                                        are the numbers still the same?
  clk evaluate runs/zscl --evaluation.label-space task seen all --output runs/zscl-agnostic
  clk evaluate runs/moe --method.ddas.scope batch --output runs/moe-batch
  clk evaluate runs/zscl --scenario mtil --order CIFAR10,CUB200 --data.root /data       datasets that it has not learnt
  clk evaluate runs/zscl --checkpoints 0,last --evaluation.limit 200"""


def main(arguments: Sequence[str]) -> int:
    """Parse, measure, report. With ``torchrun``: all its processes together."""
    with processes():
        return _main(list(arguments))


def _main(arguments: list[str]) -> int:
    run, description, config, asked = read_together(
        lambda: _read(arguments), lambda read: {**shared(read[2].as_dict()), "checkpoints": read[3].checkpoints}
    )
    checkpoints = _checkpoints(asked.checkpoints, run)
    output = ranks.from_first(lambda: _output(asked.output, run))
    with progress_for() if ranks.first() else RunProgress() as progress:
        evaluated = Evaluating(config, run, description, checkpoints, progress).execute()
    ranks.from_first(lambda: _write(evaluated, config, output))
    return 0


def _read(arguments: list[str]) -> tuple[Path, dict[str, Any], RunConfig, argparse.Namespace]:
    """The run, its ``run.json``, what is measured, and the options of this command alone."""
    if any(argument in ("-h", "--help") for argument in arguments):
        parse(["--help"], DESCRIPTION, prog="clk evaluate")
    if not arguments or arguments[0].startswith("-"):
        raise ValueError("run: the first argument is the directory of a run, as in `clk evaluate runs/zscl`")
    own = argparse.ArgumentParser(prog="clk evaluate", add_help=False, allow_abbrev=False)
    own.add_argument("--checkpoints", default="all")
    own.add_argument("--output", type=Path)
    asked, rest = own.parse_known_args(arguments[1:])
    wrong = next((option for option in _NOT_HERE for given in rest if given.partition("=")[0] == option), None)
    if wrong is not None:
        raise ValueError(f"{wrong[2:]}: has no meaning for `clk evaluate`, which measures the run that it is given")
    run = Path(arguments[0])
    description = ranks.from_first(lambda: _description(run))
    config, _ = parse(
        rest, DESCRIPTION, prog="clk evaluate", file=_settings(description, rest), file_name=run / "run.json"
    )
    config.distributed = "replicated"
    return run, description, config, asked


def _description(run: Path) -> dict[str, Any]:
    if (run / ADAPTER_CONFIG).is_file():
        raise ExportError(
            f"run: {run} is an adapter file, which has one state; `clk run --weights {run} --evaluation.only` measures it"
        )
    if not (run / "run.json").is_file():
        raise ExportError(f"run: {run} holds no run (no run.json); expected the output directory of `clk run`")
    description = RunDirectory(run).read_json("run.json")
    if not isinstance(description, dict) or not {"config", "tasks", "scenario_fingerprint"} <= description.keys():
        raise ExportError(f"run: {run / 'run.json'} is not what `clk run` writes; restore it from a copy")
    return description


def _settings(description: dict[str, Any], arguments: Sequence[str]) -> dict[str, Any]:
    """The run's settings as a file of settings; of other scenarios only what belongs to a folder of data."""
    config = {name: value for name, value in description["config"].items() if name != "weights"}
    config["evaluation"] = {**config["evaluation"], "only": False}
    scenario, order = option_given(arguments, "--scenario"), option_given(arguments, "--order")
    if scenario in (None, config["scenario"]):
        return {**config, "limit_tasks": None} if order not in (None, config["order"]) else config
    config = {name: value for name, value in config.items() if name not in _OF_OTHER_TASKS}
    config["scenario"] = scenario
    config["data"] = {name: config["data"][name] for name in _OF_THE_DATA if name in config["data"]}
    config["evaluation"].pop("label_space")
    return config


def _checkpoints(text: str, run: Path) -> list[int] | None:
    if text == "all":
        return None
    last = max((one.task + 1 for one in RunDirectory(run).found() if one.step is None), default=0)
    entries = text.split(",")
    if not all(entry == "last" or entry.isdigit() for entry in entries):
        raise ValueError(
            f"checkpoints: expected all, or numbers of learnt tasks and last, such as 0,3,last; got {text!r}"
        )
    return [last if entry == "last" else int(entry) for entry in entries]


def _output(asked: Path | None, run: Path) -> Path:
    """Where to write: the folder that was asked for, or a fresh one beside the run."""
    if asked is None:
        base = run.resolve()
        names = [f"{base.name}-evaluated", *(f"{base.name}-evaluated-{number}" for number in range(2, 1000))]
        asked = next(run.parent / name for name in names if not base.with_name(name).exists())
    NewFolder(asked)  # which refuses a folder with content, before anything is measured
    return asked


def _write(evaluated: Evaluated, config: RunConfig, output: Path) -> None:
    console = Console()
    with NewFolder(output) as folder:
        (folder / "config.yaml").write_text(yaml.safe_dump(config.as_dict(), sort_keys=False))
        if evaluated.result is not None:
            (folder / "result.json").write_text(json.dumps(evaluated.result, indent=1, allow_nan=False) + "\n")
            write_run_report(evaluated.result, folder, console, name=output)
        else:
            (folder / "evaluation.json").write_text(json.dumps(evaluated.as_dict(), indent=1, allow_nan=False) + "\n")
            tables = _tables(evaluated, config)
            print_tables(tables, console)
            write_tables(tables, folder)
            files = f"evaluation.json and report.md are in {output}"
            console.print(files, soft_wrap=True, highlight=False, markup=False)
    if evaluated.agreement is not None:
        console.print(evaluated.agreement, soft_wrap=True, highlight=False, markup=False)


def _tables(evaluated: Evaluated, config: RunConfig) -> list[TextTable]:
    tasks = [task.name for task in evaluated.scenario.tasks]
    found = []
    for space in evaluated.rows:
        of = evaluated.description["evaluated_from"]["run"]
        title = f"{config.method} of {of} on {config.scenario}, label space {space}: accuracy in %"
        found.append(rows_table(title, tasks, dict(zip(evaluated.names, evaluated.accuracies(space), strict=True))))
    return found
