"""The classes that a method on frozen features has learnt: names, texts and prototypes, all encoded once."""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_methods.backbone import Backbone, prompt
from cl_methods.datasets.task import Task

_TENSORS = ("texts", "sums", "counts")


class LearntClasses:
    """Classes in the order in which tasks brought them; a name that comes again is the same class.

    Attributes:
        templates: the templates of each class by its name, those of the first task that had it.
        texts: (C, d) text features with the first template, not normalised.
        sums: (C, d) of the normalised features of a class's training images; ``counts``: (C, 1), their number.
    """

    texts: Tensor
    sums: Tensor
    counts: Tensor

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.templates: dict[str, tuple[str, ...]] = {}
        self._brought: list[list[str]] = []
        self._prompts: dict[str, Tensor] = {}
        self._zero_shot: Tensor | None = None
        self._prototypes: Tensor | None = None

    def __len__(self) -> int:
        return len(self.templates)

    def __contains__(self, name: str) -> bool:
        return name in self.templates

    def rows(self, names: tuple[str, ...]) -> Tensor:
        """(n,) int64 row of each of the named classes, on the CPU."""
        rows = {name: row for row, name in enumerate(self.templates)}
        return torch.tensor([rows[name] for name in names], dtype=torch.int64)

    @torch.no_grad()
    def add(self, task: Task, features: Tensor) -> None:
        """Take in a task.

        Args:
            task: its class names and templates, and the labels of its training images.
            features: (N, d) normalised features of these images.
        """
        first = not self.templates
        new = [name for name in task.class_names if name not in self.templates]
        self.templates |= dict.fromkeys(new, task.templates)
        self._brought.append(new)
        self._zero_shot = self._prototypes = None
        texts = features.new_zeros(0, features.shape[1])
        if new:
            tokens = self.backbone.tokenize([prompt(task.templates[0], name) for name in new])
            texts = self.backbone.frozen_text_features(tokens, normalise=False).to(features)
        members = F.one_hot(task.train.labels, len(task.class_names)).to(features)
        sums, counts = features.new_zeros(len(self), features.shape[1]), features.new_zeros(len(self), 1)
        if not first:
            sums[: len(self.sums)], counts[: len(self.sums)] = self.sums, self.counts
            texts = torch.cat([self.texts, texts])
        rows = self.rows(task.class_names).to(features.device)
        sums[rows] += members.T @ features  # over the task's own classes: no class comes twice
        counts[rows] += members.sum(dim=0)[:, None]
        self.texts, self.sums, self.counts = texts, sums, counts

    def prototypes(self) -> Tensor:
        """Means (C, d) of the normalised features; zero for a class without images."""
        if self._prototypes is None:
            self._prototypes = self.sums / self.counts.clamp(min=1)
        return self._prototypes

    @torch.no_grad()
    def ensemble(self, projection: Callable[[Tensor], Tensor]) -> Tensor:
        """(C, d): mean over a class's templates of projected and normalised text features, normalised.

        Prompts are encoded when they are first needed, those that one task brought together: the last bits of features depend on
        what shares a batch, and a resumed run has to find the same ones.

        Args:
            projection: of text features (P, d).
        """
        for names in self._brought:
            if not names or names[0] in self._prompts:
                continue
            templates = self.templates[names[0]]
            tokens = self.backbone.tokenize([prompt(template, name) for name in names for template in templates])
            found = self.backbone.frozen_text_features(tokens, normalise=False).to(self.texts)
            self._prompts |= dict(zip(names, found.split(len(templates)), strict=True))
        every = [F.normalize(projection(self._prompts[name]), dim=1).mean(dim=0) for name in self.templates]
        return F.normalize(torch.stack(every), dim=1)

    def zero_shot(self) -> Tensor:
        """The zero-shot classifier (C, d) of all classes."""
        if self._zero_shot is None:
            self._zero_shot = self.ensemble(lambda features: features)
        return self._zero_shot

    def state_dict(self) -> dict[str, Tensor]:
        """Names and templates of every task's new classes as bytes, and the tensors; empty before the first class."""
        if not self.templates:
            return {}
        brought = [(names, self.templates[names[0]] if names else ()) for names in self._brought]
        names = torch.tensor(list(json.dumps(brought).encode()), dtype=torch.uint8)
        return {"names": names, **{name: getattr(self, name) for name in _TENSORS}}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore :meth:`state_dict`.

        Raises:
            RuntimeError: the state has other tensors.
        """
        if state and state.keys() != {"names", *_TENSORS}:
            raise RuntimeError(f"state: expected names, texts, sums and counts of classes, found {', '.join(state)}")
        brought = json.loads(bytes(state["names"].tolist())) if state else []
        self._brought = [names for names, _ in brought]
        self.templates = {name: tuple(templates) for names, templates in brought for name in names}
        self._prompts, self._zero_shot, self._prototypes = {}, None, None
        for name in _TENSORS if state else ():
            setattr(self, name, state[name].to(self.backbone.device, copy=True))
