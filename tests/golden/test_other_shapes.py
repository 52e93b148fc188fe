"""The tests of this folder take shapes and numbers from the files: with others, made from the formulas, they pass too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import other_shapes
import pytest
import torch

HERE = Path(__file__).parent
MADE = {
    "ranpac": other_shapes.ranpac,
    "clipood": other_shapes.clipood,
    "zscl_kd": other_shapes.distillation,
    "proof": other_shapes.proof,
}


@pytest.mark.slow
@pytest.mark.native
def test_other_folders_pass(tmp_path: Path) -> None:
    torch.manual_seed(5)
    for make in MADE.values():
        make(tmp_path)
    files = [HERE / f"test_{name}.py" for name in MADE]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "not interpreter", "-p", "no:cacheprovider", *files],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "CL_GOLDEN_DIR": str(tmp_path)},
        cwd=HERE.parents[1],
    )
    assert done.returncode == 0, done.stdout
