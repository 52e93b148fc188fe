"""Images decoded and resized once: the same tensors to the bit, and nothing stale, damaged or half written is ever used."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from miniatures import ORIGINALS, write_shards
from PIL import Image

from cl_methods.backbone.transforms import image_transforms
from cl_methods.datasets.cache_benchmark import measure_decoding
from cl_methods.datasets.cache_folder import CacheFolder, CacheWarning
from cl_methods.datasets.find import SplitOptions, find_dataset
from cl_methods.datasets.image_cache import CachedImages, cached
from cl_methods.datasets.images import DataError, FileImages, Subset, TensorImages
from cl_methods.datasets.loading import evaluation_batches, read_images
from cl_methods.datasets.sources import ArrayImages
from cl_methods.datasets.specification import DATASETS
from cl_methods.datasets.two_stage import two_stage
from cl_methods.scenarios.mini.transforms import eval_transform as mini_transform

import open_clip  # isort: skip  # after what prepares torchvision

CPU = torch.device("cpu")
SIZE = 24
TRANSFORMS = {
    "mini": mini_transform,
    "ours for open_clip": image_transforms(
        {"size": SIZE, "mean": (0.48, 0.46, 0.41), "std": (0.27, 0.26, 0.28), "interpolation": "bicubic"}
    )[1],
    "open_clip's own": open_clip.image_transform(SIZE, is_train=False),
}


def draw(path: Path, number: int, size: tuple[int, int] = (50, 38)) -> None:
    """A textured photograph-like image, of which no two are alike."""
    generator = np.random.default_rng(number)
    coarse = Image.fromarray(generator.integers(0, 255, (5, 7, 3), dtype=np.uint8)).resize(
        size, Image.Resampling.BICUBIC
    )
    noise = generator.integers(-9, 9, (size[1], size[0], 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((np.array(coarse) + noise).clip(0, 255).astype(np.uint8)).save(path)


@pytest.fixture
def files(tmp_path) -> FileImages:
    names = [f"{number:02d}.{('jpg', 'png')[number % 2]}" for number in range(21)]
    for number, name in enumerate(names):
        draw(tmp_path / "images" / name, number, (50 + number, 38))
    return FileImages(tmp_path / "images", names, torch.arange(21) % 3)


@pytest.fixture
def folder(tmp_path) -> CacheFolder:
    return CacheFolder(tmp_path / "cache", 2**30)


def read(source, transform=mini_transform, workers: int = 0) -> torch.Tensor:
    batches = evaluation_batches(source, transform, batch_size=9, device=CPU, workers=workers)
    return torch.cat([images for images, _ in batches])


def stored(folder: CacheFolder) -> Path:
    (place,) = (folder.path / "images").iterdir()
    return place


class Counting(FileImages):
    """Counts what is decoded."""

    decoded = 0

    def image(self, index: int) -> Image.Image:
        self.decoded += 1
        return super().image(index)


def counting(files: FileImages) -> Counting:
    return Counting(files.root, files.paths, files.labels)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_same_tensors_to_the_bit_with_every_transform(name, workers, files, folder):
    transform = TRANSFORMS[name]
    plain = torch.stack([transform(files.image(index)) for index in range(len(files))])
    with warnings.catch_warnings():
        warnings.simplefilter("error", CacheWarning)
        first = read(cached(files, folder), transform, workers)
        again = counting(files)
        second = read(cached(again, folder), transform, workers)
    assert torch.equal(first, plain)
    assert torch.equal(second, plain)
    assert second.is_contiguous()
    assert again.decoded == 0 or workers


def test_random_and_unknown_transforms_are_not_taken_apart(files, folder):
    train = image_transforms({"size": SIZE, "mean": (0.5,) * 3, "std": (0.2,) * 3, "interpolation": "bicubic"})[0]
    kinds = {
        type(step).__name__: type(step) for step in (*TRANSFORMS["ours for open_clip"].transforms, *train.transforms)
    }
    tail = [kinds["ToImage"](), kinds["ToDtype"](torch.float32, scale=True)]
    compose = type(train)
    for transform in (
        train,
        compose([lambda image: image, *tail]),
        compose([*tail, kinds["CenterCrop"](3)]),
        compose([kinds["CenterCrop"](3)]),
        lambda image: torch.zeros(3, 2, 2),
        open_clip.image_transform(SIZE, is_train=True),
        open_clip.image_transform(SIZE, is_train=False, resize_mode="longest"),
    ):
        assert two_stage(transform) is None
    torch.manual_seed(0)
    plain = torch.stack([train(files.image(index)) for index in range(4)])
    torch.manual_seed(0)
    assert torch.equal(read_images(cached(files, folder), range(4), train), plain)
    assert not folder.path.exists()


def test_equal_geometry_is_shared_and_another_is_not(files, folder):
    """Mean and standard deviation come after the pixels; size and interpolation before."""
    config = {"size": SIZE, "mean": (0.5,) * 3, "std": (0.2,) * 3, "interpolation": "bicubic"}
    read(cached(files, folder), image_transforms(config)[1])
    again = counting(files)
    read(cached(again, folder), image_transforms({**config, "mean": (0.1,) * 3})[1])
    assert again.decoded == 0
    for other in ({"size": SIZE - 1}, {"interpolation": "bilinear"}):
        again = counting(files)
        read(cached(again, folder), image_transforms({**config, **other})[1])
        assert again.decoded >= len(files)
    assert len(list((folder.path / "images").iterdir())) == 3


def test_subsets_share_what_their_source_keeps(files, folder):
    known: dict = {}
    source = counting(files)
    parts = [Subset(source, torch.tensor(rows)) for rows in ([3, 1, 20], [1, 3])]
    nested = Subset(Subset(source, torch.arange(20, 0, -1)), torch.tensor([17, 19]))
    for part in (*parts, nested):
        whole = torch.stack([mini_transform(part.image(index)) for index in range(len(part))])
        source.decoded = 0
        wrapped = cached(part, folder, known)
        assert torch.equal(read(wrapped), whole)
        assert torch.equal(wrapped.labels, part.labels)
        assert wrapped.fingerprint() == part.fingerprint()
    assert source.decoded == 0, "all three images were known when the last subset came"
    assert cached(parts[0], folder, known) is cached(parts[0], folder, known)


def test_the_same_files_in_another_order_or_place_are_another_source(files, folder, tmp_path):
    """The fingerprint of a result looks at the set of files; a cache must look at their places."""
    backwards = FileImages(files.root, files.paths[::-1], files.labels.flip(0))
    assert backwards.fingerprint() == files.fingerprint()
    first = read(cached(files, folder))
    assert torch.equal(read(cached(backwards, folder)), first.flip(0))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in files.paths:
        Image.new("RGB", (50, 38)).save(elsewhere / name)
    assert not torch.equal(read(cached(FileImages(elsewhere, files.paths, files.labels), folder)), first)


def test_what_lies_in_memory_is_left_there(folder):
    images = TensorImages(torch.zeros(3, 3, 32, 32, dtype=torch.uint8))
    assert cached(images, folder) is images


def test_archives_and_arrays_are_cached_too(folder, tmp_path):
    write_shards(tmp_path, "DTD")
    shards = find_dataset(DATASETS["DTD"], tmp_path, SplitOptions(sizes="any")).task.test
    array = ArrayImages(np.random.default_rng(0).integers(0, 255, (9, 28, 28), dtype=np.uint8), torch.arange(9))
    for source in (shards, array):
        plain = torch.stack([mini_transform(source.image(index)) for index in range(len(source))])
        for _ in range(2):
            assert torch.equal(read(cached(source, folder)), plain)
        source.image = None  # type: ignore[method-assign]
        assert torch.equal(read(cached(source, folder)), plain)


def test_a_source_goes_to_other_processes_without_its_files(files, folder):
    source = cached(files, folder)
    whole = read(source)
    copy = pickle.loads(pickle.dumps(source))
    assert copy.folder is not source.folder
    assert torch.equal(read(copy), whole)


DAMAGE = {
    "a truncated file of pixels": (
        lambda place: os.truncate(place / "pixels.u8", 5000),
        r"pixels\.u8 has 5,000 bytes where",
    ),
    "an empty file of pixels": (lambda place: os.truncate(place / "pixels.u8", 0), r"pixels\.u8 has 0 bytes where"),
    "no file of pixels": (lambda place: (place / "pixels.u8").unlink(), r"pixels\.u8 is missing where"),
    "a truncated file of rows": (lambda place: os.truncate(place / "rows.u64", 100), r"rows\.u64 has 100 bytes where"),
    "no file of rows": (lambda place: (place / "rows.u64").unlink(), r"rows\.u64 is missing where"),
    "a manifest that is cut off": (
        lambda place: os.truncate(place / "manifest.json", 40),
        r"manifest\.json is damaged",
    ),
    "an empty manifest": (lambda place: os.truncate(place / "manifest.json", 0), r"manifest\.json is damaged"),
    "no manifest": (lambda place: (place / "manifest.json").unlink(), r"manifest\.json is missing"),
    "the manifest of something else": (
        lambda place: (place / "manifest.json").write_text('{"description": {}}'),
        r"manifest\.json describes something else",
    ),
    "pixels overwritten": (
        lambda place: overwrite(place / "pixels.u8", 3072 * 4 + 17),
        r"pixels\.u8 is damaged; the images",
    ),
    "pixels lost with the power": (
        lambda place: overwrite(place / "pixels.u8", 3072 * 7, 3072),
        r"pixels\.u8 is damaged",
    ),
    "a checksum overwritten": (lambda place: overwrite(place / "rows.u64", 16 * 4 + 8), r"pixels\.u8 is damaged"),
    "a stamp overwritten": (
        lambda place: overwrite(place / "rows.u64", 16 * 4),
        r"images/04\.jpg has changed since",
    ),
}


def overwrite(path: Path, place: int, count: int = 1) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        content = file.read(count)
        file.seek(place)
        file.write(bytes(byte ^ 0x5A for byte in content))


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_cache_is_said_and_made_again(case, files, folder):
    damage, message = DAMAGE[case]
    whole = read(cached(files, folder))
    damage(stored(folder))
    with pytest.warns(CacheWarning, match=message):
        assert torch.equal(read(cached(files, folder)), whole)
    again = counting(files)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CacheWarning)
        assert torch.equal(read(cached(again, folder)), whole)
    assert again.decoded == 0


def test_what_was_half_written_does_not_count(files, folder):
    """Killed between the pixels and the row that vouches for them, or before either."""
    whole = read(cached(files, folder))
    overwrite(stored(folder) / "pixels.u8", 3072 * 5, 3072)
    with (stored(folder) / "rows.u64").open("r+b") as rows:
        rows.seek(16 * 5)
        rows.write(b"\0" * 32)
    again = counting(files)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CacheWarning)
        assert torch.equal(read(cached(again, folder)), whole)
    assert again.decoded == 2


def test_changed_files_are_noticed(files, folder):
    whole = read(cached(files, folder))
    changed = files.root / files.paths[3]
    before = changed.stat()
    draw(changed, 99)
    os.utime(changed, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a copy that preserves times
    expected = whole.clone()
    expected[3] = mini_transform(files.image(3))
    assert not torch.equal(expected, whole)
    with pytest.warns(CacheWarning, match=f"{changed} has changed since it was decoded; it is decoded again"):
        assert torch.equal(read(cached(files, folder)), expected)
    again = counting(files)
    assert torch.equal(read(cached(again, folder)), expected)
    assert again.decoded == 0


def test_a_file_that_is_gone_is_an_error_as_without_a_cache(files, folder):
    read(cached(files, folder))
    gone = files.root / files.paths[11]
    gone.unlink()
    with pytest.raises(DataError, match=f"{gone} is gone; restore it"), pytest.warns(CacheWarning, match=str(gone)):
        read(cached(files, folder))


def test_an_unreadable_image_is_an_error_at_every_pass(files, folder):
    broken = files.root / files.paths[11]
    broken.write_bytes(broken.read_bytes()[:90])
    source = cached(files, folder)
    for _ in range(2):
        with pytest.raises(DataError, match=f"{broken} is not a readable image"):
            read(source)
    draw(broken, 11)
    plain = torch.stack([mini_transform(files.image(index)) for index in range(len(files))])
    assert torch.equal(read(source), plain)


def test_an_image_of_another_shape_is_not_kept(files, folder):
    """Without a crop in the middle, shapes follow the image."""
    whole = TRANSFORMS["ours for open_clip"]
    loose = type(whole)([step for step in whole.transforms if type(step).__name__ != "CenterCrop"])
    source = cached(files, folder)
    for _ in range(2):
        for index in (0, 5):
            assert torch.equal(read_images(source, [index], loose)[0], loose(files.image(index)))


def test_a_full_cache_stops_growing_and_says_so(files, tmp_path):
    plain = read(files)
    folder = CacheFolder(tmp_path / "small", 4096)
    with pytest.warns(CacheWarning, match=r"small holds the 3\.8147e-06 GiB it may, .* images are decoded each time"):
        assert torch.equal(read(cached(files, folder)), plain)
    with pytest.warns(CacheWarning, match="small holds"):
        assert torch.equal(read(cached(files, CacheFolder(folder.path, 4096))), plain)


def test_the_oldest_entry_goes_and_none_that_is_open(files, folder, tmp_path):
    others = []
    for number in range(3):
        root = tmp_path / f"set{number}"
        for name in files.paths:
            draw(root / name, number)
        others.append(FileImages(root, files.paths, files.labels))
    places = []
    for age, source in enumerate(others):
        before = set((folder.path / "images").iterdir()) if places else set()
        wrapped = cached(source, folder)
        read(wrapped)
        (place,) = set((folder.path / "images").iterdir()) - before
        os.utime(place / "manifest.json", (10**9 + age, 10**9 + age))
        places.append(place)
        if age == 0:
            held = wrapped  # the oldest stays open
        del wrapped
    small = CacheFolder(folder.path, folder.used())
    read(cached(files, small))
    assert [place.exists() for place in places] == [True, False, True]
    assert small.used() <= small.limit
    assert torch.equal(read(held), read(others[0]))


def test_what_killed_processes_left_is_cleared_away(files, folder):
    read(cached(files, folder))
    old, new = (folder.path / "images" / f".incomplete-{age}" for age in ("old", "new"))
    for place in (old, new):
        place.mkdir()
        (place / "pixels.u8").write_bytes(b"half")
    os.utime(old, (1, 1))
    folder.used()
    assert not old.exists()
    assert new.exists(), "somebody may be at work there"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_folder_that_cannot_be_used_is_said_and_done_without(workers, files, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(CacheWarning, match=r"file/cache cannot be used .* nothing is cached there"):
        assert torch.equal(
            read(cached(files, CacheFolder(tmp_path / "file" / "cache", 2**30)), workers=workers), read(files)
        )


def test_a_full_disk_costs_the_cache_and_nothing_else(files, folder, monkeypatch):
    def refuse(*_: object) -> int:
        raise OSError(28, "No space left on device")

    source = cached(files, folder)
    read_images(source, [0, 1, 2], mini_transform)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", refuse)
        with pytest.warns(CacheWarning, match=r"cannot be written .*No space left on device.* decoded each time"):
            assert torch.equal(read(source), read(files))
    again = counting(files)
    assert torch.equal(read(cached(again, folder)), read(files))
    assert again.decoded == len(files) - 3


def test_another_users_cache_is_read_and_not_written(files, folder, monkeypatch):
    source = cached(files, folder)
    read_images(source, [0, 1, 2], mini_transform)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    for _ in range(2):
        again = counting(files)
        assert torch.equal(read(cached(again, folder)), read(files))
        assert again.decoded == len(files) - 3


def write_forever(source, started, turns) -> None:
    for _ in range(turns):
        for index in range(len(source)):
            read_images(source, [index], mini_transform)
            started.set()


def test_writers_at_the_same_time_and_one_killed_at_work(files, folder):
    """Processes meet an empty cache; one is killed among its writes. Nobody reads anything wrong."""
    plain, processes = read(files), multiprocessing.get_context("fork")
    writers = []
    for turns in (2, 2, 10**6):
        started = processes.Event()
        writers.append((started, processes.Process(target=write_forever, args=(cached(files, folder), started, turns))))
        writers[-1][1].start()
    mine = read(cached(files, folder))
    for started, writer in writers:
        assert started.wait(60)
        if writer is writers[-1][1]:
            writer.kill()
        writer.join(60)
    assert [writer.exitcode for _, writer in writers] == [0, 0, -signal.SIGKILL]
    assert torch.equal(mine, plain)
    again = counting(files)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CacheWarning)
        assert torch.equal(read(cached(again, folder)), plain)
    assert again.decoded == 0
    assert isinstance(cached(again, folder), CachedImages)
    assert len(list((folder.path / "images").iterdir())) == 1


def test_a_writer_killed_at_any_moment_leaves_a_sound_cache(files, folder, monkeypatch):
    """Every prefix of what a writer does to the disk, as if it had been killed right after."""
    plain = read(files)
    real, calls = os.pwrite, 0
    for survived in (0, 1, 2, 3, 7):
        calls = 0

        def until_killed(file: int, content: bytes, place: int, survived: int = survived) -> int:
            nonlocal calls
            calls += 1
            if calls == survived + 1:
                real(file, content[: len(content) // 2], place)
            if calls > survived:
                raise KeyboardInterrupt
            return real(file, content, place)

        target = CacheFolder(folder.path / str(survived), 2**30)
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", until_killed)
            with pytest.raises(KeyboardInterrupt):
                read(cached(files, target))
        again = counting(files)
        assert torch.equal(read(cached(again, target)), plain)
        assert again.decoded >= len(files) - survived // 2


def test_the_second_pass_decodes_nothing_of_a_whole_dataset(folder, tmp_path):
    ORIGINALS["DTD"](tmp_path)
    task = find_dataset(DATASETS["DTD"], tmp_path, SplitOptions(sizes="any")).task
    read(cached(task.test, folder))
    again = counting(task.test)
    assert torch.equal(read(cached(again, folder)), read(task.test))
    assert again.decoded == 0


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_benchmark_compares_equal_tensors(name, tmp_path):
    measured = measure_decoding(tmp_path, TRANSFORMS[name], images=12, size=(64, 48), batch_size=5, rounds=1)
    assert measured["identical"]
    assert measured["images"] == 12
    assert measured["cache_bytes"] >= 12 * 3 * SIZE * SIZE
    assert min(measured[part] for part in ("plain", "first", "second", "second_over_first")) > 0
