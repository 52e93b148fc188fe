"""Where a model's weights come from, for results, logs and files made from them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes and float32 values of a state dict: the same in whatever form and file the weights lie.

    The shape of a single number does not count: ``logit_scale`` is stored as () or (1,).
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu()
        value = (value.float() if value.is_floating_point() else value.long()).contiguous()
        shape = tuple(value.shape) if value.numel() != 1 else ()
        digest.update(f"{name}{shape}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True)
class WeightsOrigin:
    """What was loaded, from where.

    Attributes:
        model: the architecture as it was asked for.
        source: file, folder or open_clip tag, or ``embedded``.
        form: what the file was found to be, such as ``TorchScript archive``.
        sha256: of the file; None where there is no single file.
        fingerprint: of the weights themselves, see :func:`fingerprint`.
        released_as: open_clip tag under which a file of these very bytes was released, such as ``openai``; None if unknown.
        activation: of the model, ``QuickGELU`` or ``GELU``.
        notes: what was assumed, and what a user should know.
        model_cfg: open_clip's configuration of the architecture; None where it cannot be expressed as one.
    """

    model: str
    source: str
    form: str
    sha256: str | None
    fingerprint: str
    activation: str
    released_as: str | None = None
    notes: tuple[str, ...] = ()
    model_cfg: dict[str, Any] | None = field(default=None, repr=False, compare=False)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without the architecture's configuration."""
        values = asdict(self)
        del values["model_cfg"]
        return values | {"notes": list(self.notes)}

    def sentence(self) -> str:
        """One line for logs."""
        file = f", sha256 {self.sha256[:12]}" if self.sha256 else ""
        released = f", released as {self.released_as!r}" if self.released_as and self.released_as != self.source else ""
        notes = "".join(f"; {note}" for note in self.notes)
        return (
            f"weights of {self.model}: {self.source} ({self.form}{released}{file}), {self.activation}, "
            f"fingerprint {self.fingerprint[:12]}{notes}"
        )
