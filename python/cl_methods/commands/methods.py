"""``clk methods``: list methods and scenarios."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cl_methods.methods import METHODS
from cl_methods.scenarios import SCENARIOS


def main(arguments: Sequence[str]) -> int:
    """Print what there is to choose from: methods with what they train, store and use; scenarios.

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


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2))


def _first_line(method: type) -> str:
    """The docstring's first line, without the marks around formulas."""
    return (method.__doc__ or "").strip().splitlines()[0].replace("``", "")
