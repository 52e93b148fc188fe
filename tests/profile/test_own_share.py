"""Which share of a training step the model itself has: against numbers from paper and pencil."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from cl_kernels.profile import profile_adapter

B, D, R, C = 5, 12, 2, 3


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(D, D)

    def forward(self, x):
        return self.layer(x)


class Wrapped(nn.Module):
    """The layer inside a wrapper, with an adapter beside it."""

    def __init__(self, layer):
        super().__init__()
        self.inner = layer.requires_grad_(False)
        self.down, self.up = nn.Linear(D, R), nn.Linear(R, D)

    def forward(self, x):
        return self.inner(x) + self.up(self.down(x).relu())


class Adapted(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = Wrapped(nn.Linear(D, D))

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize("static", [True, False])
def test_what_is_mounted_and_the_loss_are_not_the_models_own(static):
    anchors = torch.randn(C, D, device="meta" if static else "cpu")
    found = profile_adapter(
        Base(),
        Adapted(),
        [torch.randn(B, D, requires_grad=True)],
        loss=lambda y: (y @ anchors.T).sum(),
        optimizer=torch.optim.SGD,
        static=static,
        rename=lambda name: name.replace("layer.inner", "layer"),
        repeats=1,
    )
    layer, adapter, loss = 2 * B * D * D, 2 * B * 2 * D * R, 2 * B * C * D
    # Frozen: forward and the gradient of x. The adapter: both its weights' gradients besides. The loss: that of y.
    expected = 2 * layer / (2 * layer + 3 * adapter + 2 * loss)
    flops, seconds = found.own_share()
    assert flops == pytest.approx(expected, abs=1e-12)
    assert f"Of the step's FLOPs {expected:.1%} are the model's own" in found.headline()
    assert json.loads(json.dumps(found.as_dict()))["own_share"] == {"flops": flops, "seconds": seconds}
    if static:
        assert seconds is None
    else:
        assert 0 < seconds < 1
        assert "of the time inside its operations" in found.headline()
