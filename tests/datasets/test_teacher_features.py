"""Features of the frozen teacher on disk: the same bits with and without, and never those of other weights, texts or images."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from miniatures import ORIGINALS, write
from PIL import Image
from steps import encoded_by_frozen
from tiny_clip import build_backbone, transform

from cl_methods.backbone import Backbone
from cl_methods.commands.configuration import parse
from cl_methods.components.reference_features import FrozenFeatures
from cl_methods.components.teacher_features import TeacherFeatures, weights_fingerprint
from cl_methods.datasets.cache_folder import CacheFolder, CacheWarning
from cl_methods.datasets.images import FileImages
from cl_methods.datasets.two_stage import TwoStage
from cl_methods.methods import METHODS
from cl_methods.training import run as run_module


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image.resize((16, 16)))).permute(2, 0, 1)


FROM_FILE = TwoStage(pixels, transform, "16 x 16", "p / 127.5 - 1")


def backbone_of_files() -> Backbone:
    made = build_backbone()
    made.train_transform = made.eval_transform = FROM_FILE
    return made


@pytest.fixture
def folder(tmp_path) -> CacheFolder:
    return CacheFolder(tmp_path / "cache", 2**30)


@pytest.fixture
def images(tmp_path) -> FileImages:
    for number in range(8):
        write(tmp_path / "reference" / f"{number}.png", number, number)
    return FileImages(tmp_path / "reference", [f"{number}.png" for number in range(8)], torch.full((8,), -1))


@pytest.fixture
def data(tmp_path, images) -> Path:
    ORIGINALS["MNIST"](tmp_path / "data")
    ORIGINALS["EuroSAT"](tmp_path / "data")
    (tmp_path / "captions.txt").write_text("a fish\na bird\na tree\n")
    return tmp_path


@pytest.mark.parametrize("method", ["zscl", "snd"])
def test_runs_with_and_without_give_the_same_weights_and_ask_the_teacher_once(method, data, monkeypatch):
    def build(config, scenario, device):
        return METHODS[config.method](backbone_of_files(), config.effective_settings(), scenario.reference)

    monkeypatch.setattr(run_module, "build_method", build)
    asked = encoded_by_frozen(monkeypatch)

    def start(name: str, *extra: str):
        asked.update(images=0, texts=0)
        arguments = ["--scenario", "mtil", "--device", "cpu", "--order", "EuroSAT,MNIST", "--method", method]
        arguments += ["--data.root", str(data / "data"), "--data.sizes", "any", "--limit-iterations", "3"]
        arguments += ["--data.reference-images", str(data / "reference"), "--method.reference-batch-size", "3"]
        arguments += ["--data.reference-captions", str(data / "captions.txt"), *extra]
        result = run_module.run(parse(arguments, "")[0], data / name)
        states = [np.fromfile(path, np.uint8) for path in sorted((data / name).glob("checkpoints/*/model.safetensors"))]
        return result["accuracy"], states, dict(asked)

    plain, states, computed = start("plain", "--data.cache", "none")
    assert len(states) == 2
    assert computed["images"] > 0
    for name, expected in (("first", computed), ("second", None)):
        accuracy, again, needed = start(name, "--data.cache", str(data / "kept"))
        assert accuracy == plain
        assert all(np.array_equal(one, other) for one, other in zip(states, again, strict=True))
        if expected is not None:
            assert needed == expected
    if method == "zscl":
        assert needed == {"images": 0, "texts": 0}
    else:  # the teacher from before the task is another one in every run
        assert needed["images"] < computed["images"]


def test_texts_are_encoded_once_for_the_same_weights_and_tokens(folder, monkeypatch):
    asked = encoded_by_frozen(monkeypatch)
    teacher = build_backbone().frozen_copy()
    tokens = teacher.tokenize(["a fish", "a bird", "a tree"])
    plain = teacher.frozen_text_features(tokens)
    for _ in range(3):
        assert torch.equal(TeacherFeatures(folder, build_backbone().frozen_copy()).texts(tokens), plain)
    assert asked["texts"] == 6
    other = build_backbone()
    with torch.no_grad():
        other.model.ln_final.bias[0] += 1e-3
    for changed, given in ((other.frozen_copy(), tokens), (teacher, tokens[:2]), (teacher, tokens.flip(0))):
        before = asked["texts"]
        assert torch.equal(TeacherFeatures(folder, changed).texts(given), changed.frozen_text_features(given))
        assert asked["texts"] == before + 2 * len(given)


def test_weights_alone_do_not_tell_a_model(folder):
    """QuickGELU has no weights, and changes every feature."""
    one, other = build_backbone().frozen_copy(), build_backbone().frozen_copy()
    for block in other.model.transformer.resblocks:
        block.mlp.gelu = torch.nn.ReLU()
    assert weights_fingerprint(one.model) == weights_fingerprint(other.model)
    tokens = one.tokenize(["a fish", "a bird"])
    first, second = TeacherFeatures(folder, one).texts(tokens), TeacherFeatures(folder, other).texts(tokens)
    assert not torch.equal(first, second)
    assert torch.equal(second, other.frozen_text_features(tokens))


def kept(folder: CacheFolder, images: FileImages) -> FrozenFeatures:
    teacher = backbone_of_files().frozen_copy()

    @torch.no_grad()
    def encode(batch: torch.Tensor) -> torch.Tensor:
        return teacher.encode_images(batch)

    return FrozenFeatures(encode, torch.device("cpu"), TeacherFeatures(folder, teacher).images(images))


def ask(cache: FrozenFeatures, images: FileImages, rows: list[int]) -> torch.Tensor:
    return cache.get(torch.stack([FROM_FILE(images.image(row)) for row in rows]), torch.tensor(rows))


BATCHES = ([0, 1, 2], [3, 1, 4], [5, 6, 7])


def test_images_are_encoded_once_for_the_same_batches_and_files(folder, images, monkeypatch):
    asked = encoded_by_frozen(monkeypatch)
    plain = [ask(FrozenFeatures(kept(folder, images)._encode, torch.device("cpu")), images, rows) for rows in BATCHES]
    asked["images"] = 0
    first, second = kept(folder, images), kept(folder, images)
    for rows in BATCHES:
        ask(first, images, rows)
    assert asked["images"] == 8
    third = kept(folder, images)
    for rows, expected in zip(BATCHES, plain, strict=True):
        torch.testing.assert_close(ask(third, images, rows), expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(ask(third, images, rows), ask(first, images, rows))
    assert asked["images"] == 8
    ask(second, images, BATCHES[0])
    assert asked["images"] == 11, "it was opened before the others had written, and then computed for itself"
    ask(kept(folder, images), images, [2, 1, 0])
    assert asked["images"] == 14, "another order is another batch"
    write(images.root / "1.png", 7, 7)
    changed = ask(kept(folder, images), images, BATCHES[0])
    assert asked["images"] == 17, "a file has changed"
    assert not torch.equal(changed, plain[0])


def parts(folder: CacheFolder) -> list[Path]:
    return sorted((folder.path / "features").glob("*/*.b*"))


FEATURE_DAMAGE = {
    "cut off": (lambda path: os.truncate(path, path.stat().st_size - 5), None),
    "cut off in a header": (lambda path: os.truncate(path, 20), None),
    "empty": (lambda path: os.truncate(path, 0), None),
    "overwritten": (lambda path: flip(path, 70), "is damaged; features in it are computed again"),
    "a header overwritten": (lambda path: flip(path, 32 + 8), None),
    "gone": (lambda path: path.unlink(), None),
}


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize("case", FEATURE_DAMAGE)
def test_damaged_image_features_are_computed_again(case, folder, images):
    damage, message = FEATURE_DAMAGE[case]
    first = kept(folder, images)
    whole = [ask(first, images, rows) for rows in BATCHES]
    (path,) = parts(folder)
    damage(path)
    for expected in (message, None):
        again = kept(folder, images)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for rows, features in zip(BATCHES, whole, strict=True):
                assert torch.equal(ask(again, images, rows), features)
        assert bool(said) == (expected is not None)
        assert expected is None or expected in str(said[0].message)


@pytest.mark.parametrize("case", FEATURE_DAMAGE)
def test_damaged_text_features_are_computed_again(case, folder):
    teacher = build_backbone().frozen_copy()
    tokens = teacher.tokenize(["a fish", "a bird"])
    whole = TeacherFeatures(folder, teacher).texts(tokens)
    (path,) = parts(folder)
    FEATURE_DAMAGE[case][0](path)
    with pytest.warns(CacheWarning, match=r"features\.bin (has [\d,]+ bytes where|is missing where|is damaged)"):
        assert torch.equal(TeacherFeatures(folder, teacher).texts(tokens), whole)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CacheWarning)
        assert torch.equal(TeacherFeatures(folder, teacher).texts(tokens), whole)


def test_no_room_costs_the_cache_and_nothing_else(tmp_path, images):
    small = CacheFolder(tmp_path / "small", 1)
    cache = kept(small, images)
    tokens = build_backbone().tokenize(["a fish"])
    teacher = build_backbone().frozen_copy()
    with pytest.warns(CacheWarning, match="not kept any further"):
        features = ask(cache, images, BATCHES[0])
    assert torch.equal(ask(kept(CacheFolder(tmp_path / "large", 2**30), images), images, BATCHES[0]), features)
    with pytest.warns(CacheWarning, match="cannot be used"):
        assert torch.equal(TeacherFeatures(small, teacher).texts(tokens), teacher.frozen_text_features(tokens))


def test_a_transform_that_draws_is_not_kept(folder, images):
    teacher = build_backbone().frozen_copy()
    assert TeacherFeatures(folder, teacher).images(images) is None
