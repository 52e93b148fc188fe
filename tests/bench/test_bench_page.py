"""The page of a history: what it says, and how it looks in a real browser."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from cl_methods.bench import figures, history
from cl_methods.bench.page import write_page
from cl_methods.bench.record import Record
from cl_methods.bench.rows import OURS, Row, Samples
from cl_methods.cli import main

sys.path.insert(0, str(Path(__file__).parents[1] / "evaluation"))


def records() -> list[Record]:
    """Four records of twelve cases with long names, the last one slower in one case; and one of another machine."""
    made = []
    for day in range(1, 5):
        rows = []
        for number in range(12):
            case = f"a step of a method with a rather long name, number {number}, batch 64, 15,840 captions"
            slower = 1.6 if day == 4 and number == 3 else 1.0
            exact = {"operations": 400 + number, "flops": 10**12, "synchronisations": 0}
            seconds = 0.1 * (1 + 0.01 * day) * slower
            rows.append(Row(case, OURS, exact, {"seconds": Samples(seconds, seconds * 1.02, 5)}))
            peer = {"operations": 4000, "flops": 7 * 10**12, "synchronisations": 25}
            rows.append(Row(case, "public procedure", peer, {"seconds": Samples(0.3, 0.31, 5)}))
        versions = {"python": "3.11", "torch": "2.13.0"}
        setting = {"model": "ViT-B-16", "threads": 2}
        date = f"2026-01-0{day}T00:00:00+00:00"
        made.append(Record("step", setting, "a <fast> machine, 2 cores", versions, f"{day}" * 40, day == 2, date, rows))
    return [*made, replace(made[0], machine="another machine")]


def test_the_page_says_what_changed(tmp_path: Path) -> None:
    pictures = write_page(records(), tmp_path / "history.html")
    page = (tmp_path / "history.html").read_text()
    assert [picture.name for picture in pictures] == [
        "history-1-peers.png",
        "history-1-time.png",
        "history-2-peers.png",
    ]
    assert "a &lt;fast&gt; machine" in page
    assert len(re.findall(r'<li class="worse">', page)) == 1
    assert re.search(r"number 3, batch 64, 15,840 captions: \+61\.\d%, slower beside public procedure", page)
    assert "The first record: nothing to compare with." in page
    assert not re.search(r"https?:|@import|url\(", re.sub(r'src="data:image/png;base64,[^"]*"', "", page))


def test_times_are_drawn_beside_the_peer() -> None:
    """A machine that is slower today moves no line."""
    before, *_ = records()
    slow = [
        replace(row, measured={"seconds": Samples(2 * row.measured["seconds"].best, 1.0, 5)}) for row in before.rows
    ]
    figure = figures.over_time([before, replace(before, rows=slow)])
    times = next(panel for panel in figure.axes if panel.get_title(loc="left").startswith("time"))
    assert all(line.get_ydata() == pytest.approx([1, 1]) for line in times.get_lines()[:-1])


def test_nothing_to_draw_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.jsonl").touch()
    call = ["bench", "--history", str(tmp_path / "empty.jsonl"), "--page", str(tmp_path / "page.html")]
    assert main(call) == 2
    assert "there is no record to draw" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


@pytest.mark.chromium
def test_nothing_is_cut_off_in_a_browser(tmp_path: Path) -> None:
    from test_page import seen  # the measuring browser of the comparison's page

    path = tmp_path / "history.jsonl"
    for record in records():
        history.append(record, path)
    assert main(["bench", "--history", str(path), "--page", str(tmp_path / "page.html")]) == 0
    for frame in seen(tmp_path, (tmp_path / "page.html").read_text()):
        assert frame["out"] == []
        assert frame["scroll"] <= frame["width"]
        assert frame["loaded"] == []
        assert frame["tables"] == 2
        assert len(frame["pictures"]) == 3
        assert all(complete and natural > 600 and shown > 700 for complete, natural, shown in frame["pictures"])
    with Image.open(tmp_path / "page-1-time.png") as image:
        assert image.size[0] > 1000
