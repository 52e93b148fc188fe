"""Records, their history, and what it calls worse."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import cl_kernels as clk
from cl_methods.bench import history, suites
from cl_methods.bench.agreement import CheckError, compare
from cl_methods.bench.measuring import interleaved
from cl_methods.bench.own_step import own_steps
from cl_methods.bench.record import Record, new_record
from cl_methods.bench.rows import OURS, Row, Samples, over_ours
from cl_methods.bench.world import mini_world
from cl_methods.cli import main

CPU = torch.device("cpu")


def record(ours: float, peer: float | None = None, spread: float = 0.0, **changed) -> Record:
    rows = [Row("case", OURS, {"operations": 10}, {"seconds": Samples(ours, ours * (1 + spread), 5)})]
    if peer is not None:
        rows.append(Row("case", "peer", {"operations": 100}, {"seconds": Samples(peer, peer, 5)}))
    made = Record("step", {"model": "mini"}, "a machine", {"torch": "2.13"}, "abc", False, "2026-01-01T00:00:00", rows)
    return replace(made, **changed)


def test_a_record_survives_the_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "history.jsonl"
    first, second = record(1.0, 2.0), record(1.5)
    history.append(first, path)
    path.write_bytes(path.read_bytes().rstrip(b"\n"))  # as an editor may leave it
    history.append(second, path)
    assert history.read(path) == [first, second]
    rows = json.loads(path.read_text().splitlines()[0])["rows"]
    assert rows[1]["over_ours"] == {"operations": 10.0, "seconds": 2.0}
    assert over_ours(first.rows) == {("case", "peer"): {"operations": 10.0, "seconds": 2.0}}


def test_a_damaged_history_is_named(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    history.append(record(1.0), path)
    path.write_text(path.read_text() + '{"suite": "step"}\n')
    with pytest.raises(
        history.HistoryError, match=r"line 2 of .*history\.jsonl is not a record \(KeyError: 'setting'\)"
    ):
        history.read(path)
    with pytest.raises(history.HistoryError, match="does not exist"):
        history.read(tmp_path / "other.jsonl")


@pytest.mark.parametrize(
    ("before", "now", "worse"),
    [
        (record(1.0), record(1.2), [True]),
        (record(1.0), record(1.04), []),  # below 5 %
        (record(1.0, spread=0.2), record(1.3, spread=0.2), []),  # both runs were noisy
        (record(1.0), record(0.8), [False]),
        (record(1.0, 2.0), record(1.5, 3.0), []),  # the machine is slower today, and so is the peer
        (record(1.0, 2.0), record(1.0, 1.5), [True]),  # slower than it should be on a machine that is faster today
    ],
)
def test_what_counts_as_slower(before: Record, now: Record, worse: list[bool]) -> None:
    assert [change.worse for change in history.changes(before, now)] == worse


def test_slower_beside_one_peer_only_is_the_peers_doing() -> None:
    before, now = record(1.0, 2.0), record(1.0, 1.0)
    for made in (before, now):
        made.rows.append(Row("case", "another", measured={"seconds": Samples(3.0, 3.0, 5)}))
    assert history.changes(before, now) == []


def test_counts_are_compared_exactly() -> None:
    now = record(1.0)
    now.rows[0].exact["operations"] = 11
    (change,) = history.changes(record(1.0), now)
    assert str(change) == "case: operations rose from 10 to 11, +10.0%"
    now.rows[0].exact["operations"] = 9
    assert [change.worse for change in history.changes(record(1.0), now)] == [False]


@pytest.mark.parametrize("other", [{"machine": "another"}, {"setting": {"model": "ViT-B-16"}}, {"suite": "kernels"}])
def test_only_records_of_one_kind_meet(other: dict) -> None:
    now, foreign = record(2.0), record(1.0, **other)
    assert history.last_before([foreign, now], now) is None
    with pytest.raises(history.HistoryError, match="not comparable"):
        history.changes(foreign, now)


def test_a_slowed_kernel_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Measured, not made up: the same step beside the same peer, before and after its kernel was slowed down on purpose."""
    path, kernel, world = tmp_path / "history.jsonl", clk.feature_distill_kl, mini_world()
    step, floor = (own_steps(name, world)["train"] for name in ("lwf", "finetune"))

    def slow(*tensors, **settings):
        time.sleep(2.0)
        return kernel(*tensors, **settings)

    for function, rounds in ((kernel, 3), (slow, 1)):
        monkeypatch.setattr(clk, "feature_distill_kl", function)
        times = interleaved({OURS: step.run, "finetune step": floor.run}, rounds, CPU)
        rows = [Row("lwf, mini", name, measured={"seconds": samples}) for name, samples in times.items()]
        history.append(new_record("step", {"model": "mini"}, rows, CPU), path)
    assert main(["bench", "--compare", "--history", str(path)]) == 1
    out = capsys.readouterr().out
    assert "worse: lwf, mini: +" in out
    assert "slower beside finetune step (noise " in out


def test_comparing_on_another_machine(tmp_path: Path, capsys) -> None:
    path = tmp_path / "history.jsonl"
    history.append(record(1.0), path)
    assert main(["bench", "--compare", "--history", str(path)]) == 2
    assert "no record of this machine" in capsys.readouterr().err


def test_measuring_appends_and_compares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Two runs of the command: the second one knows the first."""
    path, output = tmp_path / "history.jsonl", tmp_path / "step.json"
    operations = iter((10, 11))

    def made(suite: str, **options):
        return {"model": options["model"]}, [Row("case", exact={"operations": next(operations)})], CPU

    monkeypatch.setattr(suites, "run", made)
    call = ["bench", "--suite", "step", "--output", str(output), "--history", str(path), "--compare"]
    assert main(call) == 0
    assert "this is the first record" in capsys.readouterr().out
    assert main(call) == 1
    assert "worse: case: operations rose from 10 to 11" in capsys.readouterr().out
    assert len(history.read(path)) == 2
    written = json.loads(output.read_text())
    assert written["rows"] == [{"suite": "step", "case": "case", "implementation": "ours", "exact": {"operations": 11}}]
    assert "hostname" not in output.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "suite: expected kernels, step, evaluation or counts"),
        (["--suite", "step", "--rounds", "0"], "rounds: expected a number >= 1, got 0"),
        (["--suite", "step", "--output", "nowhere/step.json"], "output: expected a file in an existing folder"),
        (["--suite", "step", "--methods", "zscll"], "methods: expected names of trained methods"),
        (["--suite", "step", "--model", "ViT-B-17"], "got 'ViT-B-17'"),
        (["--page", "page.html", "--history", "none.jsonl"], "none.jsonl does not exist"),
    ],
)
def test_wrong_calls_say_what_is_wrong(arguments: list[str], message: str, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


def test_no_speed_without_a_green_check() -> None:
    right = (torch.tensor(1.0), {"w": torch.ones(3)})
    assert compare("case", right, right) == {"loss": 0.0, "gradient": 0.0, "gradients": 0.0}
    with pytest.raises(CheckError, match=r"case: gradient differ by 1\.0e-03, expected at most 1e-05; no speed"):
        compare("case", (right[0], {"w": torch.full((3,), 1.001)}), right)
    with pytest.raises(CheckError, match="loss differ by nan"):
        compare("case", (torch.tensor(float("nan")), right[1]), right)
    with pytest.raises(CheckError, match="exist on one side only, such as v"):
        compare("case", (right[0], {**right[1], "v": torch.ones(1)}), right)
