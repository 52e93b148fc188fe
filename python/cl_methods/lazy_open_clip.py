"""open_clip, imported when something of it is first asked for: with torchvision and timm that takes longer than most commands.

``lazy_open_clip.library`` is ``open_clip``; ``lazy_open_clip.transformer``, ``.model`` and ``.pretrained`` are its modules. Nothing
else in this package imports open_clip, so torchvision has always been prepared for it.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from cl_methods.torchvision_compat import prepare_torchvision

prepare_torchvision()

_NAMES = {"library": "open_clip", **{name: f"open_clip.{name}" for name in ("model", "pretrained", "transformer")}}


def __getattr__(name: str) -> Any:
    """Import what is asked for; from then on it is an attribute like any other, also for torch's compiler."""
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = module = import_module(_NAMES[name])
    return module
