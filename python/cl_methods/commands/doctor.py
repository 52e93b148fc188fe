"""``clk doctor``: versions, devices, and which backend runs each operation and why the others do not."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from rich import box
from rich.console import Console
from rich.table import Table

import cl_kernels
from cl_kernels.library import build_information
from cl_methods.training.environment import describe_environment


def main(arguments: Sequence[str]) -> int:
    """Print what is installed, what was built and what runs.

    Raises:
        ValueError: there are arguments.
    """
    if any(argument in ("-h", "--help") for argument in arguments):
        print(
            "usage: clk doctor\n\nVersions, devices, and which backend runs each operation and why the others do not."
        )
        return 0
    if arguments:
        raise ValueError(f"expected no arguments, got {' '.join(arguments)}")
    console = Console(width=None if Console().is_terminal else 160, highlight=False)
    facts = describe_environment(torch.device("cpu"))
    facts.pop("backends")
    facts["GPU"] = _gpus()
    _print_facts(console, "environment", facts)
    _print_facts(console, "compiled library", build_information())
    for device in ["cpu"] + (["cuda"] if torch.cuda.is_available() else []):
        console.print(_operations(device))
    return 0


def _gpus() -> str:
    if not torch.cuda.is_available():
        return f"none that torch {torch.__version__} can use"
    names = (torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    return ", ".join(f"{index}: {name}" for index, name in enumerate(names))


def _print_facts(console: Console, title: str, facts: dict[str, object]) -> None:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False, padding=(0, 2))
    for name, value in facts.items():
        shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        table.add_row(name, shown)
    console.print(table)
    console.print()


def _operations(device: str) -> Table:
    table = Table(
        title=f"operations on {device} tensors", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD
    )
    table.add_column("operation", no_wrap=True)
    table.add_column("runs on", style="bold")
    table.add_column("other backends")
    for operation, states in cl_kernels.backends().items():
        chosen = _chosen(operation, device)
        others = "\n".join(f"{name}: {state}" for name, state in states.items() if name != chosen)
        table.add_row(operation, chosen, others)
    return table


def _chosen(operation: str, device: str) -> str:
    """The backend that a call without ``backend=`` takes; its fallback warning is what the table itself tells."""
    from cl_kernels.dispatch import choose

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return choose(operation, torch.device(device))
