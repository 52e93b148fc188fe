"""1, 2 and 4 processes: the same losses, gradients, counts, statistics and matrix, sharded too; a death, and going on."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from forked_ranks import reserved_port
from safetensors.torch import load_file

from cl_methods.commands.configuration import parse
from cl_methods.methods.find import METHODS
from cl_methods.training.run import run

PROGRAM = Path(__file__).with_name("distributed_runs.py")
EVALUATIONS = Path(__file__).with_name("distributed_evaluations.py")
SHORT = [
    "--limit-tasks",
    "2",
    "--limit-iterations",
    "2",
    "--evaluation.split",
    "validation",
    "--evaluation.limit",
    "60",
]
SHORT += ["--evaluation.batch-size", "24", "--checkpoint.every", "0", "--checkpoint.keep", "last"]
OPTIMISED = ["--method.batch-size", "10", "--method.lr", "2e-6"]  # Adam turns rounding into steps of this size
KINDS = {
    # consolidation, averages, captions
    "zscl": [*OPTIMISED, "--method.reference-batch-size", "6", "--evaluation.novelty", "energy"],
    "moe_adapters": [*OPTIMISED, "--method.ddas.iterations", "10", "--method.ddas.generic-iterations", "10"],
    "ranpac": ["--method.batch-size", "50"],  # closed form
}
REST = {
    "ewc": [*OPTIMISED, "--method.fisher-samples", "9"],
    "loranpac": ["--method.batch-size", "50"],
    "zero_shot": [],
}
REST |= {method: OPTIMISED for method in METHODS if method not in KINDS | REST}
STATISTICS = ("gaussians.", "ddas.shift", "ddas.spread", "ddas.generic.unit", "ranpac.", "gram", "sums")


def compare(one: Path, many: Path) -> None:
    """Two run directories hold the same to 1e-5, what is counted exactly."""
    losses, others = (json.loads((path / "losses.json").read_text()) for path in (one, many))
    assert len(losses) == len(others)
    for mine, theirs in zip(losses, others, strict=True):
        assert mine.keys() == theirs.keys()
        assert all(abs(mine[name] - theirs[name]) <= 1e-5 * max(1, abs(mine[name])) for name in mine), (mine, theirs)
    gradients, others = (load_file(path / "gradients.safetensors") for path in (one, many))
    assert gradients.keys() == others.keys()
    rounding = torch.finfo(torch.float32).eps * max(
        (float(grad.abs().max()) for grad in gradients.values()), default=0.0
    )
    for name, value in gradients.items():
        allowed = max(1e-5 * float(value.abs().max()), rounding)
        assert float((value - others[name]).abs().max()) <= allowed, name
    result, other = (json.loads((path / "result.json").read_text()) for path in (one, many))
    for key in ("zero_shot", "accuracy"):
        torch.testing.assert_close(torch.tensor(result[key]), torch.tensor(other[key]), rtol=0, atol=1e-5)
    assert result["evaluated"] == other["evaluated"]
    for when, rows in result.get("novelty", {}).get("energy", {}).items():
        for row, same in zip(rows, other["novelty"]["energy"][when], strict=True):
            assert all(abs(row[name] - same[name]) <= 0.1 for name in row), (
                when,
                row,
                same,
            )  # few images tie but for rounding
    assert result["train"]["samples"] == other["train"]["samples"]
    assert (one / "checkpoints").exists() == (many / "checkpoints").exists()  # none where nothing trains
    for checkpoint in sorted((one / "checkpoints").glob("*"))[-1:]:
        state, others = (
            load_file(path / "checkpoints" / checkpoint.name / "model.safetensors") for path in (one, many)
        )
        assert state.keys() == others.keys()
        counted = [name for name, value in state.items() if not value.is_floating_point()]
        assert all(torch.equal(state[name], others[name]) for name in counted)
        for name in (name for name in state if name.startswith(STATISTICS)):
            torch.testing.assert_close(others[name], state[name], rtol=1e-5, atol=1e-5 * float(state[name].abs().max()))


@pytest.fixture(scope="module")
def program(forked_clk):
    """``program(FOLDER, COUNTS, METHODS, …)`` runs ``distributed_runs.py``."""

    def start(*arguments: object) -> subprocess.CompletedProcess[str]:
        return forked_clk.run(PROGRAM, *arguments, environment={"CUDA_VISIBLE_DEVICES": ""})

    return start


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("distributed")


@pytest.mark.parametrize("method", KINDS)
def test_processes_compute_what_one_computes(method, program, folder):
    """Ten images a batch on four processes are shares of two and three; captions and classes do not divide either."""
    done = program(folder, "1,2,4", method, *SHORT, *KINDS[method])
    assert done.returncode == 0, done.stderr
    for count in ("2", "4"):
        compare(folder / "1" / method, folder / count / method)
        assert json.loads((folder / count / method / "result.json").read_text())["environment"]["processes"] == int(
            count
        )


@pytest.mark.slow
@pytest.mark.parametrize("method", REST)
def test_every_other_method_too(method, program, folder):
    done = program(folder, "1,2,4", method, *SHORT, *REST[method])
    assert done.returncode == 0, done.stderr
    for count in ("2", "4"):
        compare(folder / "1" / method, folder / count / method)


def in_one(program, folder: Path, method: str) -> Path:
    """The run of one process, which another test may have made."""
    if not (folder / "1" / method).exists():
        done = program(folder, "1", method, *SHORT, *(KINDS | REST)[method])
        assert done.returncode == 0, done.stderr
    return folder / "1" / method


def test_two_processes_measure_checkpoints_as_one_does(program, forked_clk, folder):
    """``clk evaluate``: whole batches are dealt out, three a task, and every label space comes to the same."""
    run = in_one(program, folder, "moe_adapters")
    spaces = ("--evaluation.label-space", "task", "seen", "all")
    done = forked_clk.run(EVALUATIONS, run, folder / "again", "1,2", *spaces, environment={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((folder / "again" / n / "evaluated" / "evaluation.json").read_text()) for n in ("1", "2"))
    assert [found["environment"]["processes"] for found in (one, two)] == [1, 2]
    assert one["rows"] == two["rows"] == ["zero-shot", f"after {one['tasks'][-1]}"]
    assert one["label_spaces"].keys() == two["label_spaces"].keys() == {"task", "seen", "all"}
    for space, found in one["label_spaces"].items():
        for name, values in found.items():
            others = torch.tensor(two["label_spaces"][space][name])
            torch.testing.assert_close(torch.tensor(values), others, rtol=0, atol=1e-5)
    own = json.loads((run / "result.json").read_text())
    assert one["label_spaces"]["task"]["accuracy"] == [own["zero_shot"], own["accuracy"][-1]]
    assert done.stdout.count("of these accuracies were measured in") == 2, done.stdout


def held_rows(shapes: list[torch.Size], count: int, rank: int) -> int:
    """Scalars of tensors of these shapes that one of ``count`` processes holds: as many rows as the first, the last ones fewer."""
    total = 0
    for shape in shapes:
        most = -(-shape[0] // count)
        total += max(0, min(most, shape[0] - rank * most)) * (shape.numel() // shape[0])
    return total


def test_sharded_weights_learn_the_same_in_a_half_of_the_memory(program, folder):
    """FSDP2, two processes: losses, gradients, averages and matrix as one has them; bytes that rows of every tensor come to."""
    done = program(folder / "fsdp", "2", "zscl", *SHORT, *KINDS["zscl"], "--distributed", "fsdp")
    assert done.returncode == 0, done.stderr
    one, two = in_one(program, folder, "zscl"), folder / "fsdp" / "2" / "zscl"
    compare(one, two)
    shapes = [value.shape for value in load_file(one / "gradients.safetensors").values()]
    whole, halves = (json.loads((path / "bytes.json").read_text()) for path in (one, two))
    for held, count in ((whole, 1), (halves, 2)):
        for rank, found in enumerate(held):
            rows = 4 * held_rows(shapes, count, rank)
            assert found == {"weights": rows, "gradients": rows, "optimiser": 2 * rows}
    assert sum(halves[0].values()) < 0.505 * sum(whole[0].values())


def test_shares_of_two_and_three_images_go_through_sharded_weights_in_as_many_parts(program, folder):
    """One image at a time, of ten on four processes, and blocks computed again: all gather their weights together."""
    done = program(folder / "fsdp", "4x1", "zscl", *SHORT, *KINDS["zscl"], "--distributed", "fsdp")
    assert done.returncode == 0, done.stderr
    compare(in_one(program, folder, "zscl"), folder / "fsdp" / "4x1" / "zscl")


@pytest.mark.slow
def test_sharded_runs_go_on_with_other_numbers_of_processes(program, folder):
    """Two that shard are killed in the second task; three that shard go on, and end as one process does."""
    every = [*SHORT, *KINDS["zscl"], "--checkpoint.every", "1"]
    done = program(folder / "cut", "2!1@5", "zscl", *every, "--distributed", "fsdp")
    assert done.stderr.count("is gone without a word") == 1, done.stderr
    goes_on_as_one(program, folder, folder / "cut", "2", "3", "zscl", [*every, "--distributed", "fsdp"])


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.shards and name != "zscl"])
def test_every_method_that_shards(method, program, folder):
    """Two processes as one; then a run that two shard goes on in one that holds everything."""
    options = [*SHORT, *REST[method]]
    done = program(folder / "fsdp", "2", method, *options, "--distributed", "fsdp")
    assert done.returncode == 0, done.stderr
    compare(in_one(program, folder, method), folder / "fsdp" / "2" / method)
    every = [*options, "--checkpoint.every", "1"]
    done = program(folder / "cut", "2!1@2", method, *every, "--distributed", "fsdp")
    assert done.stderr.count("is gone without a word") == 1, done.stderr
    goes_on_as_one(program, folder, folder / "cut", "2", "1", method, every)


def test_methods_that_need_whole_weights_are_not_sharded(tmp_path):
    config, _ = parse(["--method", "moe_adapters", "--distributed", "fsdp"], "")
    with pytest.raises(ValueError, match=r"distributed: moe_adapters needs whole weights .* lwf, .*zscl"):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_shares_that_are_encoded_in_parts(program, folder):
    """Noise, dropout and counts of a sample are those of its place in the whole batch, in a part of a share too."""
    done = program(folder, "2x3", "moe_adapters", *SHORT, *KINDS["moe_adapters"])
    assert done.returncode == 0, done.stderr
    compare(in_one(program, folder, "moe_adapters"), folder / "2x3" / "moe_adapters")


def test_a_rank_that_dies_ends_the_run_and_other_numbers_of_processes_go_on(program, folder):
    """Four processes, one killed in the second task; two that shard go on from the last checkpoint and come to the same end."""
    every = [*SHORT, *KINDS["zscl"], "--checkpoint.every", "1"]
    done = program(folder / "fault", "4!2@5", "zscl", *every)
    assert done.returncode == 1
    assert done.stderr.count("is gone without a word") == 1, done.stderr
    assert "--resume continues, with any number of processes" in done.stderr
    broken = folder / "fault" / "4" / "zscl"
    assert sorted(path.name for path in broken.iterdir()) == ["checkpoints", "rows.json", "run.json"]
    assert [path.name for path in sorted((broken / "checkpoints").iterdir())] == ["task00", "task01-step000001"]
    goes_on_as_one(program, folder, folder / "fault", "4", "2", "zscl", [*every, "--distributed", "fsdp"])


def goes_on_as_one(
    program, folder: Path, place: Path, before: str, after: str, method: str, options: list[str]
) -> None:
    """The run that ``before`` processes left in ``place`` ends in ``after`` as the one in ``folder``, with its losses."""
    shutil.copytree(place / before / method, place / after / method)
    done = program(place, after, method, *options)
    assert done.returncode == 0, done.stderr
    one, other = in_one(program, folder, method), place / after / method
    whole, resumed = (json.loads((path / "result.json").read_text()) for path in (one, other))
    torch.testing.assert_close(torch.tensor(whole["accuracy"]), torch.tensor(resumed["accuracy"]), rtol=0, atol=1e-5)
    losses, rest = (json.loads((path / "losses.json").read_text()) for path in (one, other))
    assert rest
    for mine, theirs in zip(losses[-len(rest) :], rest, strict=True):
        assert all(abs(mine[name] - theirs[name]) <= 1e-5 * max(1, abs(mine[name])) for name in mine)


LAST_WORDS = """
import os, sys
import torch.distributed as dist
from cl_methods import ranks
from cl_methods.training.distributed import processes, read_together
from cl_methods.training.identity import check_same_everywhere

