"""Suite `step` of `clk bench` on a GPU: both public procedures agree with ours there, and the rows are of that device."""

from __future__ import annotations

import pytest
import torch

from cl_methods.bench import suites
from cl_methods.bench.step import PUBLIC

pytestmark = pytest.mark.gpu


def test_the_public_procedures_agree_and_are_slower_in_memory() -> None:
    options = {"model": "mini", "methods": ("zscl", "moe_adapters"), "batch": 4, "captions": None, "rounds": 2}
    device = torch.device("cuda")
    setting, rows, where = suites.run("step", **options, time=True, device=device, pattern="", note=lambda _: None)
    assert where == device
    assert setting["model"] == "mini"
    pairs = [row for row in rows if row.implementation == PUBLIC]
    assert len(pairs) == 2
    assert all(row.measured["seconds"].best > 0 and row.measured["peak_bytes"].best > 0 for row in pairs)
    assert all(error <= 1e-5 for row in rows for error in row.checked.values())
