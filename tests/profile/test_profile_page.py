"""The page of a profile in a real browser: nothing cut off, nothing loaded, and nothing that comes from data is markup."""

from __future__ import annotations

import importlib.util
import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import nn

from cl_kernels.profile import Spread, Trust, profile_adapter
from cl_methods.profiling.report import write

_FILE = Path(__file__).parents[1] / "evaluation" / "test_page.py"  # how a browser measures a page
_SPECIFICATION = importlib.util.spec_from_file_location("browser_measurement", _FILE)
browser = importlib.util.module_from_spec(_SPECIFICATION)
_SPECIFICATION.loader.exec_module(browser)

ATTACK = '<script>document.title = "owned"</script>'


class Adapted(nn.Module):
    def __init__(self, inner, adapter):
        super().__init__()
        self.inner, self.adapter = inner, adapter

    def forward(self, x):
        return self.inner(x) + self.adapter(x)


def model(adapted):
    torch.manual_seed(0)
    layers = [nn.Linear(8, 8) for _ in range(12)]
    if adapted:
        layers = [Adapted(layer.requires_grad_(False), nn.Linear(8, 8)) for layer in layers]
    name = "a_rather_long_name_of_a_tower_" * 3
    return nn.ModuleDict({name: nn.Sequential(*layers)})


class Tower(nn.Module):
    def __init__(self, adapted):
        super().__init__()
        self.towers = model(adapted)

    def forward(self, x):
        for tower in self.towers.values():
            x = tower(x)
        return x


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = profile_adapter(Tower(False), Tower(True), [torch.randn(4, 8)], repeats=2)
    even = Spread(1.0, 1.0, 1.0, 2)
    busy = Trust((f"the machine was busy {ATTACK}",), 9.0, 2, even, even)
    details = {"settings": {"name": ATTACK, "path": "long/" * 60}, "device": "x" * 300}
    folder = tmp_path_factory.mktemp("page")
    write(replace(found, subject=f"adapter {ATTACK}", trust=busy, details=details), folder, Console(file=io.StringIO()))
    return folder


def test_what_comes_from_data_is_text_and_nothing_is_asked_of_a_network(folder):
    page = (folder / "profile.html").read_text()
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 4
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r'src="data:image/png;base64,[^"]*"', "", page))
    assert 'class="warning"' in page
    assert "These times are not to be trusted: the machine was busy" in page


@pytest.mark.chromium
def test_nothing_is_cut_off_and_nothing_is_loaded(folder, tmp_path):
    found = browser.seen(tmp_path, (folder / "profile.html").read_text())
    assert [frame["width"] for frame in found] == [1280, 400]
    for frame in found:
        assert frame["out"] == []
        assert frame["scroll"] <= frame["width"]
        assert frame["loaded"] == []
        assert frame["tables"] == 5
        assert len(frame["pictures"]) == 4
        for complete, natural, shown in frame["pictures"]:
            assert complete
            assert natural > 600
            assert 700 < shown <= 1280  # legible on a narrow screen too, where it scrolls


@pytest.mark.chromium
def test_the_page_is_drawn(folder, tmp_path):
    picture = tmp_path / "page.png"
    browser.chromium(tmp_path, "--window-size=1280,2600", f"--screenshot={picture}", (folder / "profile.html").as_uri())
    with Image.open(picture) as image:
        pixels = image.convert("RGB")
        assert len(pixels.getcolors(2**24)) > 200
        margins = [pixels.crop((0, 0, 8, 2600)), pixels.crop((1272, 0, 1280, 2600))]
        assert all(margin.getcolors() == [(8 * 2600, (255, 255, 255))] for margin in margins)
