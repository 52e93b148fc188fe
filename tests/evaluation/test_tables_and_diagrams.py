"""LaTeX tables, families of splits beside published numbers, stored reliability, bars per task."""

from __future__ import annotations

import csv
import io
import re
from importlib.resources import files

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from rich.console import Console

from cl_methods.evaluation import diagrams, figures
from cl_methods.evaluation.boards import arrange
from cl_methods.evaluation.latex import document, escape, latex
from cl_methods.evaluation.report import compare
from cl_methods.evaluation.results import ResultError, read_result
from cl_methods.evaluation.tables import TextTable, summary_table
from cl_methods.evaluation.uncertainty import calibration_error, reliability


def board_of(*folders):
    (board,), _ = arrange([read_result(folder / "result.json") for folder in folders])
    return board


def mtil_config(**data):
    return {"method": {"name": "finetune"}, "model": "ViT-B-16", "evaluation": {}, "data": data}


def unescaped_specials(text: str) -> list[str]:
    """Characters that LaTeX would take for commands, once what is escaped and the marks of ``escape`` are taken away."""
    text = re.sub(
        r"\\(textbackslash|textasciitilde|textasciicircum|textless|textgreater|textbar|textquotedbl|ldots)\{\}",
        "",
        text,
    )
    text = re.sub(r"\$\\(pm|times|lambda)\$|\\[&%$#_{}]|\{[\[\]*]\}", "", text)
    return re.findall(r'[\\&%$#_{}~^<>|"\[\]*±–…]', text)


def test_latex_escapes_everything_that_is_a_command():
    hostile = r'a_b & 100% $x$ #1 {y} \input{z} ~ ^ <|> [0] *"' + " ± – …"
    assert unescaped_specials(escape(hostile)) == []
    assert unescaped_specials(hostile)
    assert escape(r"\a_1") == r"\textbackslash{}a\_1"
    assert escape("[lr=0.1] *\n\n%") == r"{[}lr=0.1{]} {*} \%"


def test_latex_has_a_cell_for_every_column_and_the_rules_of_booktabs():
    rows = [["chance", "–", "1.0"], ["a_b (x=[1, 2])", "2.0 ± 0.1", "3.0"], ["*c & d", "", "4.0"]]
    table = TextTable("100% of it", ["", "A & B", "C"], rows, breaks=(0, 1, 3), emphasised=frozenset({(1, 1)}))
    lines = latex(table).splitlines()
    assert r"  \begin{tabular}{lrr}" in lines
    assert r"  \caption{100\% of it}" in lines
    cells = [re.split(r"(?<!\\)&", line.removesuffix(r" \\")) for line in lines if line.endswith(r" \\")]
    assert [len(row) for row in cells] == [3] * 4
    assert cells[2][1].strip() == r"\textbf{2.0 $\pm$ 0.1}"
    rules = [line.strip() for line in lines if line.strip().endswith("rule")]
    assert rules == [
        r"\toprule",
        r"\midrule",
        r"\midrule",
        r"\bottomrule",
    ]  # none above the first row or below the last
    text = document([table, table], "one\n\nNote: two\n")
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == 2
    assert [line for line in text.splitlines() if line.startswith("%")][1:] == ["% one", "% Note: two"]


def test_compare_writes_every_table_as_latex_too(write_result, tmp_path):
    folders = [write_result("ft"), write_result("z", method="moe_adapters", scenario="mtil")]
    compare(folders, tmp_path / "out", Console(file=io.StringIO()))
    markdown, tex = (tmp_path / "out" / "table.md").read_text(), (tmp_path / "out" / "table.tex").read_text()
    titles = re.findall(r"^### (.*)$", markdown, re.MULTILINE)
    assert re.findall(r"\\caption\{(.*)\}", tex) == [escape(title) for title in titles]
    assert len(titles) == 10
    assert r"moe\_adapters & 1 & " in tex
    assert "ZSCL (published with ViT-B/16, ZSCL result files, zscl splits)" in tex


@pytest.mark.parametrize("family", ["zscl", "coop"])
@pytest.mark.parametrize("order", ["I", "II"])
def test_no_number_of_another_family_of_splits_stands_unlabelled(write_result, family, order):
    board = board_of(write_result(f"{family}{order}", scenario="mtil", order=order, config=mtil_config(split=family)))
    assert f"{family} splits" in board.title
    with files("cl_methods.evaluation").joinpath("published.csv").open() as file:
        expected = {
            f"{row['method']} (published, {row['source']}, {row['split']} splits)"
            for row in csv.DictReader(file)
            if (row["scenario"], row["order"]) == ("mtil", order)
        }
    labels = {row[0] for row in summary_table(board).rows if "published" in row[0]}
    assert labels == expected
    assert {re.search(r", (\w+) splits\)$", label)[1] for label in labels} == {"zscl", "coop"}


def test_families_of_splits_have_tables_of_their_own(write_result):
    folders = [write_result(family, scenario="mtil", config=mtil_config(split=family)) for family in ("zscl", "coop")]
    boards, _ = arrange([read_result(folder / "result.json") for folder in folders])
    assert [[group.results[0]["path"] for group in board.groups] for board in boards] == [[str(f)] for f in folders]
    few = mtil_config(split="coop", shots=16)
    assert not any(
        "published" in row[0] for row in summary_table(board_of(write_result("few", scenario="mtil", config=few))).rows
    )


