"""Text made to do harm: configurations, names of methods, tasks and classes, results. It is data, and shown as such."""

from __future__ import annotations

import io
import json
import re

import pytest
import yaml
from rich.console import Console

from cl_methods.backbone import prompt
from cl_methods.cli import main
from cl_methods.commands.configuration import ConfigurationError, parse
from cl_methods.evaluation.metrics import forgetting, mtil_metrics
from cl_methods.evaluation.report import compare, write_run_report
from cl_methods.evaluation.results import ResultError, read_result
from cl_methods.methods.find import find_method, named_in_data
from cl_methods.scenarios.folder_texts import class_names, read_templates
from cl_methods.text import printable
from cl_methods.training.progress import PlainProgress, RichProgress

NAMES = {
    "script": "<script>alert(1)</script>",
    "attribute": "\"><img src=x onerror='alert(1)'>",
    "braces": "{0.__class__.__init__.__globals__} {} %s",
    "path": "../../../../tmp/cl_kernels_evil",
    "terminal": "\x1b]0;owned\x07\x1b[2J\x9b31m",
    "markup": "[/bold][link=file:///etc/passwd]click[/link][",
    "formula": r"$\undefined{$ $\frac{$",
    "latex": r"\input{/etc/passwd} \write18{touch evil}",
    "direction": "safe\u202egnp.exe",
    "table": "a | b\n| --- |\n<b>",
}


@pytest.fixture
def evil_method(tmp_path):
    """A method in a file that tells when it is run."""
    path = tmp_path / "evil.py"
    path.write_text(f"from pathlib import Path\nPath({str(tmp_path / 'executed')!r}).touch()\n")
    yield f"{path}:Evil"
    assert not (tmp_path / "executed").exists(), "code that a file names was executed"


def config_of(tmp_path, text: str) -> list[str]:
    (tmp_path / "config.yaml").write_text(text)
    return ["--config", str(tmp_path / "config.yaml")]


@pytest.mark.parametrize("form", ["method: {}", "method:\n  name: {}"])
def test_a_configuration_cannot_have_code_run(tmp_path, evil_method, form):
    with pytest.raises(ConfigurationError, match=r"config\.yaml names code, .*ask for it yourself with --method"):
        parse(config_of(tmp_path, form.format(evil_method)), "")


def test_code_is_run_on_request_only(tmp_path, evil_method):
    for name in (evil_method, "os:system", "evil:Evil"):
        with pytest.raises(ValueError, match="which a file may not have run"):
            named_in_data(name, "a file")
    own = tmp_path / "own.py"
    own.write_text("from cl_methods.methods.finetune import FineTune as Base\n\nclass Own(Base):\n    name = 'own'\n")
    assert find_method(f"{own}:Own") is named_in_data(f"{own}:Own", "a file")


def test_a_run_directory_cannot_have_code_run_by_export(tmp_path, evil_method, capsys):
    (tmp_path / "run").mkdir()
    assert main(["run", "--limit-tasks", "1", "--limit-iterations", "1", "--method", "finetune", "--evaluation.limit", "4",
                 "--output", str(tmp_path / "run")]) == 0  # fmt: skip
    description = json.loads((tmp_path / "run" / "run.json").read_text())
    description["config"]["method"] = {"name": evil_method}
    (tmp_path / "run" / "run.json").write_text(json.dumps(description))
    assert main(["export", str(tmp_path / "run"), "--output", str(tmp_path / "out")]) == 2
    assert "names code" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['touch executed']",
        "seed: !!python/object/new:subprocess.Popen [[touch, executed]]",
        "seed: !!python/name:os.system",
        "seed: 1\n--- second\n",
    ],
)
def test_yaml_tags_build_nothing(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError, match="is not valid YAML"):
        parse(config_of(tmp_path, text), "")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "text",
    [
        "output: ../../outside",
        "scenario: ../../outside",
        "method: ../../outside",
        "__class__: x",
        "data: {__init__: {__globals__: {}}}",
        "checkpoint: {every: {}, keep: ../..}",
    ],
)
def test_configurations_name_known_things_only(tmp_path, text):
    with pytest.raises(ConfigurationError):
        parse(config_of(tmp_path, text), "")


def write_result(folder, name: str, **changes):
    tasks = list(NAMES.values())
    accuracy = [[float(50 + column - row) for column in range(len(tasks))] for row in range(len(tasks))]
    metrics = mtil_metrics(accuracy)
    result = {
        "method": name, "scenario": name, "order": name, "seed": 0, "continual": True, "tasks": tasks,
        "chance": [10.0] * len(tasks), "zero_shot": [50.0] * len(tasks), "accuracy": accuracy, "transfer": metrics["transfer"],
        "average": metrics["average"], "last": metrics["last"], "forgetting": forgetting(accuracy),
        "train": {"seconds": 1.0, "samples_per_second": 1.0, "peak_memory_bytes": 1, "trainable_parameters": 1},
        "environment": {"torch": name, name: name},
        "config": {"method": {"name": name, name: name}, "model": name, "evaluation": {"label_space": "task", "split": name}},
        **changes,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(result))
    return folder