def threads():
    return [open(f"/proc/self/task/{task}/comm").read().strip() for task in os.listdir("/proc/self/task")]

def other_options():
    read_together(lambda: {"seed": os.environ["RANK"], "lr": "1"}, dict)

def other_data():
    check_same_everywhere({"scenario_fingerprint": os.environ["RANK"] * 64, "weights": None, "started_from": None})

def wrong_option():
    read_together(lambda: sys.exit(print("what was wrong", file=sys.stderr) or 2), dict)

def interrupted():
    raise KeyboardInterrupt if ranks.first() else ValueError("of the second")

ends = [(lambda: None, ()), (other_options, ValueError), (other_data, ValueError), (wrong_option, ())]
ends += [(interrupted, (KeyboardInterrupt, ValueError))]
for port, (end, expected) in zip(sys.argv[1:], ends, strict=True):
    os.environ["MASTER_PORT"] = port
    try:
        with processes():
            import torch.distributed.fsdp  # as a method may, or torch itself
            import torch.distributed.nn.functional
            ranks.gather_values(ranks.rank())
            assert "pt_gloo_runloop" in threads(), threads()
            end()
    except BaseException as error:
        quietly = isinstance(error, SystemExit) and error.code == 2
        assert isinstance(error, expected) or quietly, repr(error)
        print(error)
    else:
        assert expected == ()
    assert not dist.is_initialized()
    assert "pt_gloo_runloop" not in threads(), threads()