@pytest.mark.parametrize("bins", [1, 4, 15])
def test_stored_bins_give_the_calibration_error_of_the_images(bins):
    generator = torch.Generator().manual_seed(bins)
    confidence = torch.rand(257, generator=generator, dtype=torch.float64)
    confidence[:6] = torch.tensor(
        [0.0, 1.0, 0.25, 0.5, 0.75, 1 / 15], dtype=torch.float64
    )  # edges belong to the bin below
    correct = torch.rand(257, generator=generator) < confidence
    found = reliability(confidence, correct, bins)
    inside = [
        (confidence > place / bins) & (confidence <= (place + 1) / bins) | (confidence == 0) * (place == 0)
        for place in range(bins)
    ]
    assert found["count"] == [int(mask.sum()) for mask in inside]
    assert found["correct"] == [int(correct[mask].sum()) for mask in inside]
    assert found["confidence"] == pytest.approx([float(confidence[mask].sum()) for mask in inside], abs=1e-12)
    gaps = np.abs(np.array(found["correct"]) - np.array(found["confidence"])).sum() / 257
    assert gaps == pytest.approx(calibration_error(confidence, correct, bins), abs=1e-12)


def stored(count, correct, confidence):
    return {"count": count, "correct": correct, "confidence": confidence}


def test_reliability_pools_tasks_and_seeds_and_older_results_have_none(write_result):
    task = stored([0, 4], [0, 3], [0.0, 3.2])
    other = stored([2, 2], [1, 2], [0.6, 1.8])
    new = [write_result(f"s{seed}", seed=seed, reliability=[task, other], calibration_error=5.0) for seed in (0, 1)]
    old = write_result("old", seed=2)
    figure = diagrams.reliability(board_of(*new, old))
    (panel,) = [axes for axes in figure.axes if axes.get_visible()]
    assert panel.get_title(loc="left") == "finetune\nECE 5.0"
    heights = [patch.get_height() for patch in panel.patches]
    assert heights[:2] == pytest.approx([1 / 2, 5 / 6])  # right images over images, of both tasks and seeds
    assert heights[2:4] == pytest.approx([0.3 - 1 / 2, 5 / 6 - 5 / 6], abs=1e-12)  # up to the mean confidence
    assert diagrams.reliability(board_of(old)) is None


def test_the_diagram_is_a_file_and_part_of_the_page(write_result, tmp_path):
    task = stored([0, 4], [0, 3], [0.0, 3.2])
    folder = write_result("a", reliability=[task, task], calibration_error=5.0)
    compare([folder], tmp_path / "out", Console(file=io.StringIO()))
    assert (tmp_path / "out" / "reliability.png").is_file()
    assert 'alt="reliability after the last task"' in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    "wrong",
    [
        [stored([1], [1], [0.5])],
        [stored([1], [1], [0.5]), stored([1, 0], [1, 0], [0.5, 0.0])],
        [stored([1], [1], [0.5]), {"count": [1], "correct": [1]}],
        [stored([], [], []), stored([], [], [])],
    ],
    ids=["one task of two", "other bins", "no confidence", "no bins"],
)
def test_reliability_that_does_not_fit_is_refused(write_result, wrong):
    folder = write_result("bad", reliability=wrong)
    with pytest.raises(ResultError, match=r"bad/result\.json: reliability has .* expected one for each of 2 tasks"):
        read_result(folder / "result.json")


def test_bars_are_transfer_average_and_last_of_each_task(write_result):
    board = board_of(write_result("ft"), write_result("j", method="joint", accuracy=[[91.0, 97.0]] * 2))
    panels = diagrams.bars(board).axes
    heights = [[patch.get_height() for patch in panel.patches] for panel in panels]
    assert np.isnan(heights[0][0])
    assert heights[0][1:] == [40.0]
    assert heights[1] == [85.0, 67.5]
    assert heights[2] == [80.0, 95.0, 91.0, 97.0]


def test_titles_stay_inside_their_figures(write_result):
    """The longest that a heading becomes, over figures as narrow as one method and two tasks make them."""
    bins = {"count": [3] * 15, "correct": [2] * 15, "confidence": [1.5] * 15}
    config = {
        "method": {"name": "zscl"}, "model": "ViT-B-16-quickgelu", "data": {"split": "coop", "shots": 16},
        "evaluation": {"label_space": "all", "split": "validation"},
    }  # fmt: skip
    evaluated = {"limit": 200, "images": [200, 200], "available": [400, 400]}
    board = board_of(
        write_result("a", method="zscl", scenario="mtil", config=config, reliability=[bins] * 2, evaluated=evaluated)
    )
    assert len(board.title) > 120
    drawn = (figures.accuracy_over_time, figures.summary, figures.matrix, diagrams.bars, diagrams.reliability)
    for figure in (draw(board) for draw in drawn):
        FigureCanvasAgg(figure).draw()
        (title,) = [text for text in figure.texts if text.get_text().startswith("mtil")]
        box = title.get_window_extent()
        assert figure.bbox.x0 <= box.x0
        assert box.x1 <= figure.bbox.x1
        assert all(box.y0 >= panel.get_window_extent().y1 for panel in figure.axes)


@pytest.mark.parametrize("length", [1, 12, 60])
def test_legends_stay_inside_their_figures(write_result, length):
    folders = [write_result(f"{n}", method="finetune", settings={"w" * length: n / 8}) for n in range(6)]
    board = board_of(*folders)
    for figure in (figures.accuracy_over_time(board), diagrams.bars(board)):
        FigureCanvasAgg(figure).draw()
        (legend,) = figure.legends
        box = legend.get_window_extent()
        assert figure.bbox.x0 <= box.x0
        assert box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0
