"""docs/reproduce.md as it is written: every command of it, over miniatures in place of the datasets and a small model."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from miniatures import ORIGINALS, write, write_coop
from safetensors.torch import save_file
from tiny_clip import open_clip

from cl_methods.cli import main
from cl_methods.commands.configuration import parse
from cl_methods.commands.series import expand, parse_series
from cl_methods.datasets.specification import DATASETS

PAGE = Path(__file__).parents[2] / "docs" / "reproduce.md"
SIDE = 64
LIMITS = [
    "--data.sizes",
    "any",
    "--limit-tasks",
    "3",
    "--evaluation.limit",
    "11",
    "--limit-iterations",
    "2",
    "--device",
    "cpu",
]
SHORT = {
    "moe_adapters": ["--method.ddas.iterations", "3", "--method.ddas.generic-iterations", "3"],
    "diki": ["--method.epochs", "1"],
}


def commands() -> list[list[str]]:
    """The arguments of every ``clk`` in the page's blocks and tables of commands, after a shell has expanded them."""
    text = PAGE.read_text()
    (block,) = [found for found in re.findall(r"```\n(.*?)```", text, re.DOTALL) if "clk run" in found]
    script = re.sub(r" {2,}\d {2}\S.*$", "", block, flags=re.MULTILINE)  # the numbers and what they say
    single = re.findall(r"`(clk evaluate [^`]*)`", text)
    shell = f'clk() {{ printf "%s\\n" "$(printf "%q " "$@")"; }}\n{script}\n' + "\n".join(single)
    done = subprocess.run(["bash", "-euc", shell], capture_output=True, text=True, check=True)
    return [shlex.split(line) for line in done.stdout.splitlines()]


def test_the_commands_are_found() -> None:
    verbs = [" ".join(line[: 2 if line[0] == "data" else 1]) for line in commands()]
    assert verbs == [*["data check"] * 3, "plan", *["run"] * 4, "compare", *["evaluate"] * 3]


@pytest.mark.parametrize(
    "line", [line for line in commands() if line[0] == "run"], ids=lambda line: " ".join(line)[-60:]
)
def test_options_of_every_run_exist(line: list[str]) -> None:
    lines = expand(line[1:])
    if len(lines) == 1:
        config, _ = parse(line[1:], "")
        assert config.scenario == "mtil"
        return
    runs, folder = parse_series(lines, "")
    methods = [(config.method, config.order) for config, _, _ in runs]
    assert len(set(methods)) == len(methods) == 12
    assert folder == Path("runs/zscl-table")


def small_model(folder: Path) -> Path:
    """A CLIP of one layer with random weights, as a folder of open_clip."""
    folder.mkdir()
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": SIDE, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    torch.manual_seed(0)
    save_file(open_clip.CLIP(**config).state_dict(), folder / "open_clip_model.safetensors")
    return folder


def lay_out(folder: Path) -> None:
    """What the page's first block wants to be there, in small."""
    from torchvision.models import alexnet

    data = folder / "data"
    for name, write_original in ORIGINALS.items():
        write_original(data)
        if DATASETS[name].split_file is not None:
            write_coop(data, name)
    rows = ["title\tfilepath"]
    for number in range(12):
        write(data / "imagenet" / "train" / f"n{number // 4:08d}" / f"{number}.JPEG", number, 0)
        write(data / "captions" / f"{number}.jpg", number, 1)
        rows.append(f"a thing of kind {number}\tcaptions/{number}.jpg")
    (data / "Validation_GCC.csv").write_text("\n".join(rows) + "\n")
    torch.manual_seed(0)
    torch.save(alexnet().state_dict(), folder / "alexnet.pth")


def replaced(line: list[str], folder: Path, model: Path) -> list[str]:
    """Paths, limits and the model are those of the test; nothing else changes."""
    verb, given = line[0], [part.replace("/data", str(folder / "data"), 1) for part in line]
    given = [str(folder / part) if part == "alexnet.pth" else part for part in given]
    while "--pretrained" in given:
        place = given.index("--pretrained")
        given[place : place + 2] = ["--model", f"local-dir:{model}"]
    if "--workers" in given:
        given[given.index("--workers") + 1] = "0"
    if verb == "data":
        given += ["--sizes", "any"]
    if verb in ("run", "plan"):
        given += LIMITS + SHORT.get(given[given.index("--method") + 1], [])
    return given


@pytest.mark.slow
def test_every_command_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    lay_out(tmp_path)
    model = small_model(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    for line in commands():
        given = replaced(line, tmp_path, model)
        status, output = main(given), capsys.readouterr()
        assert status == 0, (shlex.join(given), output.out[-3000:], output.err[-3000:])
    page = (tmp_path / "report" / "table.md").read_text()
    for method in ("finetune", "lwf", "icarl", "lwf_vr", "wise_ft", "zscl", "moe_adapters", "diki"):
        assert re.search(rf"^\| {method} ", page, re.MULTILINE), method
    for order in ("I", "II"):
        assert f"mtil, order {order}" in page
    assert (tmp_path / "report" / "report.html").is_file()
