"""Tables as rows of text, and their two forms: terminal and Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from rich import box
from rich.table import Table as RichTable
from rich.text import Text

from cl_methods.evaluation.boards import METRICS, Board
from cl_methods.evaluation.published import PROTOCOLS, published
from cl_methods.text import printable

ABSENT = "–"
_NOVELTY = ("auroc", "aupr", "fpr95")


@dataclass
class TextTable:
    """Cells as text; the first column is left-aligned, the others right-aligned.

    Attributes:
        title: heading.
        columns: headers.
        rows: one list of cells per row.
        breaks: numbers of rows before which a line is drawn.
        emphasised: (row, column) of cells that are the best of their column.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    breaks: Sequence[int] = ()
    emphasised: frozenset[tuple[int, int]] = frozenset()

    def rich(self) -> RichTable:
        """For the terminal, without the title."""
        table = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1))
        for position, column in enumerate(self.columns):
            table.add_column(
                Text(printable(column)), justify="right" if position else "left", no_wrap=position > 0, overflow="fold"
            )
        for number, row in enumerate(self.rows):
            cells = [  # Text, because a cell may hold what rich would take for markup
                Text(printable(cell), style="bold" if (number, column) in self.emphasised else "")
                for column, cell in enumerate(row)
            ]
            table.add_row(*cells, end_section=number + 1 in self.breaks)
        return table

    def markdown(self) -> str:
        """A heading and a pipe table."""
        lines = [
            f"### {_markdown(self.title)}",
            "",
            "| " + " | ".join(map(_markdown, self.columns)) + " |",
            "|" + "|".join("---" if position == 0 else "---:" for position in range(len(self.columns))) + "|",
        ]
        for number, row in enumerate(self.rows):
            texts = [_markdown(cell) for cell in row]
            cells = [
                f"**{text}**" if (number, column) in self.emphasised else text for column, text in enumerate(texts)
            ]
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines) + "\n"


def _markdown(text: str) -> str:
    """As Markdown shows it: no column ends in it and no HTML begins in it."""
    return printable(" ".join(text.split())).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def matrix_table(result: dict[str, Any], where: str | None = None) -> TextTable:
    """The accuracy matrix of one run, with chance and the zero-shot row first; only these if nothing was learnt.

    Args:
        result: content of ``result.json``.
        where: scenario, order and conditions, for the title; :attr:`~cl_methods.evaluation.boards.Board.title` has them all.
    """
    tasks, zero_shot = result["tasks"], result["zero_shot"]
    values = {"chance": result["chance"]} if "chance" in result else {}
    values["at the start" if result.get("started_from") else "zero-shot"] = zero_shot
    start, learnt = len(values), frozenset[tuple[int, int]]()
    if not result.get("continual", True):
        values["all tasks at once"] = result["accuracy"][0]
    elif any(row != zero_shot for row in result["accuracy"]):
        values |= {f"after {task}": row for task, row in zip(tasks, result["accuracy"], strict=True)}
        learnt = frozenset((start + index, 1 + index) for index in range(len(tasks)))
    where = where or f"{result['scenario']}, order {result['order']}"
    title = f"{result['method']} on {where}, seed {result['seed']}: accuracy in %"
    return replace(rows_table(title, tasks, values), breaks=(start,), emphasised=learnt)


def rows_table(title: str, tasks: Sequence[str], values: Mapping[str, Sequence[float]]) -> TextTable:
    """Accuracies on ``tasks`` by the name of the row, with their mean."""
    rows = [[name, *_numbers(row), f"{np.mean(row):.1f}"] for name, row in values.items()]
    return TextTable(title, ["", *tasks, "mean"], rows)


def summary_table(board: Board) -> TextTable:
    """What every group reached, with chance, zero-shot, joint bound and published numbers."""
    rows = []
    if board.chance is not None:
        rows.append(["chance", "", *_flat_summary(board.chance), ABSENT, ABSENT])
    rows.append([board.baseline, "", *_flat_summary(board.zero_shot), "0.0", spread(board.zero_shot_calibration)])
    first = len(rows)
    for group in board.compared():
        label = group.label if group.continual else f"{group.label} (bound)"
        values = [spread(group.values(metric)) for metric in METRICS]
        rows.append([label, str(len(group.results)), *values])
    continual = sum(group.continual for group in board.compared())
    best = frozenset(_best(rows[first : first + continual], first))
    breaks = [first, first + continual, len(rows)]
    # as in all the papers of the table: every test image, the protocol's label space and shots, OpenAI's ViT-B/16
    protocol: dict[str, Any] = {"split": "test", "limit": None, "start": None, **PROTOCOLS.get(board.scenario, {})}
    comparable = all(board.conditions.get(name) == value for name, value in protocol.items())
    other = "" if board.conditions["model"].startswith("ViT-B-16") else " with ViT-B/16"
    for entry in published(board.scenario, board.order) if comparable else []:
        printed = [ABSENT if value is None else f"{value:.1f}" for value in (entry.transfer, entry.average, entry.last)]
        rows.append(
            [f"{entry.method} (published{other}, {entry.source}, {entry.split} splits)", "", *printed, ABSENT, ABSENT]
        )
    columns = ["method", "seeds", "Transfer", "Average", "Last", "Forgetting", "ECE"]
    return TextTable(board.title, columns, rows, breaks, best)


