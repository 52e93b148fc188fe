"""Transfer, Average and Last against the published accuracy matrices."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from safetensors import safe_open

from cl_methods.evaluation import mtil_metrics

GOLDEN = Path(os.environ.get("CL_GOLDEN_DIR", Path(__file__).parent / "data"))


def cases() -> list[tuple[Path, str]]:
    found = []
    for path in sorted(GOLDEN.glob("metrics*.safetensors")):
        with safe_open(path, framework="np") as file:
            found += [(path, name.removesuffix(".R")) for name in sorted(file.keys()) if name.endswith(".R")]
    assert found, f"no metrics*.safetensors with accuracy matrices in {GOLDEN}"
    return found


@pytest.mark.parametrize(("path", "name"), cases(), ids=lambda value: value.stem if isinstance(value, Path) else value)
def test_published_matrix(path: Path, name: str):
    with safe_open(path, framework="np") as file:
        metrics = mtil_metrics(file.get_tensor(f"{name}.R"))
        for key, expected in (("transfer", "transfer"), ("average", "avg"), ("last", "last")):
            assert metrics[f"{key}_per_task"] == pytest.approx(file.get_tensor(f"{name}.{expected}").tolist(), rel=1e-5)
        summary = [metrics["transfer"], metrics["average"], metrics["last"]]
        assert summary == pytest.approx(file.get_tensor(f"{name}.summary").tolist(), rel=1e-5)
        rounded = file.get_tensor(f"{name}.summary_rounded").tolist()
        assert [round(value, 1) for value in summary] == pytest.approx(rounded, abs=1e-4)
