"""Autoencoders that tell data sets apart by how well they reconstruct them: single ones, and the errors of several at once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_CACHED = 1 << 19
"""Numbers of a block of reconstructions on a CPU: a megabyte or two stay in a core's cache from the product to the sum."""


class AutoEncoder(nn.Module):
    """``AE(z) = sigmoid(relu(z W_eᵀ + b_e) W_dᵀ + b_d)`` on z (N, D) in (0, 1).

    Attributes:
        unit: scalar, mean error on held-out images of the data that it was trained on.
    """

    unit: Tensor

    def __init__(self, width: int, code: int) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(width, code), nn.Linear(code, width)
        self.register_buffer("unit", torch.ones(()))
        self._digest: str | None = None

    def forward(self, z: Tensor) -> Tensor:
        """Reconstruction of z (N, D)."""
        return torch.sigmoid(self.decoder(F.relu(self.encoder(z))))

    def errors(self, z: Tensor) -> Tensor:
        """(N,) mean squared error of each row of z (N, D)."""
        return (self(z) - z).square().mean(dim=1)

    def digest(self, *beside: Tensor) -> str:
        """sha256 over the weights and what is fixed ``beside`` them; from now on these must not change, they are looked at once."""
        if self._digest is None:
            found = hashlib.sha256()
            for value in (*self.parameters(), *beside):
                found.update(value.detach().cpu().contiguous().numpy().data)
            self._digest = found.hexdigest()
        return self._digest


@torch.no_grad()
def reconstruction_errors(coders: Sequence[AutoEncoder], z: Tensor) -> Tensor:
    """:meth:`AutoEncoder.errors` of several autoencoders, without a gradient.

    The sigmoid keeps an error from being a quadratic form in the code, which would need no decoding. So the reconstructions are
    made, a block of columns at a time on a CPU: what the product writes, the sigmoid, the difference and the sum of squares find
    in the cache, and a block of z serves all autoencoders.

    Args:
        coders: T of the same widths.
        z: (N, D).

    Returns:
        (N, T).
    """
    codes = [F.relu(coder.encoder(z)) for coder in coders]
    width = z.shape[1]
    columns = max(1, min(width, _CACHED // max(1, len(z)) if z.device.type == "cpu" else width))
    buffer, sums = z.new_empty(len(z), columns), z.new_zeros(len(coders), len(z))
    for start in range(0, width, columns):
        block = z[:, start : start + columns]
        made = buffer[:, : block.shape[1]]
        for coder, code, total in zip(coders, codes, sums, strict=True):
            decoder = coder.decoder
            rows = slice(start, start + block.shape[1])
            torch.addmm(decoder.bias[rows], code, decoder.weight[rows].T, out=made)
            total += made.sigmoid_().sub_(block).square_().sum(dim=1)
    return (sums / width).T
