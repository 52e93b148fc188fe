"""``clk methods``: list methods and scenarios."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tyro
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cl_methods.methods import METHODS
from cl_methods.methods.parameter_counts import trainable_parameters
from cl_methods.scenarios import SCENARIOS

DESCRIPTION = """List methods and scenarios, or count what the methods train.

`clk run --method NAME --help` shows a method's settings."""


@dataclass
class Options:
    """What to print.

    Attributes:
        count: open_clip model over which to count the parameters that each method trains; no weights are needed.
        classes: classes of the task for which they are counted.
    """

    count: str | None = None
    classes: int = 100


def main(arguments: Sequence[str]) -> int:
    """Print what there is to choose from: methods with what they train, store and use; scenarios."""
    options = tyro.cli(Options, args=list(arguments), prog="clk methods", description=DESCRIPTION)
    console = Console()
    if options.count is not None:
        _print_counts(console, options.count, options.classes)
        return 0
    methods = _table("methods")
    for name, method in METHODS.items():
        methods.add_row(Text(name, "bold"), _first_line(method))
        facts = method.facts
        said = (
            ("source", facts.source),
            ("trains", facts.trains),
            ("stored between tasks", facts.carries),
            ("used at test time besides image and label space", facts.test_time),
        )
        methods.add_row("", Text("\n".join(f"{what}: {answer}" for what, answer in said), "dim"))
    console.print(methods)
    scenarios = _table("scenarios")
    for name, text in SCENARIOS.items():
        scenarios.add_row(Text(name, "bold"), text)
    console.print(scenarios)
    return 0


def _print_counts(console: Console, model: str, classes: int) -> None:
    """One row after the other: building some methods over a large model takes a while."""
    table = Table(title=f"parameters trained on a first task of {classes} classes, {model}", title_justify="left")
    table.add_column("method")
    table.add_column("trainable", justify="right")
    table.add_column("share of the model", justify="right")
    with Live(table, console=console, auto_refresh=False) as live:
        for row in trainable_parameters(model, classes):
            table.add_row(row.method, f"{row.trainable:,}", f"{100 * row.trainable / row.model:.2f} %")
            live.refresh()


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2))


def _first_line(method: type) -> str:
    """The docstring's first line, without the marks around formulas."""
    return (method.__doc__ or "").strip().splitlines()[0].replace("``", "")
