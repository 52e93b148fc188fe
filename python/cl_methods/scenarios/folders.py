"""Scenario ``folders``: a directory of one's own images, one sub-folder per task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import torch

from cl_methods.datasets.images import DataError, FileImages
from cl_methods.datasets.task import Reference, Task
from cl_methods.scenarios.base import Scenario
from cl_methods.scenarios.folder_texts import class_names, numbered_lines, read_templates
from cl_methods.scenarios.verification import join_problems, verify_images
from cl_methods.seeding import derive_seed

EXTENSIONS = frozenset([".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"])
REFERENCE_FOLDER = "_reference"
_VALIDATION_NAMES = ("val", "validation", "valid")


@dataclass(frozen=True)
class _Split:
    """Files of one split, relative to the task's folder, with their class numbers."""

    files: list[str]
    labels: list[int]

    def source(self, folder: Path) -> FileImages:
        return FileImages(folder, self.files, torch.tensor(self.labels, dtype=torch.int64))


def load_scenario(
    root: Path,
    order: Sequence[str] | None = None,
    *,
    validation_fraction: float = 0.1,
    test_fraction: float = 0.2,
    seed: int = 0,
) -> Scenario:
    """Tasks from image folders.

    Each sub-folder of ``root`` is a task: ``train/CLASS/*`` and ``test/CLASS/*`` (and optionally ``val/CLASS/*``), or
    ``CLASS/*`` directly, which is split here. Images may lie deeper inside a class folder. Class names are the folders'
    names with ``_`` as a space, unless a ``classnames.txt`` in the task's folder has lines ``FOLDER: NAME``. Prompts come from
    ``templates.txt`` in the task's folder or in ``root``, one per line with one ``{}``. ``root/_reference`` may hold images
    of anything and a ``captions.txt`` for methods that distil. Hidden files and files that are no images are passed over.

    Splits are made class by class from the sorted file list, as a function of ``seed``, task and class only.

    Args:
        root: folder of folders.
        order: names of the tasks to learn, in that order; all of them, sorted, when None.
        validation_fraction: share of the training images that becomes validation where a task brings none; 0 for none.
        test_fraction: share of the images that becomes the test split where a task brings none.
        seed: of the splits.

    Returns:
        The scenario; every image in it has been decoded once.

    Raises:
        DataError: anything that would fail later, with the file's name and what to do about it.
    """
    root = Path(root)
    for name, value in (("validation_fraction", validation_fraction), ("test_fraction", test_fraction)):
        if not 0 <= value < 1:
            raise DataError(f"data.{name}: expected a share from 0 to below 1, got {value}")
    if test_fraction == 0:
        raise DataError("data.test_fraction: expected more than 0, for every task must be tested")
    names = task_names(root)
    chosen = _chosen_order(names, order, root)
    tasks, problems = [], []
    for name in chosen:
        try:
            tasks.append(_task(root, name, validation_fraction, test_fraction, seed))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError(join_problems(problems))
    reference = _reference(root / REFERENCE_FOLDER)
    sources = [source for task in tasks for source in (task.train, task.validation, task.test)]
    sources += [reference.images] if reference else []
    verify_images([source.root / path for source in sources for path in source.paths])  # type: ignore[attr-defined]
    return Scenario(name="folders", order=",".join(chosen), tasks=tuple(tasks), reference=reference)


def task_names(root: Path) -> list[str]:
    """Sub-folders of ``root`` that are tasks, sorted.

    Raises:
        DataError: ``root`` is not a directory, holds no folder, or is itself a task.
    """
    if not root.is_dir():
        raise DataError(f"data.root: {root} is not a directory; give the folder that holds one sub-folder per task")
    names = [path.name for path in _subfolders(root) if path.name != REFERENCE_FOLDER]
    if not names:
        raise DataError(f"data.root: {root} has no sub-folders; each task needs a folder of its own in it")
    if "train" in names or "test" in names:
        raise DataError(
            f"data.root: {root} is laid out as a single task (it has {' and '.join(sorted({'train', 'test'} & {*names}))}); "
            f"give its parent, {root.absolute().parent}, or move it into a sub-folder"
        )
    return names


def _chosen_order(names: list[str], order: Sequence[str] | None, root: Path) -> list[str]:
    if order is None:
        return names
    for name in order:
        if name not in names:
            close = get_close_matches(name, names, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(names)}"
            raise DataError(f"order: {root} has no task {name!r}; {hint}")
    twice = sorted({name for name in order if list(order).count(name) > 1})
    if twice:
        raise DataError(f"order: each task can be learnt once, but {', '.join(twice)} is named several times")
    return list(order)


