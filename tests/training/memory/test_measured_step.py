"""What ``benchmarks/memory_plan.py`` measures is the step that is planned, and a process holds no memory that was freed."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
from test_memory import given, settings_of
from tiny_clip import build_backbone

from cl_methods.methods import METHODS
from cl_methods.training.memory.levers import Levers
from cl_methods.training.memory.live import LiveMemory
from cl_methods.training.memory.rehearsal import Rehearsal

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"

FREED = """
from cl_kernels.profile import resident_bytes
from cl_methods.training.memory.planner import give_back_freed_memory

blocks = [bytearray(b"x" * 60_000) for _ in range(2_000)]
del blocks[:-1]  # the last one keeps the heap from shrinking by itself
before = resident_bytes()
give_back_freed_memory()
print(before - resident_bytes())
"""


@pytest.mark.parametrize("name", ["zscl", "mulki", "clap4clip"])  # of MoE-Adapters no detector is measured
def test_the_step_that_is_measured_is_the_step_that_is_planned(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a task that is not the first: there ZSCL's teacher and anchor are one, and the step needs one copy of the weights less."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    sys.modules.pop("memory_plan", None)
    import memory_plan

    tasks, reference = given()
    settings = settings_of(name)
    if hasattr(settings, "reference_batch_size"):
        settings = dataclasses.replace(settings, reference_batch_size=settings.batch_size)
    rehearsal = Rehearsal(METHODS[name], settings, build_backbone(), tasks, reference, None)
    memory, backbone = LiveMemory(), build_backbone()
    for value in (*backbone.model.parameters(), *backbone.model.buffers()):
        memory.count(value)
    for source in (*(task.train for task in tasks), reference.images):
        memory.leave_out(source.image(0))
    monkeypatch.setattr(memory_plan, "start_peak_memory", lambda device: setattr(memory, "peak", memory.bytes))
    options: Any = argparse.Namespace(
        method=name, processes=1, batch_size=settings.batch_size, images=len(reference.images)
    )
    with memory:
        method = METHODS[name](backbone, settings, reference)
        memory_plan.take_steps(method, tasks, reference, Levers(), options)
    assert rehearsal.step(None) == pytest.approx(memory.peak, rel=0.005)


def test_freed_memory_is_not_the_process_own(forked_torch: Any, tmp_path: Path) -> None:
    program = tmp_path / "freed.py"
    program.write_text(FREED)
    done = forked_torch.run(program)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 60_000 * 1_500
