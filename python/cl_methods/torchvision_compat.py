"""The one place that deals with a torchvision whose compiled operators do not load.

torchvision from the package registry is built against CUDA builds of torch. On a CPU build its operator library cannot load,
and ``import torchvision`` then fails while it registers fake implementations for ``torchvision::nms`` and ``torchvision::qnms``,
two schemas that the missing library would have defined. Nothing in this project calls them, so defining the schemas is enough:
transforms, datasets and open_clip work. Where torchvision brings its operators, nothing is defined here.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util

import torch

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_library: torch.library.Library | None = None


def prepare_torchvision() -> bool:
    """Make ``import torchvision`` possible; call before importing torchvision, timm or open_clip. Idempotent.

    Returns:
        Whether the two schemas had to be defined because torchvision's own operators are missing.

    Raises:
        ImportError: torchvision is not installed.
    """
    global _library
    if _library is not None:
        return True
    spec = importlib.util.find_spec("torchvision")
    if spec is None:
        raise ImportError("torchvision is not installed; `pip install torchvision` (open_clip needs it)")
    if _has_operators(spec):
        return False
    _library = torch.library.Library("torchvision", "DEF")  # torchvision's missing library would have defined these
    for name in ("nms", "qnms"):
        _library.define(name + _SCHEMA)
    return True


def _has_operators(spec: importlib.machinery.ModuleSpec) -> bool:
    """Whether torchvision's operators are registered, or its library loads."""
    if hasattr(torch.ops.torchvision, "nms"):
        return True
    for folder in spec.submodule_search_locations or ():
        library = importlib.machinery.PathFinder.find_spec("_C", [folder])
        if library is None or library.origin is None:
            continue
        try:
            torch.ops.load_library(library.origin)
        except OSError:
            return False
    return hasattr(torch.ops.torchvision, "nms")
