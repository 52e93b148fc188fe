"""Two frozen teachers: the pre-trained model, and the model from before the task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from cl_methods.backbone import Backbone
from cl_methods.components.host_weights import HostWeights, all_weights, give_up_module
from cl_methods.components.reference_features import FrozenFeatures
from cl_methods.components.teacher_features import TeacherFeatures
from cl_methods.datasets.task import Reference

Distance = Literal["squared", "norm"]


class DualTeachers:
    """The pre-trained model, and from the second task on also the model that the task started from.

    While the first task is learnt the two are one and the same: there is one teacher then, and nothing is computed twice.
    Images that come with an index are encoded once: for the whole run by the pre-trained model, for the task by the other.

    Args:
        backbone: the pre-trained model, which is copied.
        reference: data whose images alone are asked about by index; what it keeps on disk then serves the pre-trained model.
    """

    def __init__(self, backbone: Backbone, reference: Reference | None = None) -> None:
        self.pretrained = backbone.frozen_copy()
        kept = None
        if reference is not None and reference.features is not None:
            kept = TeacherFeatures(reference.features, self.pretrained).images(reference.images)
        self.previous: Backbone | None = None
        self._retired: Mapping[str, Tensor] = {}
        self._caches = {
            "pretrained": FrozenFeatures(self._encode_with_pretrained, backbone.device, kept),
            "previous": FrozenFeatures(self._encode_with_previous, backbone.device),
        }

    @property
    def models(self) -> tuple[Backbone, ...]:
        """The K teachers, the pre-trained one first."""
        return (self.pretrained,) if self.previous is None else (self.pretrained, self.previous)

    @property
    def start(self) -> Mapping[str, Tensor]:
        """The weights that the task started from, by name; not copies."""
        return self._retired or all_weights(self.models[-1].model)

    @property
    def second(self) -> Mapping[str, Tensor]:
        """The second teacher's weights and buffers, by name; none while there is one teacher."""
        return self.start if self._retired or self.previous is not None else {}

    def retire_second(self) -> None:
        """Keep of the second teacher, which nobody will ask again in this task, the weights alone, in host memory."""
        if self.previous is not None:
            self._retired = HostWeights(self.second, self.previous.device)
            self.previous = None
            give_up_module()

    def before_task(self, index: int, backbone: Backbone) -> None:
        """Copy the ``backbone`` that task number ``index`` starts from; for the first one there is nothing to copy."""
        self.after_task()
        self.previous = backbone.frozen_copy() if index else None

    def after_task(self) -> None:
        """Drop the second teacher and what it has encoded."""
        self.previous, self._retired = None, {}
        self._caches["previous"].clear()

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Normalised features (K, B, d) of ``images`` (B, 3, R, R), computed now."""
        return torch.stack([teacher.encode_images(images) for teacher in self.models])

    def cached_images(self, images: Tensor, indices: Tensor | None) -> Tensor:
        """The same for evaluation images whose positions in one fixed source are ``indices`` (B,), each computed once."""
        names = ("pretrained", "previous")[: len(self.models)]
        return torch.stack([self._caches[name].get(images, indices) for name in names])

    def encode_texts(self, tokens: Tensor) -> Tensor:
        """Normalised features (K, C, d) of texts (C, L) from ``trim_texts``."""
        with torch.no_grad():
            return torch.stack([teacher.encode_texts(tokens, trimmed=True) for teacher in self.models])

    def state_dict(self) -> dict[str, Tensor]:
        """What has been encoded: a row depends in its last bits on the batch in which an image was first met."""
        return {
            f"{name}.{key}": value for name, cache in self._caches.items() for key, value in cache.state_dict().items()
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore :meth:`state_dict`."""
        for name, cache in self._caches.items():
            own = {key[len(name) + 1 :]: value for key, value in state.items() if key.startswith(name + ".")}
            cache.load_state_dict(own)

    @torch.no_grad()
    def _encode_with_pretrained(self, images: Tensor) -> Tensor:
        return self.pretrained.encode_images(images)

    @torch.no_grad()
    def _encode_with_previous(self, images: Tensor) -> Tensor:
        assert self.previous is not None
        return self.previous.encode_images(images)


def feature_distances(student: Tensor, teachers: Tensor, distance: Distance) -> Tensor:
    """``||f − f_k||²`` or ``||f − f_k||`` of every sample to every teacher.

    Args:
        student: features (N, d).
        teachers: features (K, N, d), constant.
        distance: ``squared``, or ``norm``, whose gradient has length one however close the two are (and is 0 where they are equal).

    Returns:
        (K, N), differentiable in ``student``.
    """
    apart = student - teachers
    return apart.square().sum(dim=-1) if distance == "squared" else torch.linalg.vector_norm(apart, dim=-1)


def discrepancy_gate(pretrained: Tensor, previous: Tensor, threshold: float, sharpness: float) -> Tensor:
    """``σ(sharpness (||f_0 − f_{t−1}|| − threshold))``: near 1 where learning has moved a sample's feature.

    Args:
        pretrained, previous: features (N, d) of the two teachers.
        threshold: distance at which the gate is one half.
        sharpness: its slope there, times four.

    Returns:
        (N,) in [0, 1], share of the previous model.

    Source: SnD (Yu et al., ECCV 2024).
    """
    return torch.sigmoid(sharpness * (torch.linalg.vector_norm(pretrained - previous, dim=-1) - threshold))
