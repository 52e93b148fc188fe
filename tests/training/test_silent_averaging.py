"""Averages of weights on several processes: each averages what it holds, and nobody sends anything for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("silent_averaging.py")


@pytest.mark.parametrize(
    ("distributed", "mean", "pulled"), [("replicated", "mean", "start"), ("fsdp", "wise", "previous")]
)
def test_averaging_exchanges_nothing(distributed: str, mean: str, pulled: str, forked_clk) -> None:
    done = forked_clk.run(PROGRAM, 2, distributed, mean, pulled, environment={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    every = json.loads(done.stdout)
    assert len(every) == 2
    for rest, averaging, moved in every:
        assert sum(rest.values()) >= 3  # gradients of every step, so the count would have seen others
        assert averaging == {}
        assert moved > 0
