"""The task detector against the public code's rule, decided per batch and per sample."""

from __future__ import annotations

import golden_cases as golden
import pytest
import torch
from torch import Tensor

from cl_methods.components.ddas import AutoEncoder, decide

TOLERANCE = 1e-5


def errors_of(tensors: dict[str, Tensor], meta: dict[str, int]) -> Tensor:
    """(batches, B, autoencoders) reconstruction errors by our autoencoders with the file's weights."""
    z = torch.sigmoid(tensors["features"])
    columns = []
    for index in range(meta["autoencoders"]):
        coder = AutoEncoder(meta["D"], meta["code"])
        with torch.no_grad():
            coder.encoder.weight.copy_(tensors["enc_weight"][index])
            coder.encoder.bias.copy_(tensors["enc_bias"][index])
            coder.decoder.weight.copy_(tensors["dec_weight"][index])
            coder.decoder.bias.copy_(tensors["dec_bias"][index])
            columns.append(coder.errors(z.flatten(0, 1)).view(z.shape[:2]))
    return torch.stack(columns, dim=-1)


def test_errors() -> None:
    tensors, meta = golden.load("ddas")
    errors = errors_of(tensors, meta)
    assert golden.max_error(errors, tensors["sample_error"]) < TOLERANCE
    assert golden.max_error(errors.mean(dim=1), tensors["batch_error"]) < TOLERANCE


@pytest.mark.parametrize("scope", ["batch", "sample"])
def test_decisions(scope: str) -> None:
    tensors, meta = golden.load("ddas")
    errors = errors_of(tensors, meta)
    for row, threshold in enumerate(tensors["thresholds"].tolist()):
        for batch, values in enumerate(errors):
            expected = tensors[f"{scope}_decision"][row, batch].expand(len(values))
            assert torch.equal(decide(values, threshold, scope), expected), (threshold, batch)
