"""Comparing runs: grouping over seeds, what may not stand in one table, values, files."""

from __future__ import annotations

import io
import re
import statistics

import pytest
from PIL import Image
from rich.console import Console

from cl_methods.evaluation.boards import arrange
from cl_methods.evaluation.published import published
from cl_methods.evaluation.report import compare
from cl_methods.evaluation.results import ResultError, find_results, read_result
from cl_methods.evaluation.tables import matrix_table, summary_table


def boards_of(*folders):
    return arrange([read_result(path) for path in find_results(folders)])


def row_of(table, label):
    return next(row for row in table.rows if row[0] == label)


def test_seeds_become_mean_and_spread(write_result):
    last = [90.0, 92.0, 97.0]
    folders = [write_result(f"s{seed}", seed=seed, accuracy=[[90.0, 40.0 + seed], [80.0, value]])
               for seed, value in enumerate(last)]  # fmt: skip
    (board,), notes = boards_of(*folders)
    row = row_of(summary_table(board), "finetune")
    means = [(80 + value) / 2 for value in last]
    assert row[1] == "3"
    assert row[2] == "41.0 ± 1.0"
    assert row[4] == f"{statistics.mean(means):.1f} ± {statistics.stdev(means):.1f}"
    assert not notes


def test_chance_zero_shot_and_joint_stand_beside_the_methods(write_result):
    folders = [write_result("ft"), write_result("joint", method="joint"), write_result("zs", method="zero_shot")]
    (board,), _ = boards_of(*folders)
    table = summary_table(board)
    assert row_of(table, "chance")[2:5] == ["20.0", "15.0", "15.0"]
    assert row_of(table, "zero-shot")[2:5] == ["60.0", "55.0", "55.0"]
    assert row_of(table, "joint (bound)")[2:] == ["–", "76.2", "87.5", "–", "–"]
    assert [row[0] for row in table.rows] == ["chance", "zero-shot", "finetune", "joint (bound)"]


def test_calibration_errors_stand_in_a_column_of_their_own(write_result):
    for seed, error in ((0, 4.0), (1, 6.0)):
        rows = [[10.0, 12.0], [3.0, 5.0], [error, error]]
        write_result(f"zscl{seed}", seed=seed, calibration_error=error, calibration_error_per_row=rows)
    (board,), _ = boards_of(*(write_result.folder.glob("zscl*")))
    table = summary_table(board)
    assert table.columns[-1] == "ECE"
    assert row_of(table, "finetune")[-1] == "5.0 ± 1.4"
    assert row_of(table, "zero-shot")[-1] == "11.0"


def test_the_best_of_each_column_is_emphasised_among_continual_methods(write_result):
    better = [[90.0, 60.0], [70.0, 95.0]]
    folders = [write_result("ft"), write_result("z", method="zscl", accuracy=better), write_result("j", method="joint")]
    (board,), _ = boards_of(*folders)
    table = summary_table(board)
    cells = {(table.rows[row][0], table.columns[column]) for row, column in table.emphasised}
    assert cells == {("zscl", "Transfer"), ("zscl", "Average"), ("finetune", "Last")}
    assert "**60.0**" in table.markdown()


def test_other_settings_are_another_row_that_names_them(write_result):
    (board,), _ = boards_of(write_result("a"), write_result("b", settings={"lr": 0.2}), write_result("c", seed=1))
    assert [(group.label, len(group.results)) for group in board.groups] == [
        ("finetune (lr=0.1)", 2),
        ("finetune (lr=0.2)", 1),
    ]


def test_the_same_run_twice_counts_once(write_result):
    (board,), notes = boards_of(write_result("a"), write_result("copy"))
    assert len(board.groups[0].results) == 1
    assert "same method, settings and seed" in notes[0]


def test_scenarios_orders_and_label_spaces_are_never_mixed(write_result):
    other_space = {"method": {"name": "finetune", "lr": 0.1}, "model": "mini", "evaluation": {"label_space": "all"}}
    boards, _ = boards_of(
        write_result("a"),
        write_result("b", scenario="mtil"),
        write_result("c", order="II"),
        write_result("d", config=other_space),
        write_result("e", scenario_fingerprint="abc"),
    )
    assert len(boards) == 5


def test_label_spaces_of_one_run_get_a_table_each(write_result):
    seen = {"zero_shot": [30.0, 35.0], "accuracy": [[90.0, 30.0], [60.0, 70.0]], "last": 65.0, "chance": [5.0, 5.0]}
    evaluation = {"label_space": ["task", "seen"], "split": "test"}
    config = {"method": {"name": "finetune", "lr": 0.1}, "model": "mini", "evaluation": evaluation}
    several = write_result("a", config=config, label_spaces={"seen": seen})
    alone = write_result("b", seed=1)
    (task, other), notes = boards_of(several, alone)
    assert [len(task.groups[0].results), len(other.groups[0].results)] == [2, 1]
    assert other.title == "mini, order I (label space seen)"
    assert (other.zero_shot, other.chance) == ([30.0, 35.0], [5.0, 5.0])
    assert row_of(summary_table(other), "finetune")[4] == "65.0"
    assert not notes


def test_limited_evaluations_never_stand_beside_whole_ones(write_result):
    def evaluated(images):
        return {"evaluated": {"limit": 50, "images": images, "available": [1000, 50]}, "scenario": "mtil"}

    part, whole = write_result("part", **evaluated([50, 50])), write_result("whole", seed=1, **evaluated([1000, 50]))
    before = write_result("before", seed=2, scenario="mtil")
    (limited, full), notes = boards_of(part, whole, before)
    assert len(full.groups[0].results) == 2
    assert "at most 50 images per task" in limited.title
    assert not any("published" in row[0] for row in summary_table(limited).rows)
    assert any("published" in row[0] for row in summary_table(full).rows)
    assert notes == [f"{part} was evaluated on at most 50 images per task; it is not compared with whole test sets"]


