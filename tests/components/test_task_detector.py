"""The task detector: scopes, thresholds, training, states."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_clip import noise_images, transform
from trained import DETECTOR

from cl_methods.backbone import Backbone
from cl_methods.components import autoencoders, ddas
from cl_methods.components.autoencoders import AutoEncoder, reconstruction_errors
from cl_methods.components.ddas import DDAS, decide
from cl_methods.components.image_batch import ImageBatch
from cl_methods.datasets.images import TensorImages


def stack(source: TensorImages) -> torch.Tensor:
    return torch.stack([transform(source.image(index)) for index in range(len(source))])


@pytest.fixture
def detector(backbone: Backbone) -> DDAS:
    """Knows generic data of medium brightness, a dark task and a bright one."""
    torch.manual_seed(0)
    found = DDAS(backbone, DETECTOR)
    found.learn_generic(noise_images(40, 1, 1, 128))
    found.learn_task(0, noise_images(40, 2, 1, 60), noise_images(20, 3, 1, 60))
    found.learn_task(1, noise_images(40, 4, 1, 200), TensorImages(torch.zeros(0, 3, 16, 16, dtype=torch.uint8)))
    return found


def test_scopes() -> None:
    errors = torch.tensor([[3.0, 1.0, 2.0], [3.0, 4.0, 1.0], [1.0, 2.0, 2.0], [9.0, 9.0, 8.0]])
    assert decide(errors, 5.0, "sample").tolist() == [0, 1, -1, -1]
    assert decide(errors, 5.0, "batch").tolist() == [1, 1, 1, 1]
    assert decide(errors, 3.0, "batch").tolist() == [-1, -1, -1, -1]
    assert decide(errors, torch.tensor([9.0, 0.5, 5.0]), "sample").tolist() == [-1, 1, -1, -1]


def test_images_are_told_apart(detector: DDAS) -> None:
    for brightness, task in ((60, 0), (200, 1), (128, -1)):
        assert (detector.decide(stack(noise_images(20, 50 + task, 1, brightness))) == task).float().mean() > 0.9


def test_sample_scope_ignores_the_rest_of_the_batch(detector: DDAS) -> None:
    mixed = stack(noise_images(12, 8, 1, 60))
    mixed[:2] = stack(noise_images(2, 9, 1, 200))
    apart = torch.cat([detector.decide(image[None]) for image in mixed])
    assert torch.equal(detector.decide(mixed), apart)
    assert len(apart.unique()) == 2
    detector.config = replace(DETECTOR, scope="batch", relative=False, threshold=1.0)
    assert detector.decide(mixed).unique().tolist() == [0]


def test_only_learnt_tasks_compete(backbone: Backbone) -> None:
    found = DDAS(backbone, DETECTOR)
    images = stack(noise_images(4, 1, 1))
    assert found.decide(images).tolist() == [-1] * 4
    found.learn_generic(noise_images(20, 1, 1, 128))
    assert found.decide(images).tolist() == [-1] * 4
    with pytest.raises(ValueError, match="index: expected the next task, 0, got 2"):
        found.learn_task(2, noise_images(20, 1, 1), noise_images(20, 2, 1))


@pytest.mark.parametrize("settings", [{}, {"augment": True}])
def test_training_follows_the_global_generator(backbone: Backbone, settings: dict[str, Any]) -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(4)
        found = DDAS(backbone, replace(DETECTOR, iterations=5, **settings))
        found.learn_task(0, noise_images(20, 1, 1), noise_images(20, 2, 1))
        states.append(found.state_dict())
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_state_round_trip(detector: DDAS, backbone: Backbone) -> None:
    images = stack(noise_images(6, 3, 1, 90))
    copy = DDAS(backbone, DETECTOR)
    copy.load_state({name: value.clone() for name, value in detector.state_dict().items()})
    assert torch.equal(copy.errors(images), detector.errors(images))
    copy.load_state(DDAS(backbone, DETECTOR).state_dict())
    assert copy.generic is None
    assert len(copy.tasks) == 0


@pytest.mark.parametrize("depth", [0, 2])
def test_backbone_features(backbone: Backbone, depth: int) -> None:
    found = DDAS(backbone, replace(DETECTOR, depth=depth))
    assert found.extractor.features(stack(noise_images(3, 1, 1))).shape == (3, 64)


@pytest.mark.parametrize("cached", [1, 100, 1 << 20])
def test_errors_of_several_autoencoders_together(cached: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks of columns as in one piece, to float32; each one's to the bit, whoever else is asked."""
    monkeypatch.setattr(autoencoders, "_CACHED", cached)
    torch.manual_seed(0)
    coders = [AutoEncoder(67, 5) for _ in range(4)]
    z = torch.rand(9, 67)
    found = reconstruction_errors(coders, z)
    assert not found.requires_grad
    with torch.no_grad():
        exact = torch.stack([coder.double().errors(z.double()) for coder in coders], dim=1)
    torch.testing.assert_close(found.double(), exact, rtol=2e-6, atol=0)
    assert torch.equal(reconstruction_errors([coders[2].float()], z)[:, 0], found[:, 2])


def test_an_autoencoder_looks_at_an_image_once(detector: DDAS, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later tasks add a look by the new autoencoder alone; one with other weights looks for itself."""
    looks: list[int] = []

    def counted(coders: list[AutoEncoder], z: torch.Tensor) -> torch.Tensor:
        looks.append(len(coders))
        return reconstruction_errors(coders, z)

    monkeypatch.setattr(ddas, "reconstruction_errors", counted)
    pixels = stack(noise_images(7, 8, 1, 60))
    batch = ImageBatch(pixels)
    first = detector.decide_batch(batch)
    assert torch.equal(detector.decide_batch(batch), first)
    assert looks == [3]
    detector.learn_task(2, noise_images(40, 6, 1, 20), noise_images(20, 7, 1, 20))
    again = detector.decide_batch(batch)
    assert looks == [3, 1]
    assert torch.equal(again, detector.decide(pixels))
    state = {name: value.clone() for name, value in detector.state_dict().items()}
    detector.load_state(state)
    detector.decide_batch(batch)
    assert looks == [3, 1, 4]  # the last is that of decide; what was loaded is known by its weights
    state["tasks.0.decoder.bias"] += 0.1
    detector.load_state(state)
    detector.decide_batch(batch)
    assert looks == [3, 1, 4, 1]


def test_settings_are_checked(backbone: Backbone) -> None:
    with pytest.raises(ValueError, match="depth: expected 0 to 2, got 3"):
        DDAS(backbone, replace(DETECTOR, depth=3))
    with pytest.raises(ValueError, match="scope: expected one of sample, batch, got 'all'"):
        replace(DETECTOR, scope="all")
    with pytest.raises(ValueError, match="code: expected a number > 0, got 0"):
        replace(DETECTOR, code=0)
