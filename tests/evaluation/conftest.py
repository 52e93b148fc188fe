"""Result files as ``clk run`` writes them, with numbers that can be checked by hand."""

from __future__ import annotations

import json

import pytest

from cl_methods.evaluation import forgetting, mtil_metrics


@pytest.fixture
def write_result(tmp_path):
    """``write_result(name, method=…, seed=…, accuracy=…)`` makes a run directory below ``tmp_path``."""
    return result_writer(tmp_path)


@pytest.fixture(scope="module")
def write_module_result(tmp_path_factory):
    """The same below a folder that a module's tests share, for what they only read."""
    return result_writer(tmp_path_factory.mktemp("results"))


def result_writer(place):
    """``write`` for run directories below a folder, which is its ``folder``."""

    def write(name, *, method="finetune", seed=0, accuracy=None, scenario="mini", settings=None, **changes):
        accuracy = accuracy or [[90.0, 40.0], [80.0, 95.0]]
        metrics = mtil_metrics(accuracy)
        joint = method == "joint"
        result = {
            "method": method,
            "scenario": scenario,
            "order": "I",
            "seed": seed,
            "continual": not joint,
            "tasks": ["first", "second"],
            "chance": [10.0, 20.0],
            "zero_shot": [50.0, 60.0],
            "accuracy": accuracy,
            "transfer": None if joint else metrics["transfer"],
            "average": metrics["average"],
            "last": metrics["last"],
            "forgetting": None if joint else forgetting(accuracy),
            "train": {
                "seconds": 12.0,
                "samples_per_second": 1500.0,
                "peak_memory_bytes": 3 * 2**30,
                "trainable_parameters": 1_500_000,
            },
            "environment": {"torch": "2.13.0"},
            "config": {
                "method": {"name": method, **(settings or {"lr": 0.1})},
                "model": "mini",
                "evaluation": {"label_space": "task", "split": "test"},
            },
            **changes,
        }
        folder = place / name
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps(result))
        return folder

    write.folder = place
    return write