def _task(root: Path, name: str, validation_fraction: float, test_fraction: float, seed: int) -> Task:
    folder = root / name
    present = {path.name for path in _subfolders(folder)}
    if present & {"train", "test"}:
        classes, train, validation, test = _given_splits(folder, present, validation_fraction, seed)
    else:
        classes = _class_folders(folder)
        everything = _list_images(folder, "", classes)
        _require_images(folder, classes, everything, at_least=3, why="to be split into train, validation and test")
        rest, test = _divide(everything, test_fraction, derive_seed(seed, name, "test"), keep=2)
        train, validation = _divide(rest, validation_fraction, derive_seed(seed, name, "validation"), keep=1)
    return Task(
        name=name,
        class_names=class_names(folder, classes),
        templates=read_templates(folder, root),
        train=train.source(folder),
        validation=validation.source(folder),
        test=test.source(folder),
    )


def _given_splits(
    folder: Path, present: set[str], validation_fraction: float, seed: int
) -> tuple[list[str], _Split, _Split, _Split]:
    for split, other in (("train", "test"), ("test", "train")):
        if split not in present:
            raise DataError(
                f"{folder} has {other} but no {split}: add {folder / split}, or put the class folders directly into "
                f"{folder} to have them split"
            )
    validation_name = next((name for name in _VALIDATION_NAMES if name in present), None)
    splits = ["train", "test", *([validation_name] if validation_name else [])]
    classes = _class_folders(folder / "train")
    for split in splits[1:]:
        found = {path.name for path in _subfolders(folder / split)}
        missing, extra = sorted(set(classes) - found), sorted(found - set(classes))
        if missing or extra:
            said = [f"lacks {', '.join(missing[:3])}"] if missing else []
            said += [f"has {', '.join(extra[:3])} besides"] if extra else []
            raise DataError(
                f"{folder / split} {' and '.join(said)} compared with {folder / 'train'}: "
                "every split needs the same class folders"
            )
    listed = {split: _list_images(folder, f"{split}/", classes) for split in splits}
    for split, images in listed.items():
        _require_images(folder / split, classes, images, at_least=1, why="")
    if validation_name:
        return classes, listed["train"], listed[validation_name], listed["test"]
    train, validation = _divide(
        listed["train"], validation_fraction, derive_seed(seed, folder.name, "validation"), keep=1
    )
    return classes, train, validation, listed["test"]


def _class_folders(folder: Path) -> list[str]:
    classes = [path.name for path in _subfolders(folder)]
    if len(classes) < 2:
        found = f"only {classes[0]}" if classes else "none"
        raise DataError(f"{folder} needs at least two class folders with images, found {found}")
    return classes


def _list_images(folder: Path, prefix: str, classes: list[str]) -> _Split:
    files: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(
            path.relative_to(folder).as_posix()
            for path in (folder / prefix / name).rglob("*")
            if path.suffix.lower() in EXTENSIONS and not path.name.startswith(".") and path.is_file()
        )
        files += found
        labels += [label] * len(found)
    return _Split(files, labels)


def _require_images(folder: Path, classes: list[str], images: _Split, *, at_least: int, why: str) -> None:
    problems = []
    for label, name in enumerate(classes):
        count = images.labels.count(label)
        if count == 0:
            kinds = ", ".join(sorted(EXTENSIONS))
            problems.append(f"{folder / name} holds no image ({kinds}): add some or delete the folder")
        elif count < at_least:
            problems.append(f"{folder / name} holds {count} image{'s' * (count > 1)}, {at_least} are needed {why}")
    if problems:
        raise DataError(join_problems(problems))


def _divide(images: _Split, fraction: float, seed: int, *, keep: int) -> tuple[_Split, _Split]:
    """Split off ``fraction`` of every class (at least one image if the fraction is not 0, but leave ``keep`` images)."""
    first, second = _Split([], []), _Split([], [])
    for label in dict.fromkeys(images.labels):
        members = [file for file, owner in zip(images.files, images.labels, strict=True) if owner == label]
        wanted = max(1, round(fraction * len(members))) if fraction else 0
        count = max(0, min(wanted, len(members) - keep))
        generator = torch.Generator().manual_seed(derive_seed(seed, label))
        taken = set(torch.randperm(len(members), generator=generator)[:count].tolist())
        for position, file in enumerate(members):
            target = second if position in taken else first
            target.files.append(file)
            target.labels.append(label)
    return first, second


def _reference(folder: Path) -> Reference | None:
    """Unlabelled images with captions, or None if there is no such folder."""
    if not folder.is_dir():
        return None
    files = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.suffix.lower() in EXTENSIONS and not path.name.startswith(".") and path.is_file()
    )
    if not files:
        raise DataError(f"{folder} holds no image: put images of anything into it, or delete it")
    captions = folder / "captions.txt"
    if not captions.exists():
        raise DataError(
            f"{captions} is missing: write one caption per line, of anything (they need not match the images)"
        )
    texts = tuple(line for _, line in numbered_lines(captions))
    if not texts:
        raise DataError(f"{captions} is empty: write one caption per line")
    labels = torch.full((len(files),), -1, dtype=torch.int64)
    return Reference(images=FileImages(folder, files, labels), captions=texts)


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
