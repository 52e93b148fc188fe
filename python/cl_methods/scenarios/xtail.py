"""Scenario ``xtail``: ten datasets one after the other, and nothing tells of a test image which of them it comes from."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from cl_methods.datasets.images import DataError
from cl_methods.datasets.task import Task
from cl_methods.scenarios.base import Scenario
from cl_methods.scenarios.mtil import ORDERS, chosen_datasets, read_tasks, split_options

if TYPE_CHECKING:
    from cl_methods.scenarios import ScenarioOptions

TEMPLATE = "a photo of a {}."
"""Of all classes of all datasets: a prompt of its own would tell a dataset from the others."""

SHOTS = 16
SPLIT = "coop"


def load_scenario(options: ScenarioOptions, order: str = "I") -> Scenario:
    """The datasets of X-TAIL below ``options.root``, with one prompt for all.

    As in the public code, ``clk run`` takes CoOp's splits, 16 images per class and the label space ``all`` unless it is told
    otherwise; here the options are taken as they are.

    Args:
        options: where the data is, family of splits, shots, reference data.
        order: ``I``, alphabetical as in the public code, or names of datasets separated by commas.

    Raises:
        DataError: the order is unknown; a dataset is missing or damaged, or its splits have other than the published sizes.

    Source: Xu et al., "Advancing Cross-domain Discriminability in Continual Learning of Vision-Language Models", 2024, public code.
    """
    if options.root is None:
        raise DataError(
            "data.root: scenario xtail needs the folder that holds the datasets; "
            "`clk data check --root FOLDER --datasets X-TAIL --split coop` says what is in it"
        )
    if order == "II":
        raise DataError("order: xtail has the order I of its public code, or datasets separated by commas; got 'II'")
    names = ORDERS["X-TAIL"] if order == "I" else chosen_datasets(order)
    tasks, notes = read_tasks(names, options.root, split_options(options))
    return Scenario(name="xtail", order=order, tasks=tuple(map(_prompted, tasks)), notes=notes)


def _prompted(task: Task) -> Task:
    """The task under the common prompt, which says nothing of numbers: the names of digits do."""
    names = tuple(f'number: "{name}"' for name in task.class_names) if task.name == "MNIST" else task.class_names
    return replace(task, class_names=names, templates=(TEMPLATE,))
