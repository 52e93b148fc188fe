"""Weights that a task remembers beside those that train: its start, the mean of snapshots, those of the last pull."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from cl_methods.components.averages import SnapshotMean
from cl_methods.components.weights import assign, move_towards, sharing, snapshot


class TaskWeights:
    """Each by name, in the shapes of the trained weights, and there only where a method needs it.

    Attributes:
        start: weights at the start of the task. A teacher may hold the same tensors: never written to.
        mean: of the start and the snapshots taken since.
        pulled: weights before the last pull of :meth:`pull_to_previous`.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Between tasks there is nothing to remember."""
        self.start: dict[str, Tensor] = {}
        self.mean: SnapshotMean | None = None
        self.pulled: dict[str, Tensor] = {}
        self._on_host = False

    def begin(
        self, parameters: Sequence[tuple[str, nn.Parameter]], *, start: bool, mean: bool, pulled: bool, on_host: bool
    ) -> None:
        """Take what the task will need of its first weights.

        Args:
            parameters: the weights that train.
            start, mean, pulled: which of the three are needed.
            on_host: keep the mean in host memory.
        """
        self.forget()
        self._on_host = on_host
        self.start = snapshot(parameters) if start else {}
        if mean and not start:  # with a start, that is the mean until the first snapshot
            self.mean = SnapshotMean(dict(parameters), on_host=on_host)
        self.pulled = snapshot(parameters) if pulled else {}

    def share_start(self, others: Mapping[str, Tensor], *, known_equal: bool) -> None:
        """Keep the start only once where ``others``, which nobody writes to, hold the same weights.

        Args:
            others: tensors by name.
            known_equal: they are the start itself; otherwise every tensor is compared.
        """
        if known_equal:
            self.start = {name: others[name].detach() for name in self.start}
        else:
            self.start = sharing(self.start, others)

    def take_snapshot(self, parameters: Sequence[tuple[str, nn.Parameter]], pull: float) -> None:
        """Add the weights to the mean, and move it by ``pull`` of the way to the start."""
        if self.mean is None:
            self.mean = SnapshotMean(self.start, on_host=self._on_host)
        self.mean.update(parameters, self.start, pull)

    def pull_to_previous(self, parameters: Sequence[tuple[str, nn.Parameter]], weight: float) -> None:
        """Move the weights by ``weight`` of the way to those before the last pull."""
        before = snapshot(parameters)
        move_towards(parameters, self.pulled, weight)
        self.pulled = before

    @property
    def averaged(self) -> dict[str, Tensor]:
        """The mean by name, in place; empty before there is one."""
        return {} if self.mean is None else self.mean.tensors

    def _parts(self) -> dict[str, dict[str, Tensor]]:
        return {"start": self.start, "ensemble": self.averaged, "pulled": self.pulled}

    def state_dict(self) -> dict[str, Tensor]:
        """``start.``, ``ensemble.`` and ``pulled.`` with the names of weights, and the number of ``snapshots``."""
        named = {f"{part}.{name}": value for part, held in self._parts().items() for name, value in held.items()}
        return {**named, "snapshots": torch.tensor(0 if self.mean is None else self.mean.snapshots)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore :meth:`state_dict` after :meth:`begin`; parts that the state lacks stay as they are.

        Raises:
            RuntimeError: a part has other names than the state's.
        """
        if self.mean is None and self.start and any(name.startswith("ensemble.") for name in state):
            self.mean = SnapshotMean(self.start, on_host=self._on_host)
        self.start = {name: value.clone() for name, value in self.start.items()}  # which a teacher may share
        for part, weights in self._parts().items():
            stored = {name[len(part) + 1 :]: value for name, value in state.items() if name.startswith(part + ".")}
            if stored and stored.keys() != weights.keys():
                raise RuntimeError(f"state: {part} weights do not fit; was before_task called with this configuration?")
            if stored:
                assign(list(weights.items()), stored)
        if self.mean is not None:
            self.mean.snapshots = int(state.get("snapshots", 0))
