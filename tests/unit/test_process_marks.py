"""Whether the process that wrote a file still runs; what others left behind is removed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from lsp_server.process_marks import facts_of_living, own_facts


def mark(folder: Path, **facts: Any) -> Path:
    file = folder / "mark.json"
    file.write_text(json.dumps(facts))
    return file


@pytest.mark.parametrize(
    ("change", "lives"),
    [
        ({}, True),
        ({"started_at": 1.5}, True),
        ({"started_at": -60}, False),
        ({"started_at": 3600}, False),
        ({"started_at": -3600, "booted_at": -3600}, True),  # the clock was set since
        ({"started_at": -3600, "booted_at": -7200}, False),
    ],
)
def test_a_number_that_was_given_to_another_program_is_seen_by_its_start(
    change: dict[str, float], lives: bool, tmp_path: Path
) -> None:
    facts = own_facts()
    file = mark(tmp_path, **{name: value + change.get(name, 0) for name, value in facts.items()})
    assert (facts_of_living(file) is not None, file.exists()) == (lives, lives)


def test_a_file_of_an_older_version_is_believed_unless_its_process_is_younger(tmp_path: Path) -> None:
    file = mark(tmp_path, pid=os.getpid())
    assert facts_of_living(file) == {"pid": os.getpid()}
    before = own_facts()["started_at"] - 60
    os.utime(file, (before, before))
    assert facts_of_living(file) is None and not file.exists()


@pytest.mark.parametrize("pid", [2**22 + 1, 10**30, -1])
def test_a_number_that_no_process_has_is_gone(pid: int, tmp_path: Path) -> None:
    file = mark(tmp_path, pid=pid)
    assert facts_of_living(file) is None and not file.exists()


@pytest.mark.parametrize("text", ["", "{", "[1]", "{}", '{"pid": "x"}'])
def test_a_file_that_tells_no_process_is_left_alone(text: str, tmp_path: Path) -> None:
    file = tmp_path / "mark.json"
    file.write_text(text)
    assert facts_of_living(file) is None and file.exists()
    assert facts_of_living(tmp_path / "none.json") is None
