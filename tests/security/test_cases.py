"""How many malicious cases there are, of what kind; `pytest -s` prints it, and docs/robustness.md says the same."""

from __future__ import annotations

import importlib
import math
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "robustness.md"
WANTED = 20

KINDS = {
    "checkpoint": (
        "a_checkpoint_that_would_run_a_command",
        "a_checkpoint_that_is_a_bare_pickle",
        "a_checkpoint_of_other_plain_values",
        "tensors_whose_header",
        "checksums_that_name_files_outside",
        "rows_that_are_nested_too_deep",
        "checkpoints_that_are_a_link_to_elsewhere_are_not_deleted",
    ),
    "weights": (
        "weights_that_would_run_a_command",
        "an_array_of_objects_in_place_of_weights",
        "an_adapter_file_with_a_lying_header",
    ),
    "archive or image": (
        "a_dataset_that_would_run_a_command",
        "an_archive_writes_nothing_and_follows_no_link",
        "an_archive_whose_member_is_said_to_be_huge",
        "an_image_that_would_fill_the_memory",
    ),
    "cached file": ("cached_features_with_a_lying_header",),
    "configuration": (
        "a_configuration_cannot_have_code_run",
        "code_is_run_on_request_only",
        "a_run_directory_cannot_have_code_run_by_export",
        "yaml_tags_build_nothing",
        "configurations_name_known_things_only",
        "a_bomb_of_aliases_stays_small",
    ),
    "name": (
        "names_in_logs_are_shown_and_not_obeyed",
        "class_names_and_templates_are_never_format_strings",
    ),
    "result in HTML and tables": (
        "names_in_results_are_shown_and_not_obeyed",
        "results_of_other_types_are_refused",
        "a_result_that_is_nested_too_deep_is_refused",
    ),
}
"""Tests by what is malicious; one that tries several things in a row is one case."""

CONTROLS = {"the_canary_sings", "both_checkpoints_are_good_to_begin_with"}
"""Tests of the tests."""


def cases_of(module: ModuleType) -> dict[str, int]:
    """How often each test of a module runs, by its name."""
    found = {}
    for name, test in vars(module).items():
        if name.startswith("test_") and callable(test):
            marks = [mark for mark in getattr(test, "pytestmark", ()) if mark.name == "parametrize"]
            found[name.removeprefix("test_")] = math.prod(len(list(mark.args[1])) for mark in marks)
    return found


@pytest.fixture(scope="module")
def counted() -> Counter[str]:
    cases = {
        name: number
        for module in ("test_malicious_files", "test_malicious_text")
        for name, number in cases_of(importlib.import_module(module)).items()
    }
    assert cases.keys() - CONTROLS == {name for names in KINDS.values() for name in names}
    return Counter({kind: sum(cases[name] for name in names) for kind, names in KINDS.items()})


def test_there_are_enough_malicious_cases_of_every_kind(counted: Counter[str]) -> None:
    print(f"\n{counted.total()} malicious cases:", ", ".join(f"{kind} {number}" for kind, number in counted.items()))
    assert counted.total() >= WANTED
    assert all(counted.values())


def test_the_page_says_how_many(counted: Counter[str]) -> None:
    text = " ".join(PAGE.read_text(encoding="utf-8").split())
    sentence = ", ".join(f"{kind} {number}" for kind, number in counted.items())
    assert f"holds {counted.total()} malicious cases ({sentence})" in text
