"""Zero-shot accuracy beside what was published for the same weights, and whether the difference is one to worry about."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from importlib.resources import files

from cl_methods.datasets.specification import DATASETS
from cl_methods.datasets.texts import Family

FULL_MODEL, FULL_TAG = "ViT-B-16-quickgelu", "openai"
"""Model and weights of which the ZSCL family has a value for every dataset."""
_COLUMNS = {"Flowers": "Flowers102", "Food": "Food101", "Pets": "OxfordPet", "Cars": "StanfordCars"}
_ROUNDING, _PREPROCESSING = 0.05, 0.45
_OTHER_PROMPTS = 10.0


@dataclass(frozen=True)
class PublishedZeroShot:
    """A published zero-shot accuracy.

    Attributes:
        accuracy: in percent, of all test images.
        source: who published it, with which prompts and splits.
        tolerance: largest difference, in points, that needs no explanation.
        same_prompts: measured with the class names and prompts that are used here.
    """

    accuracy: float
    source: str
    tolerance: float
    same_prompts: bool = True


def published_zero_shot(
    model: str, tag: str | None, dataset: str, family: Family, images: int
) -> PublishedZeroShot | str:
    """What was published for a dataset and weights, or why nothing is to be compared with.

    Source: of the ZSCL family, the result files of ZSCL (Zheng et al., ICCV 2023), class names, prompts and splits as here; the
    splits of Caltech101, EuroSAT and SUN397 were drawn over an unsorted list there, so their tolerance has two standard
    deviations of such a draw besides. Otherwise open_clip's table of zero-shot results, 2024, with other prompts and splits.

    Args:
        model: open_clip name.
        tag: under which the weights were released; None if they are not known, which is taken for OpenAI's with that model.
        dataset, family: a key of :data:`~cl_methods.datasets.specification.DATASETS` and its prompts and splits.
        images: test images that were found.
    """
    spec = DATASETS[dataset]
    expected = spec.sizes[family][2]
    if images != expected:
        return f"no published value: {images:,} test images, published ones are of {expected:,}"
    if family == "zscl" and model == FULL_MODEL and tag in (FULL_TAG, None):
        value = _zscl().get(dataset)
        if value is not None:
            drawn = 200 * math.sqrt(value / 100 * (1 - value / 100) / images) if spec.single else 0.0
            return PublishedZeroShot(value, "ZSCL, zscl splits and prompts", _ROUNDING + _PREPROCESSING + drawn)
    value = _open_clip().get((model, tag), {}).get(dataset)
    if value is not None:
        return PublishedZeroShot(value, "open_clip, its own prompts", _OTHER_PROMPTS, same_prompts=False)
    weights = f"{model} with {tag!r}" if tag else f"{model} with these weights"
    return f"no published value for {weights} and {family} prompts"


def verdict(accuracy: float, published: PublishedZeroShot) -> tuple[bool, str]:
    """Whether the difference needs no explanation, and a phrase about it."""
    difference = accuracy - published.accuracy
    if abs(difference) <= published.tolerance:
        return True, "as published" if published.same_prompts else "near, other prompts"
    return False, f"differs by more than {published.tolerance:.1f}"


def _zscl() -> dict[str, float]:
    with files("cl_methods.evaluation").joinpath("published.csv").open() as file:
        for row in csv.DictReader(file):
            if (row["scenario"], row["order"], row["metric"], row["method"]) == ("mtil", "I", "last", "Zero-shot"):
                return {name: float(row[column]) for column, name in _zscl_columns(row).items()}
    return {}


def _zscl_columns(row: dict[str, str]) -> dict[str, str]:
    names = {column: _COLUMNS.get(column, column) for column in row}
    return {column: name for column, name in names.items() if name in DATASETS and row[column]}


def _open_clip() -> dict[tuple[str, str | None], dict[str, float]]:
    with files("cl_methods.evaluation").joinpath("published_zero_shot.csv").open() as file:
        return {
            (row.pop("model"), row.pop("pretrained")): {name: float(value) for name, value in row.items()}
            for row in csv.DictReader(file)
        }