@pytest.mark.parametrize("name", [NAMES["script"], NAMES["formula"], NAMES["terminal"] + NAMES["markup"]])
def test_names_in_results_are_shown_and_not_obeyed(tmp_path, name):
    run = write_result(tmp_path / "runs" / "one", name)
    before = set(tmp_path.rglob("*"))
    stream = io.StringIO()
    compare([run], tmp_path / "report", Console(file=stream, width=200))
    write_run_report(read_result(run / "result.json"), tmp_path / "report", Console(file=stream, width=200))
    assert "\x1b]" not in stream.getvalue()
    assert "\x1b[2J" not in stream.getvalue()
    page = (tmp_path / "report" / "report.html").read_text()
    assert not re.search(r"<(script|img src=x|b>)", page)
    written = {path.name for path in tmp_path.rglob("*") if path not in before and path.is_file()}
    assert {"report.html", "table.md", "table.tex"} <= written
    assert all(re.fullmatch(r"[a-z-]+\.(html|md|tex|png)", entry) for entry in written)
    for text in (page, *((tmp_path / "report" / each).read_text() for each in ("table.md", "table.tex", "report.md"))):
        assert not set(text) & {"\x1b", "\x9b", "\x07", "\u202e"}
    tables = (tmp_path / "report" / "table.md").read_text() + (tmp_path / "report" / "report.md").read_text()
    assert not re.search(r"<(script|img|b>)", tables)
    rows = [line for line in tables.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in rows)
    latex = (tmp_path / "report" / "table.tex").read_text()
    assert r"\input" not in latex
    assert r"\write" not in latex


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_names_in_logs_are_shown_and_not_obeyed(name):
    stream, terminal = io.StringIO(), io.StringIO()
    console = Console(file=terminal, force_terminal=True, width=200, color_system=None)
    for progress in (PlainProgress(stream), RichProgress(console)):
        with progress:
            progress.run_started("zscl", "mini", 1, [1])
            progress.task_started(name, 1, 1, 1, 0)
            progress.evaluation_started(f"after {name}", 1)
            progress.evaluated(name, 50.0)
            progress.row_finished(f"after {name}", [50.0])
            progress.note(f"resuming after task {name}")
    for text in (stream.getvalue(), terminal.getvalue()):
        assert not set(text) & {"\x9b", "\x07", "\u202e"}
        assert "\x1b]" not in text
        assert "\x1b[2J" not in text
        assert printable(name.split("\n")[0]) in text


WRONG = {
    "tasks that are numbers": {"tasks": [1, 2]},
    "a method that is a mapping": {"method": {"name": "zscl"}},
    "a seed that is text": {"seed": "<script>"},
    "accuracies that are text": {"accuracy": [["a", "b"], ["c", "d"]]},
    "an environment that is a list": {"environment": ["<script>"]},
    "a matrix of another shape": {"accuracy": [[1.0]]},
}


@pytest.mark.parametrize("changes", WRONG.values(), ids=WRONG)
def test_results_of_other_types_are_refused(tmp_path, changes):
    run = write_result(tmp_path / "run", "zscl", **changes)
    with pytest.raises(ResultError, match=r"result\.json"):
        read_result(run / "result.json")


def test_a_result_that_is_nested_too_deep_is_refused(tmp_path):
    (tmp_path / "result.json").write_text("[" * 200_000)
    with pytest.raises(ResultError, match="is not valid JSON"):
        read_result(tmp_path / "result.json")


def test_class_names_and_templates_are_never_format_strings(tmp_path):

    for name in NAMES.values():
        assert prompt("a photo of a {}.", name) == f"a photo of a {name}."
    (tmp_path / "templates.txt").write_text("a {} of {0.__class__.__init__.__globals__} {:>99999999999}\n")
    (template,) = read_templates(tmp_path, tmp_path)
    assert prompt(template, "cat") == "a cat of {0.__class__.__init__.__globals__} {:>99999999999}"
    classes = ["{0.__class__}", "%s", "$(touch evil)"]
    assert class_names(tmp_path, classes) == ("{0. class }", "%s", "$(touch evil)")


def test_a_bomb_of_aliases_stays_small(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    assert len(yaml.safe_load("\n".join(lines))) == 9
    with pytest.raises(ConfigurationError) as caught:
        parse(config_of(tmp_path, "\n".join(lines)), "")
    assert len(str(caught.value)) < 10_000
