"""``clk profile``: what a method's adapters cost over the frozen model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro
from rich.console import Console

from cl_methods.commands.configuration import DEFAULT_METHOD
from cl_methods.profiling.report import profile_method, write
from cl_methods.profiling.steps import Step

DESCRIPTION = """Measure a training step of a method beside a forward pass of the frozen model on the same batch: per layer
parameters, FLOPs, dispatched operations, bytes kept for the backward pass, host synchronisations, times, peak memory.

Writes profile.html (one file, opens offline), profile.json, profile.csv, figures, and trace.json for https://ui.perfetto.dev.

examples:
  clk profile --model ViT-B-16 --method moe_adapters --static --output profile   no weights, no GPU, in seconds
  clk profile --model mini --method diki --output profile                        measured on this machine
  clk profile --model ViT-L-14 --method zscl --static --batch-size 128 --classes 1000
  clk profile --model ViT-B-16 --method moe_adapters --setting experts=4 top_k=1 --static"""


@dataclass
class Profile:
    """Profile a method's training step.

    Attributes:
        model: `mini` or an open_clip name; weights are random, since costs do not depend on them.
        method: what is profiled, with its settings for MTIL; or MODULE:CLASS.
        output: where page, figures and files go; an earlier profile there is replaced.
        static: count from shapes alone: no weights, no GPU, no times.
        batch_size: images per step; by default 64, and 4 where a CPU is timed.
        classes: classes of the task, whose texts are encoded; by default 100, and 10 where a CPU is timed.
        device: where to measure; by default a GPU if there is one.
        repeats: measurements of every time.
        compile: try torch.compile on one layer, which takes a while.
        setting: settings of the method, as name=value.
    """

    model: str = "ViT-B-16"
    method: str = DEFAULT_METHOD
    output: Path = Path("profile")
    static: bool = False
    batch_size: int | None = None
    classes: int | None = None
    device: str | None = None
    repeats: int = 5
    compile: bool = True
    setting: tuple[str, ...] = field(default=())


def main(arguments: Sequence[str]) -> int:
    """Parse, measure, print and write.

    Raises:
        ValueError: a value does not fit.
    """
    options = tyro.cli(Profile, args=list(arguments), prog="clk profile", description=DESCRIPTION)
    if options.repeats < 1:
        raise ValueError(f"repeats: expected a number >= 1, got {options.repeats}")
    if options.output.exists() and not options.output.is_dir():
        raise ValueError(f"output: expected a directory, got the file {options.output}")
    device = "meta" if options.static else options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    _check_device(device, options)
    small = device == "cpu" and options.model != "mini"
    step = Step(
        model=options.model,
        method=options.method,
        batch_size=options.batch_size if options.batch_size is not None else 4 if small else 64,
        classes=options.classes if options.classes is not None else 10 if small else 100,
        device=device,
        settings=_settings(options.setting),
    )
    console = Console()
    profile = profile_method(step, repeats=options.repeats, compiled=options.compile, note=_noter(console))
    write(profile, options.output, console)
    return 0


def _check_device(device: str, options: Profile) -> None:
    if options.static and options.device is not None:
        raise ValueError(f"device: a static profile runs on none; leave out --device {options.device} or --static")
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"device: expected cpu or cuda, got {device!r}") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: {device} is not there; torch sees no CUDA device. --static needs none")


def _settings(given: Sequence[str]) -> dict[str, object]:
    import yaml

    found: dict[str, object] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ValueError(f"setting: expected name=value, got {text!r}")
        found[name] = yaml.safe_load(value)
    return found


def _noter(console: Console):  # type: ignore[no-untyped-def]
    return lambda text: console.print(f"{text} …", style="dim", highlight=False)
