"""Reference images and texts in every form, each chosen for itself; what is wrong with them is said before any work."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest
import torch
from miniatures import ORIGINALS, paint, spelt, write
from tiny_clip import build_backbone, noise_images

from cl_methods.components.reference_features import random_texts
from cl_methods.datasets.captions import random_texts_of, read_captions
from cl_methods.datasets.images import DataError
from cl_methods.datasets.reference import drawn, read_reference
from cl_methods.datasets.task import RandomTexts, Reference
from cl_methods.methods.zscl import ZSCL
from cl_methods.methods.zscl_config import ZSCLConfig
from cl_methods.scenarios import ScenarioOptions, load, mini


def image_bytes(label: int) -> bytes:
    buffer = io.BytesIO()
    paint(label, 0).save(buffer, "PNG")
    return buffer.getvalue()


def write_shard(path: Path, files: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def sample(number: int, caption: str | None = None, kind: str = "txt") -> dict[str, bytes]:
    files = {f"{number:05d}.png": image_bytes(number)}
    if caption is not None:
        text = caption if kind == "txt" else json.dumps({"caption": caption, "url": "http://somewhere"})
        files[f"{number:05d}.{kind}"] = text.encode()
    return files


@pytest.fixture
def shards(tmp_path) -> Path:
    """Two shards as img2dataset writes them: image, caption, and a JSON file that repeats it."""
    folder = tmp_path / "cc3m"
    for shard in range(2):
        files: dict[str, bytes] = {}
        for number in range(3 * shard, 3 * shard + 3):
            files |= sample(number, f"caption {number}\n") | sample(number, f"caption {number}", "json")
        write_shard(folder / f"{shard:05d}.tar", files)
        (folder / f"{shard:05d}_stats.json").write_text("{}")
        (folder / f"{shard:05d}.parquet").write_bytes(b"PAR1")
    return folder


def test_shards_give_images_and_captions_each_for_itself(shards, tmp_path):
    expected = tuple(f"caption {number}" for number in range(6))
    both = read_reference(shards, shards)
    assert (len(both.images), both.captions) == (6, expected)
    assert [spelt(both.images.image(index)) for index in range(6)] == list(range(6))
    assert both.images.labels.tolist() == [-1] * 6
    alone = read_reference(shards / "00001.tar", None)
    assert (len(alone.images), alone.captions) == (3, ())
    assert alone.images.fingerprint() != both.images.fingerprint()
    texts = read_reference(None, shards / "00000.tar")
    assert (len(texts.images), texts.captions) == (0, expected[:3])
    write(tmp_path / "folder" / "1.png", 1, 1)
    mixed = read_reference(tmp_path / "folder", shards)
    assert (mixed.images.paths, mixed.captions) == (("1.png",), expected)


def test_captions_of_json_files_alone_and_empty_ones(tmp_path):
    shard = write_shard(tmp_path / "0.tar", sample(0, "a  dog\n", "json") | sample(1, " ") | sample(2, "a cat"))
    assert read_reference(None, shard).captions == ("a dog", "a cat")
    assert len(read_reference(shard, None).images) == 3


def test_a_table_of_downloaded_files_gives_images_and_captions(tmp_path):
    """The table that ZSCL's code reads: a column `title` and a column `filepath`."""
    for number in range(3):
        write(tmp_path / "images" / f"{number}.jpg", number, 0)
    table = tmp_path / "Validation_output.csv"
    table.write_text("title\tfilepath\na dog\timages/1.jpg\n\na cat\timages/0.jpg\n")
    found = read_reference(table, table)
    assert (found.images.paths, found.captions) == (("images/1.jpg", "images/0.jpg"), ("a dog", "a cat"))
    assert [spelt(found.images.image(index)) for index in range(2)] == [1, 0]
    absolute = tmp_path / "elsewhere" / "table.tsv"
    absolute.parent.mkdir()
    absolute.write_text(f"filepath\n{tmp_path / 'images' / '2.jpg'}\n")
    images = read_reference(absolute, None).images
    assert spelt(images.image(0)) == 2
    assert images.stamp(0) != 0


def test_random_texts_are_asked_for_by_number_length_and_seed():
    assert random_texts_of("random") == RandomTexts(1000, 10, 0)
    assert random_texts_of("random:20x7") == RandomTexts(20, 7, 0)
    assert random_texts_of("random:20x7:3") == RandomTexts(20, 7, 3)
    assert random_texts_of("captions.txt") is None
    for wrong in ("random:", "random:20", "random:0x7", "random:20x0", "random:20x7:x"):
        with pytest.raises(DataError, match=f"expected random, random:TEXTSxTOKENS or .*, got '{wrong}'"):
            random_texts_of(wrong)


