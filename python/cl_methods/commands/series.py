"""Several methods, orders or seeds in one ``clk run``: one process runs them one after the other and compares them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path

from cl_methods.commands.configuration import ConfigurationError, Invocation, parse
from cl_methods.methods.find import find_method
from cl_methods.training.config import RunConfig

SeriesRun = tuple[RunConfig, Invocation, Path]
"""Settings, how it was called, and its directory."""

_ORDERS = {"I", "II", "X-TAIL"}  # any other order lists the tasks of a folder, separated by commas as well


def expand(arguments: Sequence[str]) -> list[list[str]]:
    """One argument list per combination of the methods, orders and seeds given as ``--method A,B``, ``--seed 0,1,2``.

    Returns:
        The arguments themselves, alone, where no list was given.

    Raises:
        ConfigurationError: an entry is empty or comes twice, or several methods were given with ``--method.X`` options.
    """
    choices: list[list[list[str]]] = []
    rest: list[str] = []
    position = 0
    while position < len(arguments):
        option, sign, value = arguments[position].partition("=")
        position += 1
        if option not in ("--method", "--order", "--seed"):
            rest.append(arguments[position - 1])
            continue
        if not sign and position < len(arguments):
            value = arguments[position]
            position += 1
        choices.append([[option, entry] for entry in _entries(option, value)])
    if all(len(entries) == 1 for entries in choices):
        return [list(arguments)]
    several = any(entries[0][0] == "--method" and len(entries) > 1 for entries in choices)
    own = next((argument for argument in rest if argument.startswith("--method.")), None)
    if several and own is not None:
        raise ConfigurationError(
            f"{own.split('=')[0]}: expected with one method only, but --method names several; "
            "run the method with settings of its own alone and compare afterwards"
        )
    return [[*rest, *(word for pair in pairs for word in pair)] for pairs in product(*choices)]


def parse_series(lines: Sequence[Sequence[str]], description: str) -> tuple[list[SeriesRun], Path]:
    """Every run of a series, each with a directory of its own inside the series' output directory.

    Returns:
        The runs, and the output directory: ``--output``, by default ``runs/SCENARIO``.

    Raises:
        ConfigurationError: see :func:`~cl_methods.commands.configuration.parse`.
    """
    parsed = [parse(line, description) for line in lines]
    first_config, first = parsed[0]
    folder = first.output or Path("runs") / first_config.scenario
    return [(config, invocation, folder / run_name(config)) for config, invocation in parsed], folder


def run_name(config: RunConfig) -> str:
    """Directory of one run of a series: method, order (where it is a name) and seed."""
    order = [config.order] if config.order in _ORDERS else []
    return "-".join([find_method(config.method).name, *order, str(config.seed)])


def _entries(option: str, value: str) -> list[str]:
    entries = value.split(",")
    if option == "--order" and not _ORDERS.issuperset(entries):
        return [value]
    if not all(entries) or len(set(entries)) < len(entries):
        raise ConfigurationError(f"{option[2:]}: expected different names separated by commas, got {value!r}")
    return entries
