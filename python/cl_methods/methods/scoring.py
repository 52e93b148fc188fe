"""How a method scores images: each image encoded once for all label spaces, class texts of all of them in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from cl_methods.backbone import Backbone
from cl_methods.components.image_batch import PLAIN, ImageBatch
from cl_methods.datasets.task import Task


class Scoring:
    """The part of a method that evaluation asks: image features, class embeddings, and scores from both.

    Most methods override nothing, or :meth:`classifier`. Scores that are no product with class embeddings: override
    :meth:`feature_scores`, and :meth:`image_features` if they read more than one feature of an image.

    Attributes:
        frozen_images: evaluation images have the features of the untouched image encoder from the first row to the last, so a
            run encodes every one of them once. A method that trains the image tower must leave it False.
        draws_scores: the method is probabilistic: :meth:`feature_draws` gives draws of the scores among learnt classes.
        backbone: the model.
    """

    frozen_images: ClassVar[bool] = False
    draws_scores: ClassVar[bool] = False

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self._classifiers: dict[tuple[str, ...], Tensor] = {}
        self._expected: tuple[Task, ...] = ()

    @torch.no_grad()
    def logits(self, images: Tensor, task: Task) -> Tensor:
        """(B, C) scores of evaluation ``images`` (B, 3, R, R) among the classes of ``task``: :meth:`scores` of one label space.

        ``task`` gives the label space only; its identity must not reach a router.
        """
        return self.feature_scores(self.image_features(ImageBatch(images)), [task])[0]

    @torch.no_grad()
    def scores(self, images: Tensor | ImageBatch, tasks: Sequence[Task]) -> list[Tensor]:
        """(B, C_t) scores of evaluation images among the classes of each of ``tasks``; the images are encoded once for all.

        A method that overrides :meth:`logits` is asked for one label space after the other.

        Args:
            images: (B, 3, R, R), or a batch whose pixels and features may wait until they are needed.
            tasks: label spaces; as for :meth:`logits` nothing else of them is used.
        """
        batch = images if isinstance(images, ImageBatch) else ImageBatch(images)
        if type(self).logits is not Scoring.logits:
            return [self.logits(batch.pixels(), task) for task in tasks]
        return self.feature_scores(self.image_features(batch), tasks)

    @torch.no_grad()
    def draws(self, images: Tensor | ImageBatch, tasks: Sequence[Task]) -> list[Tensor]:
        """(F, B, C_t) draws of :meth:`scores` among the classes of each of the learnt ``tasks``, of a method that has them.

        Raises:
            NotImplementedError: the method has one score for each image and class.
        """
        batch = images if isinstance(images, ImageBatch) else ImageBatch(images)
        return self.feature_draws(self.image_features(batch), tasks)

    def image_features(self, images: ImageBatch) -> Any:
        """All that scores read of a batch of images, whatever the label space: by default normalised features (B, d).

        What an encoder that never changes makes of them is asked for by ``images.frozen``, and outlives the row.
        """
        if self.frozen_images:
            return images.frozen(PLAIN, self.backbone.encode_images)
        return self.backbone.encode_images(images.pixels())

    def later_encodings(self) -> tuple[int, int]:
        """How often an evaluation image is encoded in each row after the first: fewest and most."""
        return (0, 0) if self.frozen_images else (1, 1)

    def feature_scores(self, features: Any, tasks: Sequence[Task]) -> list[Tensor]:
        """(B, C_t) scores for each of ``tasks`` from ``features``, what :meth:`image_features` gave: here ``s f Wᵀ``."""
        return [self.backbone.logit_scale * features @ self.classifier(task).T for task in tasks]

    def feature_draws(self, features: Any, tasks: Sequence[Task]) -> list[Tensor]:
        """(F, B, C_t) draws of the scores for each of the learnt ``tasks``, where :attr:`draws_scores` says so.

        Raises:
            NotImplementedError: the method has one score for each image and class.
        """
        raise NotImplementedError(f"{type(self).__name__} does not draw its scores; draws_scores is False")

    def expect(self, tasks: Sequence[Task]) -> None:
        """Label spaces that will be asked for: when one of their classifiers is needed, all are encoded together."""
        self._expected = tuple(tasks)

    def classifier(self, task: Task) -> Tensor:
        """Class embeddings (C, d) of ``task`` from all its templates, computed once for the present weights.

        Those of all expected tasks come from one batch of texts, whichever of them is asked for first, so that the last bits
        do not depend on that.
        """
        space = _label_space(task)
        if space not in self._classifiers:
            expected = {_label_space(other): other for other in self._expected}
            together = [other for key, other in expected.items() if key == space or self.reads_texts(other)]
            self._encode_classifiers(together if space in expected else [task])
        return self._classifiers[space]

    def reads_texts(self, task: Task) -> bool:
        """Whether scores among the classes of ``task`` need the class embeddings of their texts."""
        return True

    def _encode_classifiers(self, tasks: Sequence[Task]) -> None:
        missing = [task for task in tasks if _label_space(task) not in self._classifiers]
        self._classifiers |= zip(map(_label_space, missing), self.embed_classes(missing), strict=True)

    def embed_classes(self, tasks: Sequence[Task]) -> list[Tensor]:
        """Class embeddings (C_t, d) of each of ``tasks`` under the present weights, all prompts in one batch."""
        if len(tasks) == 1:
            return [self.backbone.class_embeddings(tasks[0].class_names, tasks[0].templates)]
        return self.backbone.class_embeddings_of([(task.class_names, task.templates) for task in tasks])

    def forget_classifiers(self) -> None:
        """The weights change: class embeddings have to be computed again."""
        self._classifiers.clear()


def _label_space(task: Task) -> tuple[str, ...]:
    """What class embeddings depend on besides the weights."""
    return (*task.class_names, "", *task.templates)