def class_incremental_table(board: Board) -> TextTable | None:
    """Average and Last of class-incremental learning with the accuracy after every step; None where no run has them."""
    groups = [group for group in board.groups if all("class_incremental" in result for result in group.results)]
    if not groups:
        return None
    rows = []
    for group in groups:
        found = [result["class_incremental"] for result in group.results]
        label = group.label if group.continual else f"{group.label} (bound)"
        whole = [
            spread(np.array([entry[name] for entry in found if entry[name] is not None]))
            for name in ("average", "last")
        ]
        steps = [entry["per_step"] for entry in found if entry["per_step"] is not None]
        cells = _numbers(np.mean(steps, axis=0)) if steps else [ABSENT] * len(board.tasks)
        rows.append([label, str(len(found)), *whole, *cells])
    columns = ["method", "seeds", "Average", "Last", *board.tasks]
    return TextTable(f"Accuracy over all classes learnt so far, {board.title}", columns, rows)


def novelty_table(board: Board) -> TextTable | None:
    """How well uncertainties tell images of learnt tasks from those of tasks to come; None where no run has measured it."""
    groups = [group for group in board.groups if all(result.get("novelty") for result in group.results)]
    kinds = list(dict.fromkeys(kind for group in groups for result in group.results for kind in result["novelty"]))
    rows, breaks = list[list[str]](), list[int]()
    for kind in kinds:
        breaks += [len(rows)] if rows else []
        for number, group in enumerate(groups):
            found = [result["novelty"][kind] for result in group.results if kind in result["novelty"]]
            start, learnt = ([one[when] for one in found if one[when]] for when in ("zero_shot", "after_task"))
            if start and number == 0:  # the same in all groups
                rows.append([board.baseline, kind, "", *_mean_over_tasks(start[:1])])
            if learnt:
                rows.append([group.label, kind, str(len(learnt)), *_mean_over_tasks(learnt)])
    title = f"Images of tasks to come as novel data, in %, mean over tasks, {board.title}"
    columns = ["method", "uncertainty", "seeds", "AUROC", "AUPR", "FPR95"]
    return TextTable(title, columns, rows, breaks) if rows else None


def _mean_over_tasks(runs: list[list[dict[str, float]]]) -> list[str]:
    return [spread(np.array([np.mean([one[name] for one in run]) for run in runs])) for name in _NOVELTY]


def cost_table(board: Board) -> TextTable:
    """What training each group took: means over seeds, the largest peak memory."""
    rows = []
    for group in board.compared():
        train = [result["train"] for result in group.results]
        rows.append(
            [
                group.label,
                _count(max(entry["trainable_parameters"] for entry in train)),
                _duration(float(np.mean([entry["seconds"] for entry in train]))),
                _rate([entry["samples_per_second"] for entry in train]),
                _bytes(max(entry["peak_memory_bytes"] for entry in train)),
            ]
        )
    columns = ["method", "trainable", "training time", "samples/s", "peak memory"]
    return TextTable(f"Cost, {board.title}", columns, rows)


def per_task_tables(board: Board) -> list[TextTable]:
    """Transfer, Average and Last of every group task by task."""
    tables = []
    for metric in ("transfer", "average", "last"):
        rows = [[board.baseline, *_numbers(board.zero_shot)]]
        if metric == "transfer":
            rows[0][1] = ABSENT
        for group in board.compared():
            if group.continual or metric == "last":
                rows.append([group.label, *_numbers(group.per_task(metric))])
        tables.append(TextTable(f"{metric.capitalize()} per task, {board.title}", ["method", *board.tasks], rows, (1,)))
    return tables


def spread(values: np.ndarray) -> str:
    """``mean`` of one value, ``mean ± sample standard deviation`` of several."""
    if len(values) == 0:
        return ABSENT
    return f"{values.mean():.1f}" + (f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else "")


def _numbers(values: Any) -> list[str]:
    return [ABSENT if np.isnan(value) else f"{value:.1f}" for value in np.asarray(values, dtype=float)]


def _flat_summary(row: list[float]) -> list[str]:
    """Transfer, Average and Last of a model that never changes."""
    transfer = f"{np.mean(row[1:]):.1f}" if len(row) > 1 else ABSENT
    return [transfer, f"{np.mean(row):.1f}", f"{np.mean(row):.1f}"]


def _best(rows: list[list[str]], first: int) -> list[tuple[int, int]]:
    """Cells with the highest Transfer, Average and Last among several continual methods."""
    cells = []
    for column in (2, 3, 4) if len(rows) > 1 else ():
        values = [float(row[column].split(" ")[0]) if row[column] != ABSENT else -np.inf for row in rows]
        cells += [(first + number, column) for number, value in enumerate(values) if value == max(values) > -np.inf]
    return cells


def _count(number: int) -> str:
    return f"{number / 1e6:.2f} M" if number >= 1e5 else f"{number:,}"


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 600
        else f"{seconds / 60:.0f} min"
        if seconds < 36000
        else f"{seconds / 3600:.1f} h"
    )


def _rate(rates: list[float | None]) -> str:
    known = [rate for rate in rates if rate]
    return f"{np.mean(known):,.0f}" if known else ABSENT


def _bytes(number: int) -> str:
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"
