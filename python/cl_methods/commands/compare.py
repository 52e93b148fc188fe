"""``clk compare``: one table, figures and an HTML page over several runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from cl_methods.evaluation.report import compare

DESCRIPTION = """Compare runs: tables (terminal, table.md and table.tex), figures and one self-contained report.html.

Runs of the same method and settings with several seeds become mean and spread. Published numbers stand beside
scenarios that papers have used, each with its source and its family of splits.

examples:
  clk compare runs/a runs/b --output report
  clk compare runs --output report          every run inside runs/"""


@dataclass
class Compare:
    """Compare runs.

    Attributes:
        runs: output directories of `clk run`, or directories that hold some.
        output: where table, figures and page go; an earlier comparison there is replaced.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    output: Path = Path("comparison")


def main(arguments: Sequence[str]) -> int:
    """Parse and compare.

    Raises:
        ValueError: no run was given.
    """
    options = tyro.cli(Compare, args=list(arguments), prog="clk compare", description=DESCRIPTION)
    if not options.runs:
        raise ValueError("runs: give at least one output directory of `clk run`")
    compare(options.runs, options.output, Console())
    return 0
