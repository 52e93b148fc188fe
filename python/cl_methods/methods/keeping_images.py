"""What methods with a memory of images have in common: room for every class, and the images again after a restart."""

from __future__ import annotations

from collections.abc import Sequence

from cl_methods.components.exemplars import ExemplarMemory
from cl_methods.datasets.task import Task
from cl_methods.methods.base import Method


class KeepsImages(Method):
    """What methods share that keep images of earlier tasks; by itself not a continual method.

    Attributes:
        memory: which images; a subclass makes it.
    """

    memory: ExemplarMemory

    def check_tasks(self, tasks: Sequence[Task]) -> None:
        """The memory has to hold an image of every class of the sequence."""
        super().check_tasks(tasks)
        self.memory.check_room(tasks)

    def recall(self, tasks: Sequence[Task]) -> None:
        """The tasks whose indices the memory holds."""
        super().recall(tasks)
        self.memory.tasks = list(tasks)