def test_what_is_given_replaces_that_part_of_the_scenarios_own(tmp_path):
    root = tmp_path / "tasks"
    for label, name in enumerate(("ant", "bee")):
        for number in range(4):
            write(root / "task" / name / f"{number}.png", label, number)
    write(root / "_reference" / "0.png", 0, 0)
    (root / "_reference" / "captions.txt").write_text("a thing\n")
    write(tmp_path / "images" / "1.png", 1, 1)

    def reference(**given):
        scenario = load("folders", ScenarioOptions(root=root, **given))
        prints.add(scenario.fingerprint())
        return scenario.reference

    prints: set[str] = set()
    own = reference()
    images = reference(reference_images=tmp_path / "images")
    assert (len(images.images), images.captions) == (1, ("a thing",))
    texts = reference(reference_captions=Path("random:5x3"))
    assert (texts.images.fingerprint(), texts.captions) == (own.images.fingerprint(), ())
    for given in ("random:5x4", "random:5x3:1"):
        reference(reference_captions=Path(given))
    assert len(prints) == 5


def test_every_form_has_a_fingerprint_of_its_own(shards, tmp_path):
    ORIGINALS["MNIST"](tmp_path / "data")
    (tmp_path / "captions.txt").write_text("a dog\n")
    write(tmp_path / "images" / "0.png", 0, 0)
    forms = [
        {},
        {"reference_images": shards},
        {"reference_captions": shards},
        {"reference_images": tmp_path / "images"},
    ]
    forms += [{"reference_captions": tmp_path / "captions.txt"}, {"reference_captions": Path("random")}]
    options = {"root": tmp_path / "data", "sizes": "any"}
    prints = [load("mtil", ScenarioOptions(**options, **form), order="MNIST").fingerprint() for form in forms]
    assert len(set(prints)) == len(forms)
    (tmp_path / "captions.txt").write_text("a cat\n")
    assert load("mtil", ScenarioOptions(**options, **forms[4]), order="MNIST").fingerprint() != prints[4]


def test_random_texts_stand_in_for_captions():
    backbone, images = build_backbone(), noise_images(4, 0, 1)
    method = ZSCL(backbone, ZSCLConfig(), Reference(images, (), RandomTexts(7, 4, 2)))
    assert torch.equal(method.reference_tokens(None), random_texts(backbone, 7, 4, 2))
    with pytest.raises(ValueError, match="length: expected at most 10 tokens for a context of 12, got 11"):
        ZSCL(backbone, ZSCLConfig(), Reference(images, (), RandomTexts(7, 11)))


def test_a_caption_that_the_model_cannot_read_shows_before_anything_is_trained():
    backbone = build_backbone()
    backbone.tokenize = mini.tokenize
    with pytest.raises(ValueError, match="does not know the word 'zeppelin'"):
        ZSCL(backbone, ZSCLConfig(), Reference(noise_images(4, 0, 1), ("a red circle", "a zeppelin")))


def test_captions_without_images_are_refused_by_who_needs_images():
    empty = read_reference(None, Path("random"))
    with pytest.raises(ValueError, match="reference_images: this scenario has no reference set"):
        ZSCL(build_backbone(), ZSCLConfig(), empty)
    assert ZSCL(build_backbone(), ZSCLConfig(reference_images="task"), empty).uses_reference


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:900])


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


IMAGES = {
    "nothing there": (lambda at: at / "nowhere", r"nowhere is not a directory, a tar archive or a table"),
    "an archive that is not there": (lambda at: at / "0.tar", r"0\.tar is not there"),
    "an empty folder": (lambda at: at, r"holds no image and no tar archive"),
    "an archive cut off": (
        lambda at: [write_shard(at / "0.tar", sample(0) | sample(1)), cut(at / "0.tar"), at][-1],
        r"0\.tar is cut off",
    ),
    "an archive without images": (lambda at: write_shard(at / "0.tar", {"a.txt": b"a"}), r"0\.tar holds no image"),
    "a compressed archive": (lambda at: put(at / "0.tar.gz", b"\x1f\x8b"), r"0\.tar\.gz is cut off, compressed or not"),
    "images and archives": (
        lambda at: [write_shard(at / "0.tar", sample(0)), write(at / "1.png", 1, 1), at][-1],
        r"holds both images and tar archives",
    ),
    "a table without paths": (lambda at: put(at / "t.tsv", b"a dog\thttp://x\n"), r"t\.tsv has no column filepath or"),
    "an empty table": (lambda at: put(at / "t.tsv", b""), r"t\.tsv has no column filepath"),
    "a table of nothing": (lambda at: put(at / "t.tsv", b"filepath\n"), r"t\.tsv lists no image"),
    "a table with a short row": (
        lambda at: put(at / "t.tsv", b"title\tfilepath\na dog\n"),
        r"t\.tsv line 2 ends before the column filepath",
    ),
    "a table of files that are gone": (
        lambda at: put(at / "t.tsv", b"filepath\n1.jpg\n"),
        r"t\.tsv lists .*1\.jpg, which is not there",
    ),
    "a table that is no text": (lambda at: put(at / "t.tsv", b"\xff\xfe\x00"), r"t\.tsv cannot be read as UTF-8"),
}


@pytest.mark.parametrize("case", IMAGES)
def test_images_that_cannot_be_used(case, tmp_path):
    make, message = IMAGES[case]
    with pytest.raises(DataError, match=rf"data\.reference_images: .*{message}|{message}"):
        read_reference(make(tmp_path), None)


