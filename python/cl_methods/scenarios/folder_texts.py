"""Class names and prompts that lie as text files beside image folders."""

from __future__ import annotations

from pathlib import Path

from cl_methods.datasets.images import DataError

DEFAULT_TEMPLATES = ("a photo of a {}.",)


def class_names(folder: Path, classes: list[str]) -> tuple[str, ...]:
    """Names for prompts: from ``classnames.txt``, or the folders' names with ``_`` as a space.

    Raises:
        DataError: a line names no class folder, a class has no name, or two classes of the task share one.
    """
    path = folder / "classnames.txt"
    names = {name: " ".join(name.replace("_", " ").split()) for name in classes}
    if path.exists():
        names = {}
        for number, line in numbered_lines(path):
            owner = max((name for name in classes if _begins(line, name)), key=len, default=None)
            if owner is None:
                raise DataError(
                    f"{path} line {number}: {line!r} does not begin with the name of a class folder; write `FOLDER: NAME`"
                )
            names[owner] = line[len(owner) :].strip(" \t:=,")
        missing = [name for name in classes if not names.get(name)]
        if missing:
            raise DataError(
                f"{path} gives no name to {', '.join(missing[:5])}; add a line `FOLDER: NAME` for each class folder"
            )
    seen: dict[str, str] = {}
    for name in classes:
        other = seen.setdefault(names[name].casefold(), name)
        if other != name:
            raise DataError(
                f"{folder}: the class folders {other} and {name} both become {names[name]!r}, so no prompt can tell them "
                "apart; rename one, or name them in classnames.txt"
            )
    return tuple(names[name] for name in classes)


def _begins(line: str, name: str) -> bool:
    return line.startswith(name) and (len(line) == len(name) or line[len(name)] in " \t:=,")


def read_templates(folder: Path, root: Path) -> tuple[str, ...]:
    """Prompts from ``templates.txt`` in the task's folder, else in the root, else the default.

    Raises:
        DataError: a line does not hold exactly one ``{}``, or there is no line.
    """
    path = next((place / "templates.txt" for place in (folder, root) if (place / "templates.txt").exists()), None)
    if path is None:
        return DEFAULT_TEMPLATES
    lines = numbered_lines(path)
    for number, line in lines:
        if line.count("{}") != 1:
            raise DataError(f"{path} line {number}: {line!r} must hold exactly one {{}}, where the class name goes")
    if not lines:
        raise DataError(f"{path} holds no template; write one per line, such as `a photo of a {{}}.`, or delete it")
    return tuple(line for _, line in lines)


def numbered_lines(path: Path) -> list[tuple[int, str]]:
    """Numbered lines that are neither empty nor comments.

    Raises:
        DataError: the file is not UTF-8 text.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text ({error}); save it as UTF-8") from error
    stripped = ((number, line.strip()) for number, line in enumerate(text.splitlines(), 1))
    return [(number, line) for number, line in stripped if line and not line.startswith("#")]
