"""What a training step costs: rows that frozen models read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from cl_methods.backbone import Backbone


def encoded_by_frozen(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts, from now on, the ``images`` and ``texts`` that models without trainable weights read."""
    rows = {"images": 0, "texts": 0}

    def counting(kind: str, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(backbone: Backbone, given: Tensor, **options: Any) -> Tensor:
            if not next(backbone.model.parameters()).requires_grad:
                rows[kind] += len(given)
            return original(backbone, given, **options)

        return call

    for kind in rows:
        name = f"encode_{kind}"
        monkeypatch.setattr(Backbone, name, counting(kind, getattr(Backbone, name)))
    return rows
