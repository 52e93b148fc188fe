"""One task of a sequence, and the reference data that distillation may look at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from cl_methods.datasets.cache_folder import CacheFolder
from cl_methods.datasets.images import ImageSource, TensorImages


@dataclass(frozen=True)
class Task:
    """One classification task of a sequence.

    Attributes:
        name: unique in its scenario.
        class_names: as they enter the prompt, by label.
        templates: prompts with one ``{}``; the first is used for training, all of them for evaluation.
        train, validation, test: disjoint images of the same classes.
    """

    name: str
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    train: ImageSource
    validation: ImageSource
    test: ImageSource

    @property
    def chance(self) -> float:
        """Accuracy of guessing, in percent."""
        return 100.0 / len(self.class_names)


NO_IMAGES = TensorImages(torch.zeros(0, 3, 1, 1, dtype=torch.uint8))
"""In place of reference images that nobody gave."""


@dataclass(frozen=True)
class RandomTexts:
    """Texts of random vocabulary entries in place of captions.

    Attributes:
        count: number of texts.
        length: random tokens in each.
        seed: of the draw; with the tokenizer, all that it depends on.

    Source: the option ``random`` of ZSCL (Zheng et al., ICCV 2023), 1,000 texts of 10 tokens.
    """

    count: int = 1000
    length: int = 10
    seed: int = 0


@dataclass(frozen=True)
class Reference:
    """Unlabelled images and texts that distillation may look at; never from a task's own data. They need not match.

    Attributes:
        images: :data:`NO_IMAGES` where there are none.
        captions: may be none.
        random_texts: to be drawn where there are no captions.
        features: where features of frozen models on these images and texts are kept between runs; None for nowhere.
    """

    images: ImageSource
    captions: tuple[str, ...]
    random_texts: RandomTexts | None = None
    features: CacheFolder | None = field(default=None, compare=False)

    @property
    def has_images(self) -> bool:
        """Whether reference images were given."""
        return self.images is not NO_IMAGES

    def identity(self) -> Iterator[bytes]:
        """What a fingerprint is taken over."""
        yield self.images.fingerprint().encode()
        yield "\n".join(self.captions).encode()
        if self.random_texts is not None:
            yield repr(self.random_texts).encode()
