"""Where scenarios keep what would take time to make again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$CLK_CACHE``, else ``cl-kernels`` under ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    chosen = os.environ.get("CLK_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cl-kernels"
