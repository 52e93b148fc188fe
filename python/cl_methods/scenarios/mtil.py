"""Scenario ``mtil``: eleven datasets one after the other, in the orders and splits of the published runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from cl_methods.datasets.find import DataNotFoundError, SplitOptions, find_dataset, require_root
from cl_methods.datasets.images import DataError
from cl_methods.datasets.specification import DATASETS, meant
from cl_methods.datasets.task import Task
from cl_methods.scenarios.base import Scenario
from cl_methods.scenarios.verification import join_problems

if TYPE_CHECKING:
    from cl_methods.scenarios import ScenarioOptions

ORDERS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "I": (
            "Aircraft",
            "Caltech101",
            "CIFAR100",
            "DTD",
            "EuroSAT",
            "Flowers102",
            "Food101",
            "MNIST",
            "OxfordPet",
            "StanfordCars",
            "SUN397",
        ),
        "II": (
            "StanfordCars",
            "Food101",
            "MNIST",
            "OxfordPet",
            "Flowers102",
            "SUN397",
            "Aircraft",
            "Caltech101",
            "DTD",
            "EuroSAT",
            "CIFAR100",
        ),
        "X-TAIL": (
            "Aircraft",
            "Caltech101",
            "DTD",
            "EuroSAT",
            "Flowers102",
            "Food101",
            "MNIST",
            "OxfordPet",
            "StanfordCars",
            "SUN397",
        ),
    }
)
"""The published orders. Source of I and II: Zheng et al., "Preventing Zero-Shot Transfer Degradation in Continual Learning of
Vision-Language Models", 2023; of X-TAIL, the ten without CIFAR100: Xu et al., "Advancing Cross-domain Discriminability in Continual
Learning of Vision-Language Models", 2024."""


def load_scenario(options: ScenarioOptions, order: str = "I") -> Scenario:
    """The datasets below ``options.root`` as tasks, each in whatever layout it lies there.

    Args:
        options: where the data is, family of splits, shots, reference data.
        order: a key of :data:`ORDERS`, or names of datasets separated by commas, such as the eight of MTIL-FS.

    Raises:
        DataError: a dataset is missing or damaged, or its splits have other than the published sizes; the message names up to five.
    """
    if options.root is None:
        raise DataError(
            "data.root: scenario mtil needs the folder that holds the datasets; `clk data check --root FOLDER` says what is in it"
        )
    tasks, notes = read_tasks(chosen_datasets(order), options.root, split_options(options))
    return Scenario(name="mtil", order=order, tasks=tasks, notes=notes)


def read_tasks(names: Sequence[str], root: Path, split: SplitOptions) -> tuple[tuple[Task, ...], dict[str, str]]:
    """Datasets below ``root`` as tasks, and for each a sentence about its layout, split and fingerprint.

    Raises:
        DataError: a dataset is missing or damaged, or its splits have other than the published sizes; the message names up to five.
    """
    require_root(root)
    tasks, notes, problems = [], {}, []
    absent: dict[str, str] = {}
    for name in names:
        try:
            found = find_dataset(DATASETS[name], root, split)
        except DataNotFoundError as error:
            absent[name] = str(error)
            continue
        except DataError as error:
            problems.append(str(error))
            continue
        tasks.append(found.task)
        notes[name] = f"{found.layout}, split {found.family}, fingerprint {found.fingerprint()}"
    if len(absent) > 1:  # where to put each of them would be a page
        family = "" if split.family == "zscl" else f" --split {split.family}"
        command = f"clk data check --root {root} --datasets {','.join(absent)}{family}"
        several = (
            f"{len(absent)} of {len(names)} datasets are not there, or not complete, in {root}: {', '.join(absent)}"
        )
        problems.insert(0, f"{several}. `{command}` says what to put where")
    else:
        problems[:0] = absent.values()
    if problems:
        raise DataError(join_problems(problems))
    return tuple(tasks), notes


def chosen_datasets(order: str, option: str = "order") -> tuple[str, ...]:
    """Names of the datasets in an order.

    Args:
        order: a key of :data:`ORDERS`, or names separated by commas.
        option: what it was given as, for messages.

    Raises:
        DataError: the order names a dataset that there is not, or one twice.
    """
    if order in ORDERS:
        return ORDERS[order]
    names = tuple(name.strip() for name in order.split(","))
    for name in names:
        if name not in DATASETS:
            close = meant(name)
            orders = f"the orders {', '.join(ORDERS)} and the datasets {', '.join(DATASETS)}"
            hint = f"did you mean {close}?" if close else f"there are {orders}"
            raise DataError(f"{option}: there is no dataset {name!r}; {hint}")
    if len(set(names)) < len(names):
        raise DataError(f"{option}: each dataset can be named once, got {order!r}")
    return names


def split_options(options: ScenarioOptions) -> SplitOptions:
    """How the datasets are split, from the options of a run.

    Raises:
        DataError: an option has an impossible value.
    """
    return SplitOptions(
        family=options.split,
        shots=options.shots,
        validation_fraction=options.validation_fraction or 0.0,
        seed=options.split_seed,
        sizes=options.sizes,
    )
