"""From a step to a profile, and from a profile to what people look at: terminal, page, figures, files."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

import cl_kernels
from cl_kernels.profile import AdapterProfile, profile_workloads
from cl_methods.profiling import tables
from cl_methods.profiling.page import page
from cl_methods.profiling.steps import Step, profile_name, quiet, workloads


def profile_method(
    step: Step, *, repeats: int = 5, compiled: bool = True, note: Callable[[str], None] = lambda text: None
) -> AdapterProfile:
    """The profile of a method's training step over the frozen model's forward pass on the same images and texts.

    Args:
        step: what is profiled.
        repeats: of every timing.
        compiled: try ``torch.compile`` on one layer.
        note: told what is being done.

    Raises:
        ValueError: see :func:`~cl_methods.profiling.steps.workloads`.
        TypeError: the method cannot be mounted on this model.
    """
    note(f"building {step.model}" + (" from shapes alone" if step.device == "meta" else ""))
    with quiet():
        base, adapted, method = workloads(step)
        profile = profile_workloads(base, adapted, repeats=repeats, compiled=compiled, note=note)
    return replace(profile, subject=profile_name(method, step), details=_details(step, method, repeats))


def _details(step: Step, method: Any, repeats: int) -> dict[str, Any]:
    device = "shapes alone (meta tensors)" if step.device == "meta" else platform.processor() or platform.machine()
    if step.device.startswith("cuda"):
        device = torch.cuda.get_device_name(step.device)
    return {
        "model": step.model,
        "method": step.method,
        "batch_size": step.batch_size,
        "classes": step.classes,
        "device": device,
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "repeats": 0 if step.device == "meta" else repeats,
        "torch": torch.__version__,
        "cl_kernels": cl_kernels.__version__,
        "open_clip": metadata.version("open_clip_torch"),
        "backends": cl_kernels.backends(),
        "settings": {name: str(value) for name, value in vars(method.config).items()},
    }


def write(profile: AdapterProfile, output: Path, console: Console) -> None:
    """Print headline and table; write page, figures, JSON, CSV and trace into ``output``."""
    from cl_methods.profiling import figures  # matplotlib takes longer to load than most commands

    profile.save(output)
    pictures = {}
    for name, (title, figure) in figures.all_figures(profile).items():
        data = figures.png(figure)
        (output / f"{name}.png").write_bytes(data)
        pictures[title] = data
    (output / "profile.html").write_text(page(profile, pictures), encoding="utf-8")
    for table in tables.all_tables(profile):
        _print(table, console)
    console.print(Text(profile.headline()), highlight=False)
    console.print(
        f"profile.html, profile.json, profile.csv, trace.json and figures are in {output}",
        soft_wrap=True,
        highlight=False,
    )


def _print(table: tables.PlainTable, console: Console) -> None:
    """Print a table; where there is no terminal whose width counts, as wide as it needs to be."""
    target = console if console.is_terminal else Console(file=console.file, width=240)
    shown = Table(title=Text(table.title), title_justify="left", box=None, padding=(0, 1))
    for number, column in enumerate(table.columns):
        shown.add_column(Text(column), justify="left" if number == 0 else "right", no_wrap=number > 0)
    for row in table.rows:
        shown.add_row(*(Text(cell) for cell in row))
    target.print(shown)
