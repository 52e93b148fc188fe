"""A sequence of tasks in the order in which they are learnt."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from cl_methods.datasets.task import Reference, Task


@dataclass(frozen=True)
class Scenario:
    """A sequence of tasks in the order in which they are learnt."""

    name: str
    order: str
    tasks: tuple[Task, ...]
    reference: Reference | None = None
    notes: dict[str, str] = field(default_factory=dict)

    def fingerprint(self) -> str:
        """sha256 over every split of every task in order, with class names and templates, and the reference data."""
        digest = hashlib.sha256()
        for task in self.tasks:
            digest.update("\n".join((task.name, *task.class_names, *task.templates)).encode())
            for source in (task.train, task.validation, task.test):
                digest.update(source.fingerprint().encode())
        if self.reference is not None:
            for part in self.reference.identity():
                digest.update(part)
        return digest.hexdigest()
