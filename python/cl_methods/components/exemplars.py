"""A bounded memory of examples: which images of earlier tasks are kept, the same number for every class."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from typing_extensions import override

from cl_methods.backbone import Backbone
from cl_methods.components.source_features import source_features
from cl_methods.datasets.images import ImageSource, RawImage, Subset
from cl_methods.datasets.task import Task
from cl_methods.sharding import gathered

Selection = Callable[[Tensor, int], Tensor]
"""Rows (n,) of one class and a number -> that many of these rows (fewer if there are fewer), the most important first."""


def herding(features: Tensor, count: int) -> Tensor:
    """Rows whose running mean stays closest to the mean of all: each adds what brings it nearest, none twice.

    ``p_k = argmin_i ||μ − (f_i + Σ_{j<k} f_{p_j}) / k||`` with μ the mean of the rows; the first m of them are what herding
    would choose for m, so a memory shrinks by cutting off the end.

    Args:
        features: (N, d), normalised or not; compared in float64.
        count: rows wanted; all N if there are fewer.

    Returns:
        (min(count, N),) int64 on the CPU, in the order of choice.

    Source: iCaRL (Rebuffi et al., CVPR 2017), algorithm 4.
    """
    features = features.detach().double()
    mean, total = features.mean(dim=0), features.new_zeros(features.shape[1])
    squares = features.square().sum(dim=1)
    chosen = []
    for k in range(1, min(count, len(features)) + 1):
        best = (squares - 2 * features @ (k * mean - total)).argmin()
        total = total + features[best]
        squares[best] = torch.inf
        chosen.append(best)
    return torch.stack(chosen).cpu() if chosen else torch.zeros(0, dtype=torch.int64)


@torch.no_grad()
def encode_source(backbone: Backbone, source: ImageSource, batch_size: int = 128) -> Tensor:
    """Normalised features (N, d) of every image, evaluation transform, evaluation mode, on the device."""
    with gathered(backbone):
        backbone.model.eval()
        return source_features(
            backbone.encode_images, source, backbone.eval_transform, batch_size=batch_size, device=backbone.device
        )


def herded(backbone: Backbone, task: Task) -> Selection:
    """Selection by :func:`herding` on the normalised features of the task's training images, all encoded now."""
    features = encode_source(backbone, task.train)
    return lambda rows, count: rows[herding(features[rows.to(features.device)], count)]


class Exemplars(ImageSource):
    """The images of a memory as one source, task after task.

    Args:
        tasks: whose training images they are.
        indices: for each task (n,) int64, which of them.

    Attributes:
        positions: (N,) int64, the task that each image comes from.
    """

    def __init__(self, tasks: Sequence[Task], indices: Sequence[Tensor]) -> None:
        self._parts = [Subset(task.train, rows) for task, rows in zip(tasks, indices, strict=True)]
        self.labels = torch.cat([part.labels for part in self._parts])
        self.positions = torch.cat([torch.full_like(part.labels, place) for place, part in enumerate(self._parts)])
        self._offsets = torch.tensor([0, *(len(part) for part in self._parts)]).cumsum(0)

    @override
    def image(self, index: int) -> RawImage:
        part, place = self._part(index)
        return part.image(place)

    @override
    def locate(self, index: int) -> tuple[ImageSource, int]:
        part, place = self._part(index)
        return part.locate(place)

    @override
    def stamp(self, index: int) -> int:
        part, place = self._part(index)
        return part.stamp(place)

    def _part(self, index: int) -> tuple[Subset, int]:
        place = int(self.positions[index])
        return self._parts[place], index - int(self._offsets[place])

    @override
    def fingerprint(self) -> str:
        return hashlib.sha256("".join(part.fingerprint() for part in self._parts).encode()).hexdigest()


class ExemplarMemory:
    """At most ``budget`` images of the tasks learnt so far, by their indices in the tasks' training images.

    Every class has the same share, the first ``budget mod classes`` of them one image more; a class with fewer images leaves the
    rest of its share empty.

    Attributes:
        indices: for each task (n,) int64, class after class, the most important first.
        tasks: the tasks, as far as they are known: after a restart they have to be given again.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.indices: list[Tensor] = []
        self.tasks: list[Task] = []

    def __len__(self) -> int:
        return sum(len(rows) for rows in self.indices)

    def check(self, index: int, task: Task) -> None:
        """Check, before ``task`` is learnt, that it is the next one and that every class can have an image afterwards.

        Raises:
            ValueError: the budget is smaller than the number of classes.
            RuntimeError: earlier tasks are not known.
        """
        if not len(self.tasks) == len(self.indices) == index:
            raise RuntimeError(
                f"before_task: task number {index} follows {index} learnt ones, the memory knows {len(self.tasks)} tasks "
                f"and holds images of {len(self.indices)}; call load_state_dict and recall first"
            )
        self.check_room([*self.tasks, task])

    def check_room(self, tasks: Sequence[Task]) -> None:
        """Check that every class of ``tasks`` can have an image.

        Raises:
            ValueError: the budget is smaller than the number of classes.
        """
        classes = sum(len(task.class_names) for task in tasks)
        if self.budget < classes:
            raise ValueError(
                f"memory: expected at least one image for each of the {classes} classes up to task {tasks[-1].name}, got "
                f"{self.budget}"
            )

    def add(self, task: Task, select: Selection) -> None:
        """Make room by cutting the end off every class, then keep images of ``task``."""
        every = [*self.tasks, task]
        classes = sum(len(known.class_names) for known in every)
        shares = [self.budget // classes + (number < self.budget % classes) for number in range(classes)]
        kept, first = [], 0
        for known, rows in zip(every, [*self.indices, None], strict=True):
            own = shares[first : first + len(known.class_names)]
            first += len(own)
            labels = known.train.labels if rows is None else known.train.labels[rows]
            pieces = []
            for label, share in enumerate(own):
                members = (labels == label).nonzero().squeeze(1)
                pieces.append(select(members, share) if rows is None else rows[members[:share]])
            kept.append(torch.cat(pieces))
        self.indices, self.tasks = kept, every

    def source(self) -> Exemplars:
        """The images of the memory."""
        return Exemplars(self.tasks, self.indices)

    def state_dict(self) -> dict[str, Tensor]:
        """``{"0": indices of the first task, …}``: eight bytes an image."""
        return {str(place): rows for place, rows in enumerate(self.indices)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore :meth:`state_dict`; the tasks themselves come by other ways."""
        self.indices = [state[str(place)].cpu().clone() for place in range(len(state))]
