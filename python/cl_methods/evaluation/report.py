"""What a run and a comparison leave behind for people: tables, figures and one self-contained HTML page."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from cl_methods.evaluation import latex
from cl_methods.evaluation.boards import Board, arrange
from cl_methods.evaluation.results import find_results, read_result
from cl_methods.evaluation.tables import (
    TextTable,
    class_incremental_table,
    cost_table,
    matrix_table,
    novelty_table,
    per_task_tables,
    summary_table,
)
from cl_methods.text import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1180px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; } h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { padding: .25rem .7rem; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 2px solid #222; } tr.break td { border-top: 1px solid #999; }
td.best { font-weight: 700; } img { max-width: 100%; height: auto; margin: .6rem 0; }
.wide { overflow-x: auto; } li, p, h2, h3 { overflow-wrap: anywhere; } footer { color: #777; font-size: 13px; margin-top: 3rem; }
"""


def write_run_report(result: dict[str, Any], output: Path, console: Console, *, name: Path | None = None) -> None:
    """Write ``report.md``, ``accuracy.png`` and ``matrix.png``; then :func:`print_run_report`.

    Tables for every label space that was measured; the figures are of the first.

    Args:
        result: content of ``result.json``.
        output: where to write.
        console: where to print.
        name: what ``output`` is going to be called; None for what it is called.
    """
    from cl_methods.evaluation import figures  # matplotlib takes longer to load than most commands

    first, tables = _run_tables(result, name or output)
    figures.save(figures.accuracy_over_time(first), output / "accuracy.png")
    figures.save(figures.matrix(first), output / "matrix.png")
    pictures = "\n![accuracy per task over time](accuracy.png)\n\n![accuracy matrix](matrix.png)\n"
    write_tables(tables, output, pictures)
    print_tables(tables, console)
    console.print(
        f"result.json, report.md, accuracy.png and matrix.png are in {name or output}",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )


def print_run_report(result: dict[str, Any], output: Path, console: Console) -> None:
    """Print the accuracy matrix and the summary of one run, for every label space that was measured."""
    print_tables(_run_tables(result, output)[1], console)


def _run_tables(result: dict[str, Any], output: Path) -> tuple[Board, list[TextTable]]:
    """The board of the first label space, and the tables of all."""
    boards, _ = arrange([{**result, "path": str(output)}])
    tables = []
    for board in boards:
        incremental = class_incremental_table(board)
        tables += [matrix_table(board.groups[0].results[0], board.title), summary_table(board)]
        tables += [table for table in (incremental, novelty_table(board)) if table is not None]
    first = boards[0]
    tables += [cost_table(first)] if first.compared() else []
    return first, tables


def write_tables(tables: Sequence[TextTable], output: Path, pictures: str = "") -> None:
    """``report.md`` with tables, and ``pictures`` in Markdown after them."""
    (output / "report.md").write_text("\n".join(table.markdown() for table in tables) + pictures)


def print_tables(tables: Sequence[TextTable], console: Console) -> None:
    """Print tables one below the other."""
    for table in tables:
        _print(table, console)


