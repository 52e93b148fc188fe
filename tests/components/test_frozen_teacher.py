"""A frozen teacher: follows one model or one per task, encodes an image once, and says when there is nobody to ask."""

from __future__ import annotations

import pytest
import torch
from steps import encoded_by_frozen
from tiny_clip import build_backbone, noise_images, tokenize

from cl_methods.backbone import Backbone
from cl_methods.components.frozen_teacher import FrozenTeacher


def test_a_teacher_keeps_the_weights_it_was_copied_from_and_sees_an_image_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backbone, rows = build_backbone(), encoded_by_frozen(monkeypatch)
    images = noise_images(4, 0, 2).images.float() / 255
    teacher = FrozenTeacher(backbone.device)
    teacher.becomes(backbone)
    teacher.encode_texts(tokenize(["one", "two", "three"]))
    first = teacher.image_features(images, torch.arange(4))
    with torch.no_grad():
        for value in backbone.model.parameters():
            value.mul_(1.5)
    assert torch.equal(teacher.image_features(images, torch.arange(4)), first)
    assert teacher.texts is not None
    assert teacher.texts.shape == (3, first.shape[1])
    assert rows == {"images": 4, "texts": 3}
    teacher.becomes(backbone)  # of other weights: nothing that the first one said is left
    assert not torch.allclose(teacher.image_features(images, torch.arange(4)), first)


def test_nobody_to_ask_is_said_so() -> None:
    backbone: Backbone = build_backbone()
    teacher = FrozenTeacher(backbone.device)
    with pytest.raises(RuntimeError, match="call before_task first"):
        teacher.encode_texts(tokenize(["one"]))
    teacher.becomes(backbone)
    teacher.retires()
    assert teacher.texts is None
    with pytest.raises(RuntimeError, match="teacher: there is none"):
        teacher.encode_images(torch.zeros(1, 3, 16, 16))
