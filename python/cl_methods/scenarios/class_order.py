"""Orders in which the classes of one dataset are learnt: published, drawn, or from a file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from cl_methods.datasets.images import DataError

FILES = files("cl_methods") / "scenarios" / "class_orders"
"""``NAME.yaml`` per dataset with a published protocol: ``class_order``, ``template``, and where they are not the usual ones
``names`` and ``base_classes``. Source: the class-incremental code of Zheng et al., "Preventing Zero-Shot Transfer Degradation in
Continual Learning of Vision-Language Models", 2023, whose orders MoE-Adapters uses too."""

_DRAWN = re.compile(r"random-(\d+)")
_LARGEST_SEED = 2**32 - 1


@dataclass(frozen=True)
class Protocol:
    """What public runs on a dataset fix besides its splits.

    Attributes:
        class_order: labels in the order in which they are learnt.
        template: the one prompt of training and evaluation.
        names: ``texts`` for the names that prompts have elsewhere, ``files`` for those of the dataset's own files.
        base_classes: classes of the first task where it is larger than the others, else 0.
    """

    class_order: tuple[int, ...]
    template: str
    names: Literal["texts", "files"] = "texts"
    base_classes: int = 0


def protocol(dataset: str) -> Protocol | None:
    """The published protocol of a dataset, None if there is none."""
    path = FILES / f"{dataset}.yaml"
    if not path.is_file():
        return None
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    return Protocol(**{**content, "class_order": tuple(content["class_order"])})


def class_order(name: str, dataset: str, classes: int) -> tuple[int, ...]:
    """Labels in the order in which they are learnt.

    Args:
        name: ``I`` for the published order, ``labels`` for ascending labels, ``random-SEED`` for the permutation that NumPy's
            ``RandomState(SEED)`` draws (with 1993 the order of much class-incremental code), or a YAML file with a list
            ``class_order``, as the published ones are.
        dataset: whose classes.
        classes: how many it has.

    Raises:
        DataError: nothing was published for the dataset, the name is unknown, or the file holds no permutation of the labels.
    """
    if name == "labels":
        return tuple(range(classes))
    drawn = _DRAWN.fullmatch(name)
    if drawn:
        seed = int(drawn[1])
        if seed > _LARGEST_SEED:
            raise DataError(f"order: expected random-SEED with a seed up to {_LARGEST_SEED}, got {name!r}")
        return tuple(np.random.RandomState(seed).permutation(classes).tolist())
    if name == "I":
        published = protocol(dataset)
        if published is None:
            raise DataError(
                f"order: no order of the classes of {dataset} was published with ZSCL; ask for --order random-1993, the draw of "
                "much class-incremental code, for --order labels, or for a file"
            )
        return _permutation(published.class_order, classes, f"the published order of {dataset}")
    if name.endswith((".yaml", ".yml")):
        return _permutation(_read(Path(name)), classes, name)
    raise DataError(f"order: scenario cil has I, labels, random-SEED and files NAME.yaml, got {name!r}")


def _read(path: Path) -> Any:
    if not path.is_file():
        raise DataError(f"order: {path} does not exist; give a YAML file with a list `class_order`")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"order: {path} is not valid YAML: {error}") from error
    if not isinstance(content, Mapping) or "class_order" not in content:
        raise DataError(f"order: {path} has no list `class_order: [label, …]`")
    return content["class_order"]


def _permutation(order: Any, classes: int, where: str) -> tuple[int, ...]:
    """``order`` itself, if it holds every label once.

    Raises:
        DataError: it does not.
    """
    if not isinstance(order, (list, tuple)) or not all(type(label) is int for label in order):
        raise DataError(f"order: {where}: class_order must be a list of whole numbers")
    if len(order) != classes:
        raise DataError(f"order: {where} has {len(order)} labels, and the dataset {classes} classes")
    outside = next((label for label in order if not 0 <= label < classes), None)
    if outside is not None:
        raise DataError(f"order: {where}: expected labels from 0 to {classes - 1}, got {outside}")
    if len(set(order)) < classes:
        twice = next(label for label in order if order.count(label) > 1)
        raise DataError(f"order: {where}: expected every label once, got {twice} more than once")
    return tuple(order)
