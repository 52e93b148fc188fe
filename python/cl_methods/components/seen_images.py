"""Images of several tasks as one source, labelled among the classes of all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cl_methods.components.exemplars import Exemplars
from cl_methods.datasets.task import Task


class SeenImages(Exemplars):
    """:class:`~cl_methods.components.exemplars.Exemplars` whose labels count on from task to task.

    Args:
        tasks: whose training images they are.
        indices: for each task (N,) int64, which of them.
    """

    def __init__(self, tasks: Sequence[Task], indices: Sequence[Tensor]) -> None:
        super().__init__(tasks, indices)
        offsets = torch.tensor([0, *(len(task.class_names) for task in tasks)]).cumsum(0)
        self.labels = self.labels + offsets[self.positions]
