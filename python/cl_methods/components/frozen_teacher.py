"""A frozen model whose features a student follows: of texts encoded once, and of every image encoded once."""

from __future__ import annotations

import torch
from torch import Tensor

from cl_methods.backbone import Backbone
from cl_methods.components.reference_features import FrozenFeatures
from cl_methods.components.teacher_features import KeptBatches, TeacherFeatures
from cl_methods.datasets.task import Reference


class FrozenTeacher:
    """What a student is compared with: a frozen model, its features of the texts in use, and those of images met so far.

    Attributes:
        model: None while there is nobody to follow.
        texts: its features (M, d) of the texts that the student is compared on; None before there are any.

    Args:
        device: where features are kept.
        model: a teacher for the whole run; None for one that :meth:`becomes` another with every task.
        reference: data on whose features a ``model`` for the whole run may be asked in other runs too, so that they are
            kept on disk where ``reference.features`` names a folder; None to keep none.
    """

    def __init__(self, device: torch.device, model: Backbone | None = None, reference: Reference | None = None) -> None:
        self.model = model
        self.texts: Tensor | None = None
        self._kept: TeacherFeatures | None = None
        images: KeptBatches | None = None
        if model is not None and reference is not None and reference.features is not None:
            self._kept = TeacherFeatures(reference.features, model)
            images = self._kept.images(reference.images)
        self._images = FrozenFeatures(self.encode_images, device, images)

    def becomes(self, student: Backbone) -> None:
        """Follow a copy of what the ``student`` is now; features of the model before are forgotten."""
        self.model = None  # two teachers at a time would need twice the memory
        self.model = student.frozen_copy()
        self.forget_images()

    def retires(self) -> None:
        """Drop the model and everything that it said."""
        self.model, self.texts = None, None
        self.forget_images()

    def forget_images(self) -> None:
        """Encode images anew: they, or the model, are others."""
        self._images.clear()

    @property
    def weights(self) -> dict[str, Tensor]:
        """The model's own, by name; not copies."""
        return dict(self._present().model.named_parameters())

    def encode_texts(self, tokens: Tensor, *, lasting: bool = False) -> None:
        """Set :attr:`texts` to the features of ``tokens`` (M, L), from disk where they are ``lasting`` and some run had them."""
        if lasting and self._kept is not None:
            self.texts = self._kept.texts(tokens)
        else:
            self.texts = self._present().frozen_text_features(tokens)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Features (B, d) of images (B, 3, R, R), computed now."""
        return self._present().encode_images(images)

    def image_features(self, images: Tensor, indices: Tensor | None) -> Tensor:
        """The same for images with positions ``indices`` (B,) in their source, each computed when it is first met."""
        return self._images.get(images, indices)

    def _present(self) -> Backbone:
        if self.model is None:
            raise RuntimeError("teacher: there is none before a task; call before_task first")
        return self.model

    def state_dict(self) -> dict[str, Tensor]:
        """Features of images met so far: rows depend on the batch in which they were computed, so nobody may do it again."""
        return self._images.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore :meth:`state_dict`; model and texts are the method's to restore."""
        self._images.load_state_dict(state)
