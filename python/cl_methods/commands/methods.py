"""``clk methods``: list methods and scenarios."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from cl_methods.methods import METHODS
from cl_methods.scenarios import SCENARIOS


def main(arguments: Sequence[str]) -> int:
    """Print two tables.

    Raises:
        ValueError: there are arguments.
    """
    if any(argument in ("-h", "--help") for argument in arguments):
        print(
            "usage: clk methods\n\nList methods and scenarios. `clk run --method NAME --help` shows a method's settings."
        )
        return 0
    if arguments:
        raise ValueError(f"expected no arguments, got {' '.join(arguments)}")
    console = Console()
    for title, rows in (
        ("methods", {name: _first_line(method) for name, method in METHODS.items()}),
        ("scenarios", SCENARIOS),
    ):
        table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2))
        for name, text in rows.items():
            table.add_row(name, text)
        console.print(table)
    return 0


def _first_line(method: type) -> str:
    """The docstring's first line, without the marks around formulas."""
    return (method.__doc__ or "").strip().splitlines()[0].replace("``", "")