"""


def test_no_thread_of_the_group_outlives_it_however_it_ends():
    """One that does aborts some processes while Python shuts down: it lets go of a tensor then. And what is wrong is said once."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "127.0.0.1"}
    with ExitStack() as reserved:
        ports = [str(reserved.enter_context(reserved_port())) for _ in range(5)]
        started = [
            subprocess.Popen(
                [sys.executable, "-c", LAST_WORDS, *ports],
                env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        said = [process.communicate(timeout=240) for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    out, err = ("".join(texts) for texts in zip(*said, strict=True))
    assert err.count("what was wrong") == 1, err
    seeds = re.findall(
        r"seed: expected the same in every process, got '(\d)' in number \1 and '(\d)' in number \2", out
    )
    assert seeds in ([("0", "1")], [("1", "0")]), out
    assert (
        len(re.findall(r"data: expected the same in every process, got fingerprint (\d)\1{11} in number \1 and", out))
        == 1
    )


def test_torchrun_starts_the_same_command_and_errors_are_said_once(tmp_path):
    """``torchrun`` itself: first a run, then one that may not start."""
    root = PROGRAM.parents[2]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{root}:{root / 'python'}",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "cl_methods.cli",
    ]
    command += [
        "run",
        "--method",
        "ranpac",
        "--limit-tasks",
        "1",
        "--evaluation.split",
        "validation",
        "--evaluation.limit",
        "40",
        "--output",
        tmp_path / "run",
    ]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["environment"]["processes"] == 2
    assert done.stdout.count("zero-shot") == len([line for line in done.stdout.splitlines() if "zero-shot" in line])
    again = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=300)
    assert again.returncode != 0
    assert again.stderr.count("already holds a run") == 1, again.stderr
