"""How many reference images the steps of a run meet for the first time: those are what a frozen teacher encodes."""

from __future__ import annotations

import torch

from cl_methods.training.data import stream_indices


class ReferenceDraws:
    """Follows the draws of a run's reference images, which (seed, task, step) decide, without reading any.

    Args:
        seed: of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._ever = self._here = torch.zeros(0, dtype=torch.bool)

    def begin_task(self) -> None:
        """From now on the draws are those of the next task."""
        self._here = torch.zeros_like(self._ever)

    def draw(self, count: int, size: int, task: int, first_step: int, steps: int) -> tuple[int, int]:
        """The images that a stage's steps meet for the first time.

        A batch that holds one of them twice counts it twice, as it is encoded. Sets of another size are other sets.

        Args:
            count: reference images; at least 1.
            size: of them in a step.
            task: its number, on which the order depends.
            first_step, steps: of the stage, counted within the task.

        Returns:
            Those that no step of the run has met, and those that only earlier tasks have.
        """
        if len(self._ever) != count:
            self._ever, self._here = (torch.zeros(count, dtype=torch.bool) for _ in range(2))
        new = again = 0
        drawn = stream_indices(count, first_step * size, steps * size, self.seed, "reference", task)
        for rows in drawn.split(size):
            missing = rows[~self._here[rows]]
            known = int(self._ever[missing].sum())
            new, again = new + len(missing) - known, again + known
            self._here[missing] = self._ever[missing] = True
            if self._here.all():
                break
        return new, again
