"""Class names and prompts of the datasets, in both families of published runs, from the YAML files in ``texts``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files
from typing import Any, Literal

import yaml

from cl_methods.datasets.images import DataError

Family = Literal["zscl", "coop"]
"""Published runs come in two families of splits, class names and prompts: ZSCL's, with the names and prompts of OpenAI's CLIP,
and CoOp's."""

FILES = files("cl_methods") / "datasets" / "texts"
"""``NAME.yaml`` per dataset: ``templates`` by family, and ``classes`` in torchvision's label order. A class is its key, or
``[key, name in zscl, name in coop]``; the name is null in a family that leaves the class out."""

_AGREEMENT = 0.9


@dataclass(frozen=True)
class Classes:
    """The classes of a dataset in one family, by label.

    Attributes:
        keys: what the dataset's own files call them.
        names: what prompts call them.
        templates: prompts with one ``{}``, the training prompt first.
        spellings: for every class, normalised, all that a folder or a file of class names may call it.
    """

    keys: tuple[str, ...]
    names: tuple[str, ...]
    templates: tuple[str, ...]
    spellings: tuple[frozenset[str], ...]

    def __len__(self) -> int:
        return len(self.keys)

    def label(self, key: str, where: object) -> int:
        """The label of the class that the dataset's own files call ``key``.

        Raises:
            DataError: there is no such class; ``where`` is named as the place that says so.
        """
        try:
            return self._by_key[key]
        except KeyError:
            raise DataError(f"{where}: {key!r} is none of the {len(self)} classes, such as {self.keys[0]!r}") from None

    def knows(self, name: str) -> bool:
        """Whether a name belongs to a class, in whatever spelling."""
        return normalised(name) in self._by_spelling

    def labels_of(self, given: Sequence[str], where: object, *, whole: bool = True) -> list[int]:
        """Labels of class names or folders in whatever spelling, such as ``F-16A_B``, ``f 16a b`` and ``F-16A/B``.

        Args:
            given: one name per class.
            where: what lists them, for messages.
            whole: every class must be there.

        Raises:
            DataError: a name belongs to no class or two names to the same, or a class is missing.
        """
        found: dict[int, str] = {}
        labels = []
        for name in given:
            label = self._by_spelling.get(normalised(name))
            if label is None:
                raise DataError(f"{where}: {name!r} is none of the {len(self)} classes, such as {self.keys[0]!r}")
            if label in found:
                raise DataError(f"{where}: {name!r} and {found[label]!r} are the same class")
            found[label] = name
            labels.append(label)
        missing = [key for label, key in enumerate(self.keys) if label not in found]
        if whole and missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise DataError(
                f"{where}: found {len(found)} of {len(self)} classes; missing are {', '.join(missing[:3])}{more}"
            )
        return labels

    def labels_in_order(self, given: Sequence[str], where: object) -> list[int]:
        """Like :meth:`labels_of` for lists in the order of the labels, in which a few names may be spelt unlike any known one.

        Raises:
            DataError: the number of classes is another, or more than a tenth of the names are unknown.
        """
        if len(given) != len(self):
            raise DataError(f"{where}: expected {len(self)} classes, found {len(given)}")
        found = [self._by_spelling.get(normalised(name)) for name in given]
        known = [label for label in found if label is not None]
        if len(known) < _AGREEMENT * len(self) or len(set(known)) < len(known):
            strange = next((name for name, label in zip(given, found, strict=True) if label is None), given[0])
            raise DataError(f"{where}: these are not the {len(self)} classes of this dataset; one is {strange!r}")
        rest = iter(sorted(set(range(len(self))) - set(known)))
        return [label if label is not None else next(rest) for label in found]

    @cached_property
    def _by_key(self) -> dict[str, int]:
        return {key: label for label, key in enumerate(self.keys)}

    @cached_property
    def _by_spelling(self) -> dict[str, int]:
        """Labels by what tells a class from all others."""
        shared = Counter(spelling for each in self.spellings for spelling in each)
        return {
            spelling: label for label, each in enumerate(self.spellings) for spelling in each if shared[spelling] == 1
        }


@cache
def classes(dataset: str, family: Family) -> Classes:
    """The classes of a dataset in one family.

    Raises:
        KeyError: the dataset has no file of texts.
    """
    content = _content(dataset)
    column = {"zscl": 1, "coop": 2}[family]
    rows = [entry if isinstance(entry, list) else [entry] * 3 for entry in content["classes"]]
    rows = [row for row in rows if row[column] is not None]
    return Classes(
        keys=tuple(row[0] for row in rows),
        names=tuple(row[column] for row in rows),
        templates=tuple(content["templates"][family]),
        spellings=tuple(frozenset(normalised(name) for name in row if name) for row in rows),
    )


def normalised(name: str) -> str:
    """Letters and digits of a name in lower case: what all its spellings share."""
    return "".join(letter for letter in name.casefold() if letter.isalnum())


def _content(dataset: str) -> dict[str, Any]:
    path = FILES / f"{dataset}.yaml"
    if not path.is_file():
        raise KeyError(dataset)
    return yaml.safe_load(path.read_text(encoding="utf-8"))
