"""Hardware as data: the table, a user's own file, and what is wrong with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cl_methods.forecast.hardware import find_hardware, known_hardware


def test_every_figure_of_the_table_has_a_source_and_is_plausible() -> None:
    known = known_hardware()
    assert {"a100", "h100", "rtx4090"} <= known.keys()
    for hardware in known.values():
        assert len(hardware.source) > 20
        assert 8 <= hardware.memory_gib <= 192
        assert 10e12 <= hardware.peak("fp32") <= hardware.peak(list(hardware.tflops)[-1])
        assert hardware.link < hardware.bandwidth


def test_a_ring_runs_at_the_speed_of_its_slowest_part() -> None:
    a100 = find_hardware("a100")
    assert a100.between(8) == 300e9
    assert a100.between(9) == 1600e9 / 8


def test_a_file_describes_other_hardware(tmp_path: Path) -> None:
    path = tmp_path / "card.yaml"
    path.write_text("{name: mine, tflops: {fp32: 10}, memory_gib: 8, bandwidth: 400, link: 12, network: 1}")
    found = find_hardware(str(path))
    assert (found.memory, found.between(9)) == (8 << 30, 1e9 / 8)
    with pytest.raises(ValueError, match="precision: mine has figures for fp32, got 'bf16'"):
        found.peak("bf16")


def test_caches_serve_small_operations_faster_and_the_smallest_take_equally_long() -> None:
    card = replace(find_hardware("h100"), bandwidth=1.0, traffic_shares={1e6: 9.0, 1e4: 1.0, 1e8: 0.5})
    sizes = (0, 1e2, 1e4, 1e5, 1e6, 1e10)
    assert [card.bytes_a_second(size) / 1e9 for size in sizes] == pytest.approx([1e-4, 1e-2, 1, 3, 9, 0.5])
    assert replace(card, traffic_shares={}).bytes_a_second(1e2) == 1e9


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2", "is not valid YAML"),
        ("5", "may hold name, tflops, .*; found 5"),
        ("{name: mine, watts: 300}", "may hold name, .*; found also watts"),
        ("{name: mine, tflops: {fp32: 10}, memory_gib: 8, bandwidth: 400}", "link: Field required"),
        (
            "{name: mine, tflops: {fp32: 10}, memory_gib: -8, bandwidth: 4, link: 1}",
            "memory_gib: expected a number > 0, got -8",
        ),
        (
            "{name: mine, tflops: {bf16: 10}, memory_gib: 8, bandwidth: 4, link: 1}",
            "tflops: expected numbers > 0 for fp32",
        ),
        (
            "{name: mine, tflops: {fp32: 10}, memory_gib: 8, bandwidth: 4, link: 1, traffic_shares: {1000: 0}}",
            "traffic_shares: expected sizes > 0 and shares > 0, got {1000.0: 0.0}",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_said(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "card.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        find_hardware(str(path))


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"hardware: expected one of a100, h100, .* or a YAML file .* got 'b200'"):
        find_hardware("b200")
