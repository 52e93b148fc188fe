"""One task of a sequence, and the reference data that distillation may look at."""

from __future__ import annotations

from dataclasses import dataclass

from cl_methods.datasets.images import ImageSource


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


@dataclass(frozen=True)
class Reference:
    """Unlabelled images and captions that distillation may look at; never from a task's own data."""

    images: ImageSource
    captions: tuple[str, ...]
