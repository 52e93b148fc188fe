"""The suites that a test cannot run whole: what they reduce, restate and add up."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from cl_methods.backbone.transforms import image_transforms
from cl_methods.bench import decoding, evaluation, kernels
from cl_methods.bench.agreement import CheckError
from cl_methods.bench.world import open_clip_world
from cl_methods.datasets.specification import DATASETS
from cl_methods.datasets.texts import classes


def test_published_sizes_of_an_evaluation() -> None:
    tables = [classes(name, "zscl") for name in evaluation.EVALUATED]
    assert sum(map(len, tables)) == 1201
    assert sum(len(table) * len(table.templates) for table in tables) == 8648
    assert sum(DATASETS[name].sizes["zscl"][2] for name in evaluation.EVALUATED) == 97_209


def test_flops_of_the_shapes_of_vit_b_16() -> None:
    """Published arithmetic: 5.96 GFLOP per prompt at full length, 35.1 per image, 51.5 TFLOP for all prompts, no weights."""
    world = open_clip_world("ViT-B-16", 0)
    backbone = world.backbone()
    prompt = evaluation._full_length(backbone)
    assert prompt == pytest.approx(5.96e9, rel=1e-3)
    assert 8648 * prompt == pytest.approx(51.5e12, rel=1e-3)
    assert evaluation._image_flops(backbone, world) == pytest.approx(35.1e9, rel=2e-3)
    tokens = backbone.tokenize(["a photo of a dog."] * 7)
    assert evaluation._flops(lambda: backbone.model.encode_text(tokens)) == 7 * prompt
    short = evaluation._embed(backbone, [{"MNIST": classes("MNIST", "zscl")}])
    assert short.calls == 1
    assert short.flops < 10 * prompt / 10
    tables = {name: classes(name, "zscl") for name in evaluation.EVALUATED}
    assert 8648 * prompt > 13.5 * evaluation._embed(backbone, [tables]).flops


def benchmark(name: str, implementation: str, seconds: float, operations: int) -> dict:
    info = {"compared": "small", "implementation": implementation, "extra_bytes": 64, "dispatched": operations}
    info |= {"device": "cpu", "floor_seconds": 0.5}
    return {"name": name, "extra_info": info, "stats": {"min": seconds, "median": 2 * seconds, "rounds": 5}}


def test_benchmarks_become_rows() -> None:
    entries = [
        benchmark("bench_distill_kl[eager-small]", "eager", 2.0, 39),
        benchmark("bench_distill_kl[x]", "ours", 1.0, 10),
    ]
    ours, eager = kernels.reduced({"benchmarks": entries})
    assert (ours.case, ours.implementation, eager.implementation) == ("distill_kl small", "ours", "eager")
    assert ours.exact == {"operations": 10}
    assert ours.measured["seconds"].spread == 1.0
    assert ours.note == "cpu, 50% of the floor"


def test_without_a_checkout_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kernels, "CHECKOUT", tmp_path)
    with pytest.raises(ValueError, match="kernels are measured by the benchmarks of a checkout"):
        kernels.kernels_suite("", 5, print)


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [
        (1, RuntimeError, "a check failed, no speed is reported: FAILED bench_x"),
        (5, ValueError, "no benchmark matches 'y'"),
    ],
)
def test_failing_benchmarks_report_no_speed(status: int, error: type, message: str, monkeypatch) -> None:
    done = subprocess.CompletedProcess([], status, "FAILED bench_x - assert 1e-3 <= 1e-5\n", "")
    monkeypatch.setattr(kernels.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(error, match=message):
        kernels.kernels_suite("y", 5, lambda _: None)


def test_benchmarks_run_with_as_many_threads_as_the_record_says(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {}

    def run(*_, **options) -> subprocess.CompletedProcess:
        given.update(options)
        return subprocess.CompletedProcess([], 5, "", "")

    monkeypatch.setattr(kernels.subprocess, "run", run)
    monkeypatch.setattr(kernels.torch, "get_num_threads", lambda: 3)
    with pytest.raises(ValueError, match="no benchmark matches"):
        kernels.kernels_suite("z", 1, lambda _: None)
    assert given["env"]["OMP_NUM_THREADS"] == "3"


def test_reading_images_beside_the_transform(monkeypatch: pytest.MonkeyPatch) -> None:
    transform = image_transforms({"size": 32, "mean": (0.5,) * 3, "std": (0.2,) * 3, "interpolation": "bicubic"})[1]
    ours, plain, empty = decoding.decoding_rows(transform, images=6, size=(48, 36), batch_size=4, rounds=3)
    assert ours.case == "reading 6 JPEG files of 48 x 36 pixels, 4 at once"
    assert ours.checked == {"pixels": 0.0}
    assert (plain.implementation, empty.implementation) == (decoding.PLAIN, decoding.EMPTY)
    assert all(row.measured["seconds"].best > 0 and row.note.endswith("images/s") for row in (ours, plain, empty))
    seconds = [row.measured["seconds"] for row in (ours, plain, empty)]
    assert all(samples.count == 3 for samples in seconds)
    assert any(samples.best < samples.median for samples in seconds)  # the spread that a comparison calls noise
    measured = dict.fromkeys(("plain", "first", "second"), 1.0)
    monkeypatch.setattr(decoding, "measure_decoding", lambda *_, **__: {"identical": False, **measured})
    with pytest.raises(CheckError, match="the cache gives other tensors than the transform"):
        decoding.decoding_rows(transform)
