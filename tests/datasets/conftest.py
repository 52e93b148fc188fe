"""Lets the tests of this folder import the miniatures, and the tiny CLIP of the methods' tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "methods")]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """What was decoded is remembered in a folder of the test."""
    monkeypatch.setenv("CLK_CACHE", str(tmp_path_factory.mktemp("cache")))
