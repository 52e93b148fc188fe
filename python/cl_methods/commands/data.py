"""``clk data check``: which datasets are there, in which layout and split, what is missing where, and zero-shot accuracies."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cl_methods.commands.zero_shot import print_lines, zero_shot_table
from cl_methods.datasets.find import DataNotFoundError, Found, SplitOptions, find_dataset, or_a_copy, other_root
from cl_methods.datasets.images import DataError, FileImages
from cl_methods.datasets.specification import DATASETS
from cl_methods.evaluation.zero_shot import FULL_MODEL
from cl_methods.scenarios.mtil import chosen_datasets
from cl_methods.scenarios.verification import verify_images

DESCRIPTION = """Say which datasets are there, in which layout and split, and what is missing where.

Nothing is written, and nothing downloaded unless --pretrained names weights that are not on disk. The exit status is 1 if a dataset
is missing, damaged, or has a split of another size than the published one, or if a zero-shot accuracy differs from the
published one.

examples:
  clk data check --root /data
  clk data check --root /data --datasets X-TAIL --split coop --shots 16
  clk data check --root /data --datasets Aircraft,MNIST --decode
  clk data check --root /data --zero-shot --model ViT-B-16-quickgelu --pretrained ViT-B-16.pt"""

_WIDTH = 120


@dataclass
class Check:
    """What to look at.

    Attributes:
        action: `check`.
        root: folder that holds the datasets.
        datasets: an order, I, II or X-TAIL, or datasets separated by commas.
        split: family of published splits, zscl or coop.
        shots: images per class of a few-shot draw.
        split_seed: seed of few-shot draws.
        sizes: any accepts splits of other than the published sizes.
        decode: decode every image file once, which finds damaged ones; the result is remembered until a file changes.
        zero_shot: classify the test images with the model as it is, and compare with published values.
        model: open_clip name, or `local-dir:DIR`, for zero-shot.
        pretrained: file of weights or open_clip tag, for zero-shot.
        device: cpu, cuda, cuda:1 …; auto takes a GPU if there is one; for zero-shot.
        batch_size: images at a time, for zero-shot; `auto` takes as many as memory or caches hold.
        workers: data-loading processes, for zero-shot.
    """

    action: Annotated[Literal["check"], tyro.conf.Positional]
    root: Path
    datasets: str = "I"
    split: Literal["zscl", "coop"] = "zscl"
    shots: int | None = None
    split_seed: int = 0
    sizes: Literal["published", "any"] = "published"
    decode: bool = False
    zero_shot: bool = False
    model: str = FULL_MODEL
    pretrained: str | None = None
    device: str = "auto"
    batch_size: int | Literal["auto"] = "auto"
    workers: int = 0


def main(arguments: Sequence[str]) -> int:
    """Print a table with a row per dataset, and below it what to do about those that are not as they should be.

    Returns:
        0 if every dataset is as it should be, else 1.

    Raises:
        DataError: the root is not a directory, an option has an impossible value, or an image cannot be read.
    """
    options = tyro.cli(Check, args=list(arguments), prog="clk data", description=DESCRIPTION)
    _check(options)
    split = SplitOptions(options.split, options.shots, seed=options.split_seed, sizes=options.sizes)
    if not options.root.is_dir():
        raise DataError(f"root: {options.root} is not a directory; give the folder that holds one folder per dataset")
    title = f"datasets below {options.root}, split {options.split}"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in ("dataset", "found as", "in", "classes", "train / val / test", "fingerprint"):
        right = column in ("classes", "train / val / test")
        table.add_column(column, no_wrap=column != "in", overflow="fold", justify="right" if right else "left")
    problems: list[str] = []
    there: list[Found] = []
    for name in chosen_datasets(options.datasets, "datasets"):
        try:
            found = find_dataset(DATASETS[name], options.root, split)
            if options.decode:
                _decode(found)
        except DataError as error:
            state = "missing" if isinstance(error, DataNotFoundError) else "not as it should be"
            table.add_row(name, Text(state, "red"))
            problems.append(str(error) if str(error).startswith(name) else f"{name}: {error}")
            continue
        there.append(found)
        task = found.task
        sizes = " / ".join(f"{len(split):,}" for split in (task.train, task.validation, task.test))
        place = str(found.place.relative_to(options.root))
        table.add_row(name, found.layout, place, str(len(task.class_names)), sizes, found.fingerprint())
    problems = _copies_said_once(problems, options.root)
    if not there:
        elsewhere = other_root(options.root)
        if elsewhere is not None:
            problems.insert(0, f"There are datasets in {elsewhere}: was --root {elsewhere} meant?")
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    console.print(table)
    for problem in problems:
        console.print(problem, soft_wrap=True, highlight=False, markup=False)
    fine = True
    if options.zero_shot and there:
        lines, fine = zero_shot_table(
            there, options.model, options.pretrained, options.device, options.batch_size, options.workers
        )
        print_lines(console, lines)
    return 1 if problems or not fine else 0


def _copies_said_once(problems: list[str], root: Path) -> list[str]:
    """Where several datasets are missing, what holds for all of them in a sentence of its own."""
    tails = {or_a_copy(root / spec.copies[0]): root / spec.copies[0] for spec in DATASETS.values()}
    found = [next((tail for tail in tails if problem.endswith(tail)), "") for problem in problems]
    places = [str(tails[tail]) for tail in found if tail]
    if len(places) < 2:
        return problems
    shorter = [problem.removesuffix(tail) for problem, tail in zip(problems, found, strict=True)]
    return [*shorter, or_a_copy(", ".join(places)).replace("; or a copy", "Or copies", 1)]


def _check(options: Check) -> None:
    """Options of the zero-shot accuracies.

    Raises:
        DataError: an option has an impossible value, or no meaning.
    """
    if options.batch_size != "auto" and options.batch_size < 1:
        raise DataError(f"batch_size: expected a number >= 1, or auto, got {options.batch_size}")
    if options.workers < 0:
        raise DataError(f"workers: expected a number >= 0, got {options.workers}")
    if options.zero_shot and options.model == "mini":
        raise DataError("model: 'mini' knows the words of its own world only, not the class names of these datasets")
    if options.pretrained is not None and not options.zero_shot:
        raise DataError(f"pretrained: has a meaning with --zero-shot only, got {options.pretrained!r}")


def _decode(found: Found) -> None:
    """Decode every image of every split that lies in a file or an archive."""
    for source in (found.task.train, found.task.validation, found.task.test):
        if isinstance(source, FileImages):
            verify_images([source.root / path for path in source.paths])
        else:
            for index in range(len(source)):
                source.image(index)
