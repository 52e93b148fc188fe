"""Lets the tests of this folder import the small CLIP, and makes its two architectures known to open_clip."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from small_clip import register


@pytest.fixture(scope="session", autouse=True)
def small_models(tmp_path_factory: pytest.TempPathFactory) -> None:
    register(tmp_path_factory.mktemp("configs"))
