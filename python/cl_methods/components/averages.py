"""The mean of a task's first weights and snapshots of them, beside the model or in host memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cl_kernels.averager import WeightAverager
from cl_methods.components.weights import move_between, move_towards


class SnapshotMean:
    """``θ̂ ← (n θ̂ + θ) / (n + 1)`` over n - 1 snapshots and the start, each of which may be followed by a pull to other weights.

    Beside the model it works on the rows of sharded weights too. In host memory copies and sums go on while training does, and
    whoever reads the mean waits for them.

    Attributes:
        snapshots: taken so far, the start not included.

    Args:
        start: weights by name, of any shape; copied.
        on_host: keep the mean in host memory.
        device: where else it is kept; None: where the start is.
    """

    def __init__(
        self, start: Mapping[str, Tensor], *, on_host: bool = False, device: torch.device | None = None
    ) -> None:
        self.snapshots = 0
        self._host = WeightAverager(start, dtype=None, on_host=True) if on_host else None
        self._tensors = {} if on_host else {name: _copied(value, device) for name, value in start.items()}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The mean by name, with every snapshot in it. Not copies."""
        return self._tensors if self._host is None else self._host.tensors

    def update(
        self, parameters: Sequence[tuple[str, Tensor]], towards: Mapping[str, Tensor] | None = None, pull: float = 0.0
    ) -> None:
        """Take a snapshot; then, in the same pass, move the mean by ``pull`` of the way to other weights.

        Args:
            parameters: the snapshot, with the names and shapes of the start.
            towards: the other weights by name; None for no pull.
            pull: their share in the result.

        Raises:
            KeyError: a name is missing.
        """
        self.snapshots += 1
        share = 1 / (self.snapshots + 1)
        if self._host is not None:
            self._host.snapshots = self.snapshots
            self._host.update(dict(parameters), towards=towards if pull else None, pull=pull)
        elif towards is None or not pull:
            move_towards(list(self._tensors.items()), dict(parameters), share)
        else:
            move_between(list(self._tensors.items()), dict(parameters), (1 - pull) * share, towards, pull)


def _copied(value: Tensor, device: torch.device | None) -> Tensor:
    if device is None or value.device == device:
        return value.detach().clone()
    return value.detach().to(device)