def test_published_numbers_stand_beside_mtil_only(write_result):
    (mini,), _ = boards_of(write_result("a"))
    (mtil,), _ = boards_of(write_result("b", scenario="mtil"))
    assert not any("published" in row[0] for row in summary_table(mini).rows)
    rows = {row[0]: row for row in summary_table(mtil).rows}
    assert rows["ZSCL (published with ViT-B/16, ZSCL result files, zscl splits)"][2:5] == ["68.1", "75.4", "83.6"]
    assert rows["DIKI (published with ViT-B/16, DPW tables E.3-E.4, coop splits)"][2:5] == ["68.7", "76.3", "85.1"]
    second = {entry.method: entry for entry in published("mtil", "II")}
    assert (second["ZSCL"].transfer, second["ZSCL"].last) == (64.2, 83.4)
    assert published("mini", "I") == []


def test_published_numbers_are_of_known_tasks_and_test_images(write_result):
    """Where all classes compete, or validation images are measured, they would be read as comparable and are not."""
    for name, evaluation in (("all", {"label_space": "all"}), ("held", {"split": "validation"})):
        config = {"method": {"name": "zscl"}, "model": "ViT-B-16", "evaluation": evaluation}
        (board,), _ = boards_of(write_result(name, scenario="mtil", config=config))
        assert not any("published" in row[0] for row in summary_table(board).rows)


def xtail_config(**changes):
    evaluation, data = {"label_space": "all"}, {"split": "coop", "shots": 16}
    values = {"model": "ViT-B-16", "evaluation": evaluation, "data": data, **changes}
    return {"method": {"name": "ranpac"}, **values}


def test_published_numbers_of_x_tail_stand_beside_its_own_protocol_only(write_result):
    """Sixteen shots, the classes of all tasks; never beside MTIL's numbers, whose tasks are known."""
    (board,), _ = boards_of(write_result("x", scenario="xtail", config=xtail_config()))
    rows = {row[0]: row for row in summary_table(board).rows if "published" in row[0]}
    assert "label space all" in board.title
    assert rows["CoDyRA (published, CoDyRA project page, coop splits)"][2:5] == ["63.2", "71.3", "79.2"]
    assert rows["MoRAM (published, MoRAM repository, coop splits)"][2:5] == ["63.3", "72.7", "80.9"]
    assert len(rows) == len(published("xtail", "I"))
    assert not any("ZSCL result files" in label for label in rows)
    others = {
        "task": {"evaluation": {"label_space": "task"}},
        "five": {"data": {"split": "coop", "shots": 5}},
        "whole": {"data": {"split": "coop"}},
    }
    for name, changes in others.items():
        (board,), _ = boards_of(write_result(name, scenario="xtail", config=xtail_config(**changes)))
        assert not any("published" in row[0] for row in summary_table(board).rows), name


def test_files_are_complete_and_the_page_is_self_contained(write_result, tmp_path):
    folders = [write_result("ft"), write_result("z", method="zscl", seed=1), write_result("j", method="joint")]
    text = io.StringIO()
    compare(folders, tmp_path / "out", Console(file=text))
    assert "zscl" in text.getvalue()
    for name in ("accuracy.png", "summary.png", "matrix.png", "tasks.png"):
        with Image.open(tmp_path / "out" / name) as image:
            assert image.size[0] > 600
            assert len(image.convert("RGB").getcolors(2**24)) > 50
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == 4
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "http" not in page
    assert "<script" not in page
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| finetune | 1 | **40.0** |" in table
    assert "### Transfer per task, mini, order I" in table


def test_a_directory_of_runs_stands_for_the_runs_in_it(write_result, tmp_path):
    write_result("runs/a")
    write_result("runs/b", seed=1)
    assert len(find_results([tmp_path / "runs", tmp_path / "runs" / "a"])) == 2


def test_errors_name_the_run_and_say_what_to_do(write_result, tmp_path):
    with pytest.raises(ResultError, match="nowhere is not a directory"):
        find_results([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ResultError, match=r"empty holds no result\.json"):
        find_results([tmp_path / "empty"])
    (tmp_path / "empty" / "run.json").write_text("{}")
    with pytest.raises(ResultError, match=r"not complete; finish it with `clk run --resume"):
        find_results([tmp_path / "empty"])
    folder = write_result("bad", accuracy=[[1.0, 2.0], [3.0, 4.0]], tasks=["one", "two", "three"])
    with pytest.raises(ResultError, match=r"accuracy has shape \(2, 2\)"):
        read_result(folder / "result.json")
    (folder / "result.json").write_text('{"method": 3}')
    with pytest.raises(ResultError, match="lacks scenario, seed"):
        read_result(folder / "result.json")
    (folder / "result.json").write_text("{")
    with pytest.raises(ResultError, match="not valid JSON"):
        read_result(folder / "result.json")


def test_the_matrix_of_one_run(write_result):
    learnt = matrix_table(read_result(write_result("a") / "result.json"))
    assert [row[0] for row in learnt.rows] == ["chance", "zero-shot", "after first", "after second"]
    assert learnt.rows[2][1:] == ["90.0", "40.0", "65.0"]
    assert learnt.emphasised == {(2, 1), (3, 2)}
    frozen = write_result("b", method="zero_shot", accuracy=[[50.0, 60.0], [50.0, 60.0]])
    assert [row[0] for row in matrix_table(read_result(frozen / "result.json")).rows] == ["chance", "zero-shot"]
    joint = matrix_table(read_result(write_result("c", method="joint") / "result.json"))
    assert [row[0] for row in joint.rows] == ["chance", "zero-shot", "all tasks at once"]
