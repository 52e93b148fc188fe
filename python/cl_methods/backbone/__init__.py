"""CLIP as methods see it: any open_clip model, how its features are computed with the least work, and how it is loaded."""

from __future__ import annotations

from cl_methods.backbone.loading import MINI_WEIGHTS, load_backbone, planned_weights
from cl_methods.backbone.model import Backbone, prompt
from cl_methods.backbone.passes import Precision

__all__ = ["MINI_WEIGHTS", "Backbone", "Precision", "load_backbone", "planned_weights", "prompt"]
