"""The page of a comparison in a real browser: nothing cut off, every picture shown, nothing asked of a network."""

from __future__ import annotations

import html
import io
import json
import re
import shutil
import subprocess

import pytest
from PIL import Image
from rich.console import Console

from cl_methods.evaluation.report import compare

pytestmark = pytest.mark.chromium
WIDTHS = (1280, 400)
# What sticks out of the window, unless it scrolls in a box that does not; and whatever was loaded besides data: URLs.
_MEASURE = """
<script>
addEventListener("load", () => {
  const found = [...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument, root = page.documentElement, width = frame.contentWindow.innerWidth;
    const scrolls = element => element.closest(".wide") !== null && !element.classList.contains("wide");
    const out = [...page.body.querySelectorAll("*")].filter(element => {
      const box = element.getBoundingClientRect();
      return !scrolls(element) && (box.right > width + 0.5 || box.left < -0.5);
    });
    const loaded = frame.contentWindow.performance.getEntriesByType("resource").map(entry => entry.name);
    return {
      width, scroll: root.scrollWidth, out: out.map(element => element.outerHTML.slice(0, 80)),
      pictures: [...page.images].map(image => [image.complete, image.naturalWidth, image.clientWidth]),
      tables: page.querySelectorAll(".wide > table").length,
      loaded: loaded.filter(name => !name.startsWith("data:")),
    };
  });
  document.body.innerHTML = "";
  document.body.dataset.found = JSON.stringify(found);
});
</script>
"""


def chromium(folder, *arguments):
    command = [shutil.which("chromium"), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
               "--disable-dev-shm-usage", f"--user-data-dir={folder / 'profile'}",
               "--host-resolver-rules=MAP * ~NOTFOUND", *arguments]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def seen(folder, page):
    """The page in frames of the widths; one browser measures both, since a window may not be as narrow as 400 pixels."""
    frames = "".join(f'<iframe width="{width}" height="900" style="border:0" srcdoc="{html.escape(page)}"></iframe>'
                     for width in WIDTHS)  # fmt: skip
    outer = folder / "measure.html"
    outer.write_text(f'<!doctype html><meta charset="utf-8"><body>{frames}{_MEASURE}</body>')
    dom = chromium(folder, "--dump-dom", outer.as_uri())
    return json.loads(html.unescape(re.search(r'data-found="([^"]*)"', dom)[1]))


@pytest.fixture(scope="module")
def report(write_module_result):
    """A comparison of two scenarios with eleven tasks of long names, several methods and long paths."""
    names = [f"a_rather_long_name_{number}" for number in range(11)]
    accuracy = [[40.0 + row + column for column in range(11)] for row in range(11)]
    bins = {"count": [3] * 15, "correct": [2] * 15, "confidence": [3 * (place + 0.5) / 15 for place in range(15)]}
    common = {"tasks": names, "chance": [1.0] * 11, "zero_shot": [45.0] * 11, "accuracy": accuracy}
    folders = [
        write_module_result(f"{scenario}/{'long_directory_' * 10}/{method}{lr}", method=method, scenario=scenario,
                     settings={"lr": lr, "text_encoder_frozen_until_the_last_task": lr > 1},
                     reliability=[bins] * 11, calibration_error=4.0, **common)
        for scenario in ("mini", "mtil") for method in ("finetune", "zscl") for lr in (0.001, 5.0)
    ]  # fmt: skip
    compare(folders, write_module_result.folder / "out", Console(file=io.StringIO()))
    return write_module_result.folder / "out"


def test_nothing_is_cut_off_and_nothing_is_loaded(report, tmp_path):
    page = (report / "report.html").read_text()
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r'src="data:image/png;base64,[^"]*"', "", page))
    found = seen(tmp_path, page)
    assert [frame["width"] for frame in found] == list(WIDTHS)
    for frame in found:
        assert frame["out"] == []
        assert frame["scroll"] <= frame["width"]
        assert frame["loaded"] == []
        assert frame["tables"] == 10
        assert len(frame["pictures"]) == 10
        for complete, natural, shown in frame["pictures"]:
            assert complete
            assert natural > 600
            assert 0.5 * frame["width"] < shown <= frame["width"]


def test_the_measurement_finds_what_is_wrong(tmp_path):
    wide = '<body><p id="long" style="width: 900px">text</p><img src="https://example.org/picture.png"></body>'
    desktop, phone = seen(tmp_path, wide)
    assert desktop["out"] == []
    assert phone["scroll"] > phone["width"]
    assert any('id="long"' in element for element in phone["out"])
    assert phone["loaded"] == ["https://example.org/picture.png"]
    assert phone["pictures"][0][1] == 0


def test_the_page_is_drawn(report, tmp_path):
    picture = tmp_path / "page.png"
    chromium(tmp_path, "--window-size=1280,3000", f"--screenshot={picture}", (report / "report.html").as_uri())
    with Image.open(picture) as image:
        assert image.size[0] == 1280
        pixels = image.convert("RGB")
        assert len(pixels.getcolors(2**24)) > 200
        margins = [pixels.crop((0, 0, 8, 3000)), pixels.crop((1272, 0, 1280, 3000))]
        assert all(margin.getcolors() == [(8 * 3000, (255, 255, 255))] for margin in margins)