TEXTS = {
    "nothing there": (lambda at: at / "nowhere.txt", r"nowhere\.txt cannot be read as UTF-8 text"),
    "a folder": (lambda at: at, r"cannot be read as UTF-8 text .*Is a directory"),
    "no text": (lambda at: put(at / "c.txt", b"\xff\xfe\x00"), r"c\.txt cannot be read as UTF-8"),
    "no caption": (lambda at: put(at / "c.txt", b"\n \n"), r"c\.txt holds no caption"),
    "a table with nothing in it": (lambda at: put(at / "c.tsv", b"title\tfilepath\n"), r"c\.tsv holds no caption"),
    "a row that is cut off": (
        lambda at: put(at / "c.tsv", b"filepath\ttitle\n1.jpg\ta dog\n2.jpg\n"),
        r"c\.tsv line 3 has 1 columns, and the captions are column 2",
    ),
    "an image without a caption": (
        lambda at: write_shard(at / "0.tar", sample(0, "a dog") | sample(1)),
        r"0\.tar: 00001\.png lacks its caption",
    ),
    "a JSON file without a caption": (
        lambda at: write_shard(at / "0.tar", {**sample(0), "00000.json": b'{"url": "x"}'}),
        r"0\.tar: 00000\.png lacks its caption",
    ),
    "a JSON file cut off": (
        lambda at: write_shard(at / "0.tar", {**sample(0), "00000.json": b'{"caption": "a'}),
        r"0\.tar: 00000\.json cannot be read",
    ),
    "a caption that is no text": (
        lambda at: write_shard(at / "0.tar", {**sample(0), "00000.txt": b"\xff\xfe\xfa"}),
        r"0\.tar: 00000\.txt cannot be read",
    ),
    "only empty captions": (lambda at: write_shard(at / "0.tar", sample(0, " ")), r"0\.tar .* holds no caption"),
    "an archive cut off": (
        lambda at: [write_shard(at / "0.tar", sample(0, "a") | sample(1, "b")), cut(at / "0.tar"), at][-1],
        r"0\.tar is cut off",
    ),
}


@pytest.mark.parametrize("case", TEXTS)
def test_captions_that_cannot_be_used(case, tmp_path):
    make, message = TEXTS[case]
    with pytest.raises(DataError, match=message):
        read_reference(None, make(tmp_path))


@pytest.mark.parametrize(
    ("text", "captions"),
    [
        ("a dog\n\n a cat \n", ("a dog", "a cat")),
        ("a dog\thttp://somewhere/1\na cat\thttp://somewhere/2\n", ("a dog", "a cat")),
        ("title\tfilepath\na dog\t1.jpg\n", ("a dog",)),
        ("filepath\ttitle\n1.jpg\ta dog\n2.jpg\t\n", ("a dog",)),
        ('"quoted\tx\n', ('"quoted',)),
        ("\ufeffa dog\r\na cat, sitting\r\n", ("a dog", "a cat, sitting")),
        ("a dog\na\ttab inside\n", ("a dog", "a\ttab inside")),
    ],
)
def test_captions(text, captions, tmp_path):
    (tmp_path / "captions.tsv").write_text(text)
    assert read_captions(tmp_path / "captions.tsv") == captions


def test_a_folder_of_images_at_any_depth(tmp_path):
    assert read_reference(None, None) is None
    write(tmp_path / "deep" / "er" / "1.png", 1, 1)
    write(tmp_path / "0.jpg", 0, 0)
    found = read_reference(tmp_path, None)
    assert (found.images.paths, found.captions) == (("0.jpg", "deep/er/1.png"), ())
    assert found.images.labels.tolist() == [-1, -1]


def test_a_limit_draws_the_same_images_everywhere(shards, tmp_path):
    for number in range(9):
        write(tmp_path / "images" / f"{number % 3}" / f"{number}.png", number, 0)

    whole = read_reference(tmp_path / "images", None)
    some = drawn(whole, 4, 0)
    assert some.images.paths == drawn(whole, 4, 0).images.paths
    assert (len(some.images), sorted(some.images.paths)) == (4, list(some.images.paths))
    assert set(some.images.paths) < set(whole.images.paths)
    assert len({drawn(whole, 4, seed).images.paths for seed in range(6)}) > 1
    assert drawn(whole, 9, 0) is whole
    assert len(drawn(read_reference(shards, None), 2, 0).images) == 2
    ORIGINALS["EuroSAT"](tmp_path)
    options = {"root": tmp_path, "sizes": "any", "cache": "none"}
    run = load(
        "mtil", ScenarioOptions(**options, reference_images=shards, reference_limit=4, split_seed=3), order="EuroSAT"
    )
    assert run.reference.images.fingerprint() == drawn(read_reference(shards, None), 4, 3).images.fingerprint()
    with pytest.raises(DataError, match=r"data\.reference_limit: expected a number of images >= 1, got 0"):
        drawn(whole, 0, 0)
    with pytest.raises(DataError, match=r"there are no reference images to draw 3 from; give --data\.reference-images"):
        load("mtil", ScenarioOptions(**options, reference_limit=3), order="EuroSAT")
