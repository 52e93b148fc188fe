"""The offline world: published pixels, honest splits, a tokenizer that says no, and a model that behaves like CLIP."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import pytest
import torch

from cl_methods.scenarios import mini
from cl_methods.scenarios.mini import captions, concepts, data, generic, muon, pretrain
from cl_methods.scenarios.mini.model import CHECKPOINT, build_model
from cl_methods.scenarios.mini.stream import Stream
from cl_methods.scenarios.mini.tasks import ORDERS, TASKS
from cl_methods.scenarios.mini.tokenizer import END, WORDS, detokenize

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def rendered():
    """The world as this machine renders it, without any cache."""
    return data.render_all()


@pytest.fixture(scope="module")
def scenario(rendered, cache):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLK_CACHE", str(cache))
        data._write_cache(data.cache_file(), rendered)
        return mini.load_scenario("I")


@pytest.fixture(scope="module")
def model():
    return mini.load_model()


def test_this_machine_renders_the_published_pixels(rendered):
    assert data.fingerprints(rendered) == {
        name: value for name, value in mini.FINGERPRINT.items() if name != "checkpoint"
    }


def test_checkpoint_is_the_published_one_and_small():
    assert hashlib.sha256(CHECKPOINT.read_bytes()).hexdigest() == mini.FINGERPRINT["checkpoint"]
    assert CHECKPOINT.stat().st_size < 4 * 2**20


def test_orders_hold_the_same_seven_tasks(scenario, cache, monkeypatch):
    monkeypatch.setenv("CLK_CACHE", str(cache))
    other = mini.load_scenario("II")
    assert [task.name for task in scenario.tasks] == list(ORDERS["I"])
    assert [task.name for task in other.tasks] == list(ORDERS["II"])
    assert set(ORDERS["I"]) == set(ORDERS["II"]) == set(TASKS)
    assert len(TASKS) == 7
    assert scenario.fingerprint() != other.fingerprint()
    with pytest.raises(ValueError, match="order: expected one of I, II, got 'III'"):
        mini.load_scenario("III")


def test_splits_are_disjoint_and_hold_every_class(scenario):
    for task in scenario.tasks:
        seen: set[bytes] = set()
        total = 0
        for split in SPLITS:
            source = getattr(task, split)
            assert source.images.shape[1:] == (3, 32, 32)
            assert source.labels.unique().tolist() == list(range(len(task.class_names))), (task.name, split)
            seen |= {image.numpy().tobytes() for image in source.images}
            total += len(source)
        assert len(seen) == total, f"{task.name}: the same image twice"
    assert {len(task.validation) for task in scenario.tasks} == {100, 200}


def test_reference_shares_no_image_with_a_task(scenario):
    reference = {image.numpy().tobytes() for image in scenario.reference.images.images}
    assert len(reference) == len(scenario.reference.captions) == 2000
    for task, split in itertools.product(scenario.tasks, SPLITS):
        assert reference.isdisjoint(image.numpy().tobytes() for image in getattr(task, split).images)
    mini.tokenize(scenario.reference.captions)


def test_digits_are_those_of_scikit_learn(scenario):
    from sklearn.datasets import load_digits

    bundled = load_digits()
    task = next(task for task in scenario.tasks if task.name == "digits")
    order = Stream(data._DIGIT_SEED).permutation(1797)
    for split, start in (("train", 0), ("validation", 900), ("test", 1000)):
        source = getattr(task, split)
        chosen = order[start : start + len(source)]
        assert source.labels.tolist() == bundled.target[chosen].tolist()
        # In the middle of a block of four by four pixels, bilinear enlargement of 8 to 32 averages to the pixel it came from.
        centres = source.images[:, 0].float().unflatten(1, (8, 4)).unflatten(3, (8, 4))[:, :, 1:3, :, 1:3].mean((2, 4))
        original = torch.from_numpy(bundled.images[chosen] * 255 / 16).float()
        correlation = torch.corrcoef(torch.stack([centres.flatten(), original.flatten()]))[0, 1]
        assert correlation > 0.97


def _held_out_words() -> set[tuple[str, str]]:
    names = {(concepts.COLOURS[colour], concepts.SHAPES[shape]) for shape, colour in concepts.HELD_OUT}
    return names | {(colour, concepts.plural(shape)) for colour, shape in names}


def _says_held_out(text: str) -> bool:
    words = [word for word in text.split() if word not in concepts.PATTERNS]
    return any(pair in _held_out_words() for pair in itertools.pairwise(words))


def test_held_out_pairs_are_two_for_each_shape_and_colour():
    assert len(set(concepts.HELD_OUT)) == 24
    assert np.bincount([shape for shape, _ in concepts.HELD_OUT]).tolist() == [2] * 12
    assert np.bincount([colour for _, colour in concepts.HELD_OUT]).tolist() == [2] * 12
    assert _says_held_out(f"a photo of two {concepts.COLOURS[3]} striped circles")


def test_pre_training_never_shows_or_says_a_held_out_pair():
    shape_column, colour_column = generic.COLUMN["shape"], generic.COLUMN["colour"]
    config = pretrain.PretrainConfig(batch_size=128, captions=64)
    for step in range(6):
        pairs = pretrain.draw_pairs(config, step)
        shape, colour = pairs.facts[:, shape_column].numpy(), pairs.facts[:, colour_column].numpy()
        both = (shape >= 0) & (colour >= 0)
        assert both.sum() > 30
        assert concepts.ALLOWED[shape[both], colour[both]].all()
        assert not any(map(_says_held_out, detokenize(pairs.tokens)))


def test_reference_never_shows_or_says_a_held_out_pair(scenario):
    _, said, facts = data.render_reference()
    assert said == scenario.reference.captions
    shape, colour = facts[:, generic.COLUMN["shape"]].numpy(), facts[:, generic.COLUMN["colour"]].numpy()
    both = (shape >= 0) & (colour >= 0)
    assert concepts.ALLOWED[shape[both], colour[both]].all()
    assert not any(map(_says_held_out, said))


def test_companions_of_an_allowed_pair_are_allowed():
    stream = Stream(1)
    shape, colour = generic.allowed_pairs(stream, 4000)
    same_shape, same_colour = stream.chance(0.5, 4000), stream.chance(0.5, 4000)
    ground = generic.other_colour(colour, stream)
    new_shape, new_colour = generic.companions(stream, shape, colour, same_shape, same_colour, ground)
    assert concepts.ALLOWED[new_shape, new_colour].all()
    assert (new_colour != ground).all()
    assert (new_shape[same_shape] == shape[same_shape]).all()
    assert (new_colour[same_colour & same_shape] == colour[same_colour & same_shape]).all()


def test_captions_are_true_of_their_own_image_and_of_no_image_that_differs():
    stream = Stream(2)
    _, facts, _ = generic.render({"object": 40, "glyph": 30, "count": 30, "pattern": 20, "scene": 20}, stream)
    said = captions.mention(facts, stream)
    positives = captions.truth(facts, said)
    assert positives.diagonal().all()
    assert ((said >= 0).sum(1) >= 1).all()
    expected = np.array(
        [[all(c in (-1, f) for f, c in zip(fact, caption, strict=True)) for caption in said] for fact in facts]
    )
    np.testing.assert_array_equal(positives, expected)


def test_tokenizer_round_trip():
    text = "a photo of three red stars in front of a beach"
    tokens = mini.tokenize([text, "A Star.", ""])
    assert detokenize(tokens) == [text, "a star", ""]
    assert (tokens.max(1).values == END).all()
    assert tokens.argmax(1).tolist() == [12, 3, 1]
    assert len(set(WORDS)) == len(WORDS)


def test_tokenizer_names_the_unknown_word():
    with pytest.raises(ValueError, match="does not know the word 'zebra' of 'a striped zebra'"):
        mini.tokenize(["a star", "a striped zebra"])
    with pytest.raises(ValueError, match="at most 14 words, got 15"):
        mini.tokenize("a " * 15)


def test_every_prompt_is_in_the_vocabulary(scenario):
    for task in scenario.tasks:
        prompts = [template.format(name) for template in task.templates for name in task.class_names]
        assert len({tuple(row) for row in mini.tokenize(prompts).tolist()}) == len(prompts)


def test_state_dict_names_are_those_of_open_clip(model):
    import open_clip

    plain = open_clip.model.CLIP(
        96,
        open_clip.CLIPVisionCfg(layers=3, width=96, head_width=32, patch_size=8, image_size=32),
        open_clip.CLIPTextCfg(context_length=16, vocab_size=END + 1, width=64, heads=2, layers=2),
    )
    ours, theirs = model.state_dict(), plain.state_dict()
    stem = {name for name in ours if name.startswith("visual.conv1.")}
    assert set(ours) - stem == set(theirs) - {"visual.conv1.weight"}
    assert all(ours[name].shape == theirs[name].shape for name in set(ours) - stem)
    assert isinstance(model, open_clip.CLIP)
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert sum(parameter.numel() for parameter in model.parameters()) < 2_000_000


def test_loading_a_model_leaves_the_random_numbers_alone():
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    mini.load_model()
    assert torch.equal(torch.rand(3), expected)


@torch.no_grad()
def _zero_shot(model, task, limit: int) -> float:
    tokens = mini.tokenize([template.format(name) for name in task.class_names for template in task.templates])
    texts = model.encode_text(tokens, normalize=True).view(len(task.class_names), len(task.templates), -1).mean(1)
    images = model.encode_image(mini.eval_transform(task.test.images[:limit]), normalize=True)
    return 100.0 * ((images @ texts.T).argmax(1) == task.test.labels[:limit]).float().mean().item()


@pytest.mark.parametrize("name", list(TASKS))
def test_zero_shot_is_far_above_chance(scenario, model, name):
    task = next(task for task in scenario.tasks if task.name == name)
    assert _zero_shot(model, task, 200) > 2 * task.chance


def test_transforms():
    image = torch.arange(3 * 32 * 32).remainder(256).to(torch.uint8).view(3, 32, 32)
    expected = (image.float() / 255 - 0.5) / 0.28
    torch.testing.assert_close(mini.eval_transform(image), expected)
    shifted = set()
    for seed in range(40):
        torch.manual_seed(seed)
        moved = mini.train_transform(image)
        assert moved.shape == (3, 32, 32)
        matches = [
            (dy, dx)
            for dy in range(-2, 3)
            for dx in range(-2, 3)
            if torch.equal(moved[:, 2:-2, 2:-2], expected[:, 2 + dy : 30 + dy, 2 + dx : 30 + dx])
        ]
        shifted.update(matches)
    assert len(shifted) > 10
    with pytest.raises(ValueError, match=r"image: expected a PIL image or uint8 .* got torch.float32 \(3, 32, 32\)"):
        mini.eval_transform(expected)


def test_a_damaged_cache_is_rendered_again_with_a_warning(rendered, tmp_path, monkeypatch):
    monkeypatch.setenv("CLK_CACHE", str(tmp_path))
    path = data.cache_file()
    monkeypatch.setattr(data, "render_all", lambda: rendered)
    path.write_bytes(b"not a safetensors file")
    with pytest.warns(UserWarning, match="rendering it again"):
        mini.load_scenario("I")
    damaged = dict(rendered, **{"scene/test/labels": rendered["scene/test/labels"].flip(0)})
    data._write_cache(path, damaged)
    with pytest.warns(UserWarning, match="scene/test"):
        mini.load_scenario("I")
    assert data._read_cache(path) is not None


def test_other_pixels_are_refused(rendered, tmp_path, monkeypatch):
    changed = dict(rendered, **{"count/train/images": rendered["count/train/images"] ^ 1})
    monkeypatch.setenv("CLK_CACHE", str(tmp_path))
    monkeypatch.setattr(data, "render_all", lambda: changed)
    with pytest.raises(data.FingerprintError, match="count/train"):
        mini.load_scenario("I")
    assert not list(tmp_path.iterdir())


def test_a_read_only_cache_folder_is_said(rendered, tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("CLK_CACHE", str(blocked / "below"))
    monkeypatch.setattr(data, "render_all", lambda: rendered)
    with pytest.warns(UserWarning, match="cannot keep the mini world"):
        assert mini.load_scenario("II").order == "II"


def test_stream_is_the_published_one():
    stream = Stream(1, 2)
    assert stream.integers(1000, 5).tolist() == [448, 430, 419, 277, 821]
    assert [float(value).hex() for value in stream.uniform(0, 1, 2)] == ["0x1.978d000000000p-5", "0x1.7cd2300000000p-4"]
    noise = stream.noise((20000,))
    assert abs(noise.mean()) < 0.03
    assert abs(noise.std() - 1) < 0.03
    assert sorted(stream.permutation(50).tolist()) == list(range(50))


def test_orthogonalise_gives_singular_values_near_one():
    torch.manual_seed(0)
    for shape in ((3, 16, 48), (2, 48, 16)):
        values = torch.linalg.svdvals(muon.orthogonalise(torch.randn(shape)))
        assert ((values > 0.5) & (values < 1.4)).all()


def test_contrastive_loss_with_one_positive_is_the_usual_one():
    torch.manual_seed(0)
    logits = torch.randn(5, 5)
    labels = torch.arange(5)
    cross_entropy = torch.nn.functional.cross_entropy
    usual = (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2
    torch.testing.assert_close(pretrain.contrastive_loss(logits, torch.eye(5, dtype=torch.bool)), usual)


def test_pre_training_takes_steps_and_writes_a_loadable_checkpoint(tmp_path, capsys):
    config = pretrain.PretrainConfig(steps=3, batch_size=32, captions=16, warmup=1, log_every=1)
    trained = pretrain.pretrain(config)
    torch.manual_seed(0)
    start = build_model().state_dict()
    unmoved = [name for name, tensor in trained.state_dict().items() if torch.equal(tensor, start[name])]
    assert unmoved == []
    assert "phrases" in capsys.readouterr().out
    pretrain.save_checkpoint(trained, tmp_path / "model.safetensors")
    loaded = mini.load_model(tmp_path / "model.safetensors")
    tokens = mini.tokenize(["a red star", "three objects in a meadow"])
    torch.testing.assert_close(loaded.encode_text(tokens), trained.encode_text(tokens), atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(
        pretrain.encode_trimmed(trained, tokens), trained.encode_text(tokens, normalize=True), atol=1e-5, rtol=1e-5
    )


def test_a_missing_checkpoint_names_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"python -m cl_methods\.scenarios\.mini\.pretrain"):
        mini.load_model(tmp_path / "absent.safetensors")
