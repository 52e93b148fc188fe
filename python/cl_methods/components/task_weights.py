"""Weights that a task remembers beside those that train: its start, the mean of snapshots, those of the last pull."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from cl_methods.components.averages import SnapshotMean
from cl_methods.components.host_weights import HostWeights
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
        self.start: Mapping[str, Tensor] = {}
        self.mean: SnapshotMean | None = None
        self.pulled: Mapping[str, Tensor] = {}
        self._shared: frozenset[str] = frozenset()
        self._on_host = self._anchors_on_host = False
        self._device: torch.device | None = None

    def begin(
        self,
        parameters: Sequence[tuple[str, nn.Parameter]],
        *,
        start: bool,
        mean: bool,
        pulled: bool,
        on_host: bool,
        anchors_on_host: bool = False,
    ) -> None:
        """Take what the task will need of its first weights.

        Args:
            parameters: the weights that train.
            start, mean, pulled: which of the three are needed.
            on_host: keep the mean in host memory.
            anchors_on_host: keep the two others there.
        """
        self.forget()
        self._on_host, self._anchors_on_host = on_host, anchors_on_host
        self._device = parameters[0][1].device if parameters else None
        self.start = self._anchor(dict(parameters)) if start else {}
        if mean and not start:  # with a start, that is the mean until the first snapshot
            self.mean = SnapshotMean(dict(parameters), on_host=on_host)
        self.pulled = self._anchor(dict(parameters)) if pulled else {}

    def _anchor(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """A copy of the weights where anchors are kept."""
        if self._anchors_on_host and self._device is not None:
            return HostWeights(weights, self._device)
        return snapshot(weights.items())

    def share_start(self, others: Mapping[str, Tensor], *, known_equal: bool) -> None:
        """Keep the start only once where ``others``, which nobody writes to, hold the same weights.

        Args:
            others: tensors by name.
            known_equal: they are the start itself; otherwise every tensor is compared.
        """
        if known_equal:
            equal = {name: others[name].detach() for name in self.start}
        else:
            found = sharing(self.start, others)
            equal = {name: value for name, value in found.items() if value is not self.start[name]}
        self._shared = frozenset(equal)
        if isinstance(self.start, HostWeights) and equal.keys() != self.start.keys():
            self.start.share(equal)
        else:
            self.start = {**self.start, **equal}

    def take_snapshot(self, parameters: Sequence[tuple[str, nn.Parameter]], pull: float) -> None:
        """Add the weights to the mean, and move it by ``pull`` of the way to the start."""
        if self.mean is None:
            self.mean = self._first_mean()
        self.mean.update(parameters, self.start, pull)

    def pull_to_previous(self, parameters: Sequence[tuple[str, nn.Parameter]], weight: float) -> None:
        """Move the weights by ``weight`` of the way to those before the last pull."""
        before = self._anchor(dict(parameters))
        move_towards(parameters, self.pulled, weight)
        self.pulled = before

    def _first_mean(self) -> SnapshotMean:
        return SnapshotMean(self.start, on_host=self._on_host, device=self._device)

    def anchors(self) -> list[Mapping[str, Tensor]]:
        """The start, as far as no teacher shares it, and the weights before the last pull."""
        own = {name: value for name, value in self.start.items() if name not in self._shared}
        return [held for held in (own, self.pulled) if held]

    @property
    def averaged(self) -> dict[str, Tensor]:
        """The mean by name, in place; empty before there is one."""
        return {} if self.mean is None else self.mean.tensors

    def _parts(self) -> dict[str, Mapping[str, Tensor]]:
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
            self.mean = self._first_mean()
        self.start, self._shared = self._anchor(self.start), frozenset()  # a teacher may share it
        for part, weights in self._parts().items():
            stored = {name[len(part) + 1 :]: value for name, value in state.items() if name.startswith(part + ".")}
            if stored and stored.keys() != weights.keys():
                raise RuntimeError(f"state: {part} weights do not fit; was before_task called with this configuration?")
            if stored:
                assign(list(weights.items()), stored)
        if self.mean is not None:
            self.mean.snapshots = int(state.get("snapshots", 0))
