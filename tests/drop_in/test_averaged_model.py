"""AveragedModel with and without the patch: the same averages, one operation, and a refusal of other functions."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.optim import swa_utils

from cl_kernels import drop_in
from cl_kernels.profile import OperationCount

KINDS = {
    "default": {},
    "swa": {"avg_fn": swa_utils.get_swa_avg_fn()},
    "swa, many": {"multi_avg_fn": swa_utils.get_swa_multi_avg_fn()},
    "default, buffers": {"use_buffers": True},
    "ema": {"avg_fn": swa_utils.get_ema_avg_fn(0.8)},
    "ema, many": {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.9), "use_buffers": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_same_averages(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    averages = [swa_utils.AveragedModel(model, **KINDS[kind]) for _ in range(2)]
    before = dict(vars(averages[1]))
    patch = drop_in.patch_averaged_model(averages[1])
    assert patch.replaced == ["multi_avg_fn"]
    start = copy.deepcopy(averages[0].state_dict())
    for _ in range(5):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        model(torch.randn(2, 3, 4, 4))
        for average in averages:
            average.update_parameters(model)
    expected, found = (average.state_dict() for average in averages)
    assert list(expected) == list(found)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=1e-6)
    assert not torch.equal(start["module.0.weight"], expected["module.0.weight"])
    pickle.dumps(averages[1].multi_avg_fn)
    patch.undo()
    assert dict(vars(averages[1])) == before


@pytest.mark.native
def test_operations():
    model = nn.ModuleList(nn.Linear(4, 4) for _ in range(100))
    averages = [swa_utils.AveragedModel(model) for _ in range(2)]
    drop_in.patch_averaged_model(averages[1])
    counts = []
    for average in averages:
        average.update_parameters(model)
        with OperationCount() as count:
            average.update_parameters(model)
        counts.append({name: n for name, n in count.by_name.items() if name != "aten::detach"})
    assert counts[1]["cl_kernels::average_"] == 1
    assert sum(counts[0].values()) >= 20 * sum(counts[1].values()), counts


def test_refusals():
    model = nn.Linear(2, 2)
    with pytest.raises(TypeError, match="averaged: got Linear"):
        drop_in.patch_averaged_model(model)
    own = swa_utils.AveragedModel(model, avg_fn=lambda a, v, n: a)
    with pytest.raises(ValueError, match=r"avg_fn: .*lambda.* is not a function of torch.optim.swa_utils"):
        drop_in.patch_averaged_model(own)
    average = swa_utils.AveragedModel(model)
    drop_in.patch_averaged_model(average)
    with pytest.raises(ValueError, match="already patched"):
        drop_in.patch_averaged_model(average)
