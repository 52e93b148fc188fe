"""What methods share that fit one linear head to random features of a frozen CLIP: no optimiser, one pass over each task."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_methods.backbone import Backbone
from cl_methods.checks import check_at_least, check_finite
from cl_methods.datasets.task import Reference, Task
from cl_methods.methods.base import Batch, Method


@dataclass(frozen=True)
class RandomFeatureConfig:
    """Settings of every method with random features.

    Attributes:
        width: M, the number of random features.
        batch_size: images per forward pass.
    """

    width: int = 10000
    batch_size: int = 64

    def __post_init__(self) -> None:
        check_finite(self)
        check_at_least(self, 1, "width", "batch_size")


class RandomFeatureMethod(Method):
    """One linear head ``r(x) = W h(x)`` over all learnt classes, with ``h(x) = relu(f(x) P)`` and ``P ~ N(0, 1)`` fixed.

    f (d,) is the normalised image feature of the frozen CLIP. A class is known by its name: tasks that share a name share
    the class, as they do when accuracies are counted. Nothing else tells tasks apart: the head scores all learnt classes at
    once, and the label space alone decides which of the scores compete (``task``: those of the evaluated task).

    Classes that were not learnt keep their zero-shot score ``z_c = s f·w_c``, so before the first task, and on tasks that are
    still to come, this is zero-shot CLIP. Where both kinds compete (label space ``seen`` before its last task, or ``all``) they
    have to be on one scale: what zero-shot CLIP gives to the learnt classes together, ``L = logsumexp_learnt z``, is shared
    out among them by the head, ``L + log softmax(s r)``. That is increasing in r, so the head alone ranks the learnt classes.

    Stored between tasks: P (d, M), W (C, M), names and zero-shot embeddings (C, d) of the learnt classes, and what the method
    needs to go on. No image and no feature of an earlier task is kept.

    Source: random features for linear heads, Rahimi and Recht, NeurIPS 2007; on frozen features in continual learning,
    McDonnell et al., NeurIPS 2023.

    Attributes:
        stores: names under which :meth:`fit` stores tensors besides ``weight``.
        class_names: the learnt classes, in the order of the rows of W.
    """

    stores: ClassVar[tuple[str, ...]] = ()
    closed_form: ClassVar[bool] = True
    frozen_images: ClassVar[bool] = True
    config: RandomFeatureConfig

    def __init__(self, backbone: Backbone, config: RandomFeatureConfig, reference: Reference | None = None) -> None:
        super().__init__(backbone, config, reference)
        backbone.model.requires_grad_(False)
        self.class_names: list[str] = []
        self._tensors: dict[str, Tensor] = {}
        self._pass: dict[str, list[Tensor]] = {"features": [], "labels": []}

    @abstractmethod
    def fit(self, features: Tensor, labels: Tensor, classes: int) -> dict[str, Tensor]:
        """Learn a task and forget its features.

        Args:
            features: (N, d) of its images in the order of the pass.
            labels: (N,) int64 rows of W.
            classes: C, learnt classes including those of this task.

        Returns:
            Every tensor to store; ``weight`` (C, M) is the head.
        """

    def stored(self, name: str) -> Tensor | None:
        """What :meth:`fit` stored under ``name``; None before the first task."""
        return self._tensors.get(name)

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """No parameter: the head has a closed form."""
        return []

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Never called: :meth:`learn` takes its place.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(f"{self.name} has no loss to differentiate; give its batches to learn")

    def before_task(self, index: int, task: Task) -> None:
        """Draw the projection before the first task (on the CPU, so that every device gets the same), start a new pass."""
        super().before_task(index, task)
        self.backbone.model.eval()
        self._pass = {"features": [], "labels": []}
        if "projection" not in self._tensors:
            width = self.classifier(task).shape[1]
            self._tensors["projection"] = torch.randn(width, self.config.width).to(self.backbone.device)

    @torch.no_grad()
    def learn(self, batch: Batch) -> None:
        """Encode the images; the features (N, d) are far smaller than what they are lifted to, which waits for the end."""
        self._pass["features"].append(self.backbone.encode_images(batch.images).float())
        self._pass["labels"].append(batch.labels.to(self.backbone.device))

    @torch.no_grad()
    def after_task(self, index: int, task: Task) -> None:
        """Fit the head to everything learnt so far.

        Raises:
            RuntimeError: no batch of the task has been given to :meth:`learn`.
        """
        super().after_task(index, task)
        if not self._pass["features"]:
            raise RuntimeError(f"{self.name}: give the batches of task {task.name} to learn before after_task")
        features, labels = (torch.cat(self._pass[part]) for part in ("features", "labels"))
        new = [row for row, name in enumerate(task.class_names) if name not in self.class_names]
        texts = self.classifier(task)[new].float()
        self._tensors["texts"] = torch.cat([self._tensors["texts"], texts]) if self.class_names else texts
        self.class_names += [task.class_names[row] for row in new]
        rows = torch.tensor([self.class_names.index(name) for name in task.class_names], device=labels.device)
        self._tensors |= self.fit(features, rows[labels], len(self.class_names))
        self._pass = {"features": [], "labels": []}

    def lift(self, features: Tensor) -> Tensor:
        """Random features h (N, M) of ``features`` (N, d)."""
        return F.relu(features @ self._tensors["projection"])

    def head_scores(self, features: Tensor) -> Tensor:
        """The head's outputs r (N, C) for ``features`` (N, d); it was fitted to 1 for the right class and 0 for the others."""
        return self.lift(features) @ self._tensors["weight"].T

    def feature_scores(self, features: Tensor, tasks: Sequence[Task]) -> list[Tensor]:
        """(B, C_t) scores of ``features`` (B, d): the head's for learnt classes, zero-shot ones for the others."""
        scale, found = self.backbone.logit_scale, super().feature_scores(features, tasks)
        places = [[place for place, name in enumerate(task.class_names) if name in self.class_names] for task in tasks]
        if any(places):
            features = features.float()
            share = F.log_softmax(scale * self.head_scores(features), dim=1)
            whole = torch.logsumexp(scale * features @ self._tensors["texts"].T, dim=1, keepdim=True)
            for logits, task, learnt in zip(found, tasks, places, strict=True):
                rows = [self.class_names.index(task.class_names[place]) for place in learnt]
                logits[:, learnt] = (whole + share)[:, rows].to(logits.dtype)
        return found

    def forget_classifiers(self) -> None:
        """Nothing to forget: the towers are frozen, so class embeddings stay what they are."""

    def state_dict(self) -> dict[str, Tensor]:
        """What is stored between tasks, and under ``pass.`` the features of a task that has begun; no CLIP weights."""
        state = dict(self._tensors)
        if self.class_names:
            state["class_names"] = torch.tensor(list(json.dumps(self.class_names).encode()), dtype=torch.uint8)
        state.update({f"pass.{part}": torch.cat(values) for part, values in self._pass.items() if values})
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore :meth:`state_dict`.

        Raises:
            RuntimeError: the state is not one of this method with this ``width``.
        """
        device, state = self.backbone.device, dict(state)
        names = state.pop("class_names", None)
        parts = {part: state.pop(f"pass.{part}", None) for part in self._pass}
        unknown = state.keys() - {"projection", "texts", "weight", *self.stores}
        if unknown or "projection" not in state or (names is None) == ("weight" in state):
            found = ", ".join(sorted(state)) or "nothing"
            raise RuntimeError(f"state: expected the tensors of {self.name}, found {found}")
        if state["projection"].shape[1] != self.config.width:
            raise RuntimeError(
                f"state: its projection has width {state['projection'].shape[1]}, the settings say {self.config.width}"
            )
        self._pass = {part: [] if value is None else [value.to(device)] for part, value in parts.items()}
        self.class_names = [] if names is None else json.loads(bytes(names.tolist()))
        self._tensors = {name: value.to(device) for name, value in state.items()}
