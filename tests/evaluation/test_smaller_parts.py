"""Memory that runs out during an evaluation: the batch is scored all the same, in parts, with a sentence each time they shrink."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_clip import build_backbone, noise_images

from cl_methods.backbone.micro_batches import MicroBatches
from cl_methods.backbone.smaller_parts import halved
from cl_methods.datasets.task import Task
from cl_methods.evaluation.accuracy import EvaluationOptions, feature_store, measure_spaces
from cl_methods.methods import METHODS, Method

OPTIONS = EvaluationOptions(label_space=("task", "all"), batch_size=16)
TASKS = tuple(
    Task(f"task{index}", names, ("a photo of {}", "{} again"), *[noise_images(25, 9 * index, len(names), 90)] * 3)
    for index, names in enumerate((("ant", "bee", "cat"), ("dog", "eel")))
)


def zero_shot() -> Method:
    return METHODS["zero_shot"](build_backbone(), METHODS["zero_shot"].default_config("mini"))


def limit(method: Method, monkeypatch: pytest.MonkeyPatch, most: int, error: Exception) -> list[int]:
    """The image tower takes at most so many images; the sizes of the batches that it was given."""
    encode, seen = method.backbone.model.encode_image, []

    def encode_image(images: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.append(len(images))
        if len(images) > most:
            raise error
        return encode(images, **options)

    monkeypatch.setattr(method.backbone.model, "encode_image", encode_image)
    return seen


def found(method: Method, store: Any) -> dict[str, list[tuple[float, float]]]:
    rows = measure_spaces(method, TASKS, 0, OPTIONS, store=store)
    return {space: [(one.accuracy, one.calibration_error) for one in row] for space, row in rows.items()}


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
    ids=["gpu", "cpu"],
)
def test_parts_are_halved_until_they_fit(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    method, notes = zero_shot(), list[str]()
    expected = found(method, feature_store(TASKS, OPTIONS))
    seen = limit(method, monkeypatch, 5, error)
    store = feature_store(TASKS, OPTIONS, notes.append)
    rows = found(method, store)
    assert [one[0] for row in rows.values() for one in row] == [one[0] for row in expected.values() for one in row]
    for space, row in rows.items():
        assert [one[1] for one in row] == pytest.approx([one[1] for one in expected[space]], abs=1e-4)
    assert seen[:6] == [16, 8, 4, 4, 4, 4]
    assert max(seen[2:]) == 4
    assert len(notes) == 2
    assert "no memory for 16 images at once; they go on through the model 8 at a time (texts 512)" in notes[0]
    assert method.backbone.micro_batches is None
    seen.clear()
    method.frozen_images = False  # type: ignore[misc]  # so that the next row encodes again
    found(method, store)
    assert max(seen) == 4
    assert len(notes) == 2


def test_single_images_that_do_not_fit_end_the_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    method = zero_shot()
    limit(method, monkeypatch, 0, torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        found(method, feature_store(TASKS, OPTIONS))
    assert method.backbone.micro_batches is None


def test_another_error_is_none_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    method, notes = zero_shot(), list[str]()
    seen = limit(method, monkeypatch, 5, RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        found(method, feature_store(TASKS, OPTIONS, notes.append))
    assert (seen, notes) == ([16], [])


def test_halving_starts_from_what_a_plan_cuts() -> None:
    plan = MicroBatches(images=2, texts=8, frozen_images=8, frozen_texts=32, keep_last=True)
    assert halved(plan, 100) == MicroBatches(images=2, texts=8, frozen_images=4, frozen_texts=16, keep_last=True)
    assert halved(plan, 5) == MicroBatches(images=2, texts=8, frozen_images=2, frozen_texts=16, keep_last=True)
    parts, steps = halved(None, 3), 0
    while parts is not None:
        parts, steps = halved(parts, 3), steps + 1
    assert steps == 10