def compare(paths: Sequence[Path], output: Path, console: Console) -> list[Board]:
    """One table and figures over several runs: terminal, ``table.md``, ``table.tex``, PNG files and ``report.html``.

    Runs of the same method and settings are grouped over their seeds. Scenarios, orders, models and label spaces that differ
    get tables of their own: their numbers may not stand in one.

    Args:
        paths: run directories, or directories of them.
        output: where to write; files of an earlier comparison are replaced.
        console: where to print.

    Returns:
        What was compared.

    Raises:
        ResultError: a run is missing, incomplete or damaged.
    """
    boards, notes = arrange([read_result(path) for path in find_results(paths)])
    from cl_methods.evaluation import diagrams, figures  # where there is something to draw

    output.mkdir(parents=True, exist_ok=True)
    for note in notes:
        console.print(f"note: {printable(note)}", highlight=False, soft_wrap=True, markup=False)
    markdown, tables, sections = [], list[TextTable](), []
    for number, board in enumerate(boards):
        suffix = "" if len(boards) == 1 else f"-{number + 1}"
        overview, further = summary_table(board), (class_incremental_table(board), novelty_table(board))
        shown = [*(table for table in further if table is not None), cost_table(board)]
        details = [*shown, *per_task_tables(board)]
        for table in (overview, *shown):
            _print(table, console)
        tables += [overview, *details]
        markdown.append("\n".join(table.markdown() for table in (overview, *details)))
        pictures = {
            "accuracy per task over time": (f"accuracy{suffix}.png", figures.accuracy_over_time(board)),
            "summary": (f"summary{suffix}.png", figures.summary(board)),
            "accuracy matrices": (f"matrix{suffix}.png", figures.matrix(board)),
            "accuracy per task": (f"tasks{suffix}.png", diagrams.bars(board)),
        }
        if (diagram := diagrams.reliability(board)) is not None:
            pictures["reliability after the last task"] = (f"reliability{suffix}.png", diagram)
        inline = {title: _write_picture(output / name, figure) for title, (name, figure) in pictures.items()}
        sections.append(_section(board, overview, details, inline))
    (output / "table.md").write_text("\n".join(markdown) + _footnote(notes))
    (output / "table.tex").write_text(latex.document(tables, _footnote(notes)))
    (output / "report.html").write_text(_page(sections, notes))
    where = f"table.md, table.tex, report.html and figures are in {output}"
    console.print(where, soft_wrap=True, highlight=False, markup=False)
    return boards


def _print(table: TextTable, console: Console) -> None:
    """Print a table; where there is no terminal whose width counts, as wide as it needs to be."""
    target = console if console.is_terminal else Console(file=console.file, width=240)
    target.print(printable(table.title), style="bold", highlight=False, markup=False)
    target.print(table.rich())


def _write_picture(path: Path, figure: Figure) -> str:
    from cl_methods.evaluation import figures

    data = figures.png(figure)
    path.write_bytes(data)
    return "data:image/png;base64," + base64.b64encode(data).decode()


def _footnote(notes: list[str]) -> str:
    text = (
        "\nPercent; mean ± sample standard deviation over seeds. Transfer, Average and Last as in ZSCL (ICCV 2023), "
        "Transfer without the first task. Forgetting: drop from the best accuracy since a task was learnt. "
        "ECE: expected calibration error after the last task, mean over tasks.\n"
    )
    return text + "".join(f"\nNote: {note}\n" for note in notes)


def _section(board: Board, overview: TextTable, details: list[TextTable], pictures: dict[str, str]) -> str:
    images = "".join(f'<img alt="{html.escape(title)}" src="{source}">' for title, source in pictures.items())
    tables = "".join(f"<h3>{html.escape(table.title)}</h3>{_html_table(table)}" for table in details)
    runs = "".join(
        f"<li>{html.escape(group.label)}, seed {result['seed']}: {html.escape(result['path'])}</li>"
        for group in board.groups
        for result in group.results
    )
    environment = board.groups[0].results[0]["environment"]
    facts = ", ".join(f"{key} {value}" for key, value in environment.items() if isinstance(value, (str, int)))
    return (
        f"<h2>{html.escape(board.title)}</h2>{_html_table(overview)}{images}{tables}"
        f"<details><summary>runs and environment</summary><ul>{runs}</ul><p>{html.escape(facts)}</p></details>"
    )


def _html_table(table: TextTable) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in table.columns)
    body = []
    for number, row in enumerate(table.rows):
        cells = "".join(
            f'<td class="best">{html.escape(cell)}</td>' if (number, column) in table.emphasised
            else f"<td>{html.escape(cell)}</td>"
            for column, cell in enumerate(row)
        )  # fmt: skip
        body.append(f'<tr class="break">{cells}</tr>' if number in table.breaks else f"<tr>{cells}</tr>")
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _page(sections: list[str], notes: list[str]) -> str:
    footer = html.escape(_footnote(notes)).replace("\n\n", "<br>")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Continual learning of CLIP: comparison</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>Continual learning of CLIP: comparison</h1>\n{''.join(sections)}\n<footer>{footer}</footer></body></html>\n"
    )
