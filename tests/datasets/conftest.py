"""Lets the tests of this folder import the miniatures."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """What was decoded is remembered in a folder of the test."""
    monkeypatch.setenv("CLK_CACHE", str(tmp_path_factory.mktemp("cache")))
