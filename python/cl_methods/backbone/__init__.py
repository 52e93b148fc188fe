"""CLIP as methods see it: any open_clip model, how its features are computed with the least work, and how it is loaded."""

from __future__ import annotations

from cl_methods.backbone.model import MINI_WEIGHTS, Backbone, Precision, load_backbone, planned_weights, prompt

__all__ = ["MINI_WEIGHTS", "Backbone", "Precision", "load_backbone", "planned_weights", "prompt"]
