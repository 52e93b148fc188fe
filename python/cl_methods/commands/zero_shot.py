"""The zero-shot table of ``clk data check --zero-shot``."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cl_methods.backbone import load_backbone
from cl_methods.datasets.find import Found
from cl_methods.datasets.images import DataError
from cl_methods.evaluation.accuracy import EvaluationOptions, measure_row
from cl_methods.evaluation.zero_shot import PublishedZeroShot, published_zero_shot, verdict
from cl_methods.methods import METHODS
from cl_methods.scenarios.base import Scenario
from cl_methods.training.building import decide_batch
from cl_methods.training.config import RunConfig
from cl_methods.training.environment import choose_device

_ADVICE = (
    "A zero-shot accuracy that differs comes from other weights, another activation, other class names or prompts, another "
    "split or another resizing than published. Results of training cannot be compared with published ones before this is found."
)


def zero_shot_table(
    found: Sequence[Found],
    model: str,
    pretrained: str | None,
    device: str,
    batch_size: int | Literal["auto"],
    workers: int,
) -> tuple[list[Table | str], bool]:
    """Zero-shot accuracy of every dataset, the published value, and what to think of the difference.

    Args:
        found: datasets as they were found.
        model, pretrained: see :func:`~cl_methods.backbone.load_backbone`.
        device: ``cpu``, ``cuda`` … or ``auto``.
        batch_size, workers: of reading images.

    Returns:
        What to print, and whether every accuracy that can be compared is as published.

    Raises:
        DataError: an image cannot be read.
        ValueError, FileNotFoundError: the model cannot be loaded.
    """
    backbone = load_backbone(model, pretrained, device=choose_device(device))
    origin = backbone.origin
    tag = origin.released_as if origin is not None else None
    method = METHODS["zero_shot"](backbone, METHODS["zero_shot"].default_config("mtil"))
    scenario = Scenario("mtil", "I", tuple(entry.task for entry in found))
    asked = EvaluationOptions(batch_size=batch_size)
    config = RunConfig("zero_shot", method.config, "mtil", model=model, pretrained=pretrained, evaluation=asked)
    options = decide_batch(config, scenario, method, lambda _: None).evaluation
    table = Table(title=f"zero-shot accuracy of {model}", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in ("dataset", "images", "accuracy", "published", "difference", "verdict", "published by"):
        right = column in ("images", "accuracy", "published", "difference")
        table.add_column(column, justify="right" if right else "left", no_wrap=right)
    fine = True
    compared: list[tuple[float, PublishedZeroShot]] = []
    for entry in found:
        task = entry.task
        try:
            accuracy = measure_row(method, [task], 0, options, workers)[0].accuracy
        except DataError as error:
            raise DataError(f"{task.name}: {error}") from error
        published = published_zero_shot(model, tag, task.name, entry.family, len(task.test))
        cells = [task.name, f"{len(task.test):,}", f"{accuracy:.2f}"]
        if isinstance(published, str):
            table.add_row(*cells, "–", "–", Text(published, "dim"), "")
            continue
        good, phrase = verdict(accuracy, published)
        fine &= good
        compared.append((accuracy, published))
        difference = f"{accuracy - published.accuracy:+.2f}"
        table.add_row(
            *cells, f"{published.accuracy:.1f}", difference, Text(phrase, "green" if good else "red"), published.source
        )
    if len(compared) > 1 and len({value.source for _, value in compared}) == 1:
        ours, theirs = fmean(accuracy for accuracy, _ in compared), fmean(value.accuracy for _, value in compared)
        table.add_row("mean of these", "", f"{ours:.2f}", f"{theirs:.2f}", f"{ours - theirs:+.2f}", "", "")
    lines: list[Table | str] = [table]
    if origin is not None:
        lines.append(origin.sentence())
        if compared and tag is None:
            lines.append("nothing in the file says whose weights these are; the published values are those of OpenAI's")
    if not fine:
        lines.append(_ADVICE)
    return lines, fine


def print_lines(console: Console, lines: Sequence[Table | str]) -> None:
    """Tables as they are, sentences unwrapped."""
    for line in lines:
        if isinstance(line, str):
            console.print(line, soft_wrap=True, highlight=False, markup=False)
        else:
            console.print(line)
