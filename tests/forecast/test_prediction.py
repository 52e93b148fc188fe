"""The prediction of a run: hours, memory, parts, limits; and `clk plan`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cl_methods.cli import main
from cl_methods.commands.configuration import parse
from cl_methods.forecast.hardware import Hardware, find_hardware
from cl_methods.forecast.prediction import CONTEXT, Predictor
from cl_methods.training.building import select_scenario

SHORT = ["--method", "finetune", "--limit-tasks", "1"]


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    config, _ = parse(SHORT, "")
    return Predictor(config, select_scenario(config))


def card(memory: float) -> Hardware:
    return Hardware("card", {"fp32": 10, "bf16": 40}, memory_gib=memory / 2**30, bandwidth=500, link=10)


def test_hours_are_those_of_all_steps_hooks_and_rows(predictor: Predictor) -> None:
    found = predictor.predict(find_hardware("h100"))
    (stage,) = found.work.stages
    assert stage.steps == found.as_dict()["steps"] > 1
    assert found.hours == pytest.approx(
        found.step_seconds * stage.steps / 3600 + (found.between.total + found.evaluation.total) / 3600
    )
    faster = predictor.predict(card(8e9), precision="bf16")
    slower = predictor.predict(card(8e9))
    assert faster.whole.products < slower.whole.products / 2  # some are then limited by memory
    assert faster.whole.host == slower.whole.host
    assert slower.work is found.work  # counted once


def test_memory_decides_how_batches_are_cut_and_what_is_refused(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cl_methods.training.memory.planner._SIZES", (4,))  # few ways to rehearse
    roomy = predictor.predict(card(8e9))
    assert roomy.memory is not None
    assert roomy.memory.micro_batches is None
    assert roomy.memory_bytes == roomy.memory.peak + CONTEXT
    fixed = roomy.memory.peak - roomy.memory.step
    tight = predictor.predict(card(CONTEXT + (fixed + roomy.memory.step / 2) / 0.92))
    assert tight.memory is not None
    assert tight.memory.micro_batches is not None
    assert tight.memory.peak < roomy.memory.peak
    assert tight.work.stages[0].step.flops > roomy.work.stages[0].step.flops
    refused = predictor.predict(card(CONTEXT + fixed / 2))
    assert refused.too_large is not None
    assert "does not fit into" in refused.too_large


def test_more_processes_hold_less_and_exchange_more(predictor: Predictor) -> None:
    one, four = (predictor.predict(card(8e9), count) for count in (1, 4))
    assert one.memory is not None
    assert four.memory is not None
    assert four.memory.step < one.memory.step
    assert (one.whole.exchange, four.whole.exchange > 0) == (0, True)


def test_sharded_weights_are_gathered_twice_and_reduced_once_and_updated_in_shares() -> None:
    config, _ = parse([*SHORT, "--distributed", "fsdp"], "")
    sharded = Predictor(config, select_scenario(config))
    half, alone = (sharded.predict(card(8e9), count) for count in (2, 1))
    assert half.memory is not None
    assert alone.memory is not None
    fixed = ("model", "gradients", "optimiser")
    for name in fixed:  # halves, padded to whole rows
        assert getattr(half.memory, name) == pytest.approx(getattr(alone.memory, name) / 2, rel=0.02), name
    assert half.memory.exchanged == pytest.approx(3 * 4 * half.work.trainable, rel=0.02)
    step, whole = half.work.stages[0].step, alone.work.stages[0].step
    assert step.flops == pytest.approx(whole.flops / 2, rel=1e-3)  # an odd class text
    assert sum(step.gathered.values()) > half.memory.exchanges  # of pixels and features too
    assert sum(step.summed.values()) < half.memory.exchanges  # gradients of weights are not among them
    assert sum(half.work.evaluation.gathered.values()) > sum(alone.work.evaluation.gathered.values()) == 0


def test_the_command_prints_a_table_and_writes_every_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    status = main(["plan", *SHORT, "--hardware", "h100", "--processes", "1,2", "--network", "10", "--json", str(file)])
    text = capsys.readouterr().out
    assert status == 0
    assert "predicted, not measured" in " ".join(text.split())
    assert "H100" in text
    rows = json.loads(file.read_text())
    assert [row["processes"] for row in rows] == [1, 2]
    assert rows[0]["flops_per_step"] > rows[1]["flops_per_step"] > 0
    assert rows[1]["exchanged_per_step"] > 0


def test_the_memory_is_that_with_the_levers_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without the averages and the optimiser's state of a GPU; the table says that hours leave the copies out."""
    options = ["--method", "weight_ensemble", "--limit-tasks", "1", "--method.average-every", "1"]
    needed = []
    for levers in ([], ["--optimizer-state", "host", "--offload", "all"]):
        assert main(["plan", *options, *levers, "--json", str(tmp_path / "plan.json")]) == 0
        needed.append(json.loads((tmp_path / "plan.json").read_text())[0]["memory"])
        text = " ".join(capsys.readouterr().out.split())
        sentence = "with --optimizer-state host, --offload all; hours do not count what moves between host and GPU"
        assert (sentence in text) is bool(levers)
    plain, offloaded = needed
    assert offloaded["optimiser"] == 0 < plain["optimiser"]
    assert plain["carried"] - offloaded["carried"] == plain["gradients"]  # one copy of what trains


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hardware", "b200"], "hardware: expected one of a100"),
        (["--processes", "0"], "processes: expected numbers >= 1 separated by commas, got '0'"),
        (["--processes", "1,,2"], "processes: expected numbers >= 1"),
        (["--network", "-1"], "network: expected a number > 0, got -1"),
        (["--hardware", "v100", "--precision", "bf16"], "precision: V100 SXM2 32 GB has figures for fp32, got 'bf16'"),
        (["--scenario", "mtil", "--captions", "0"], "captions: expected a number >= 1, got 0"),
        (["--method", "zsl"], "did you mean zscl?"),
        (
            ["--method", "moe_adapters", "--distributed", "fsdp"],
            "distributed: moe_adapters needs whole weights in every process, got fsdp; expected replicated, or one of the methods",
        ),
    ],
)
def test_wrong_options_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
