"""What an editor is told of the adapters on this machine, and of the training that goes on."""

from __future__ import annotations

import json
import os
from pathlib import Path

import psutil
import pytest

from lsp_server.learning_reports import known_adapters, training_end, training_run


def test_an_adapter_that_cannot_be_read_says_why_and_keeps_no_other_from_being_listed(tmp_path: Path) -> None:
    for name in ("style-v1", "style-v2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}")
    (tmp_path / "style-v1" / "manifest.json").write_text(json.dumps({"evaluation": {"edits": {"rows": 40}}}))
    found = known_adapters(tmp_path, tmp_path / "style-v2")
    assert [(Path(row["folder"]).name, row["used"]) for row in found] == [("style-v1", False), ("style-v2", True)]
    assert all(row["state"] != "ok" and row["evaluation"] is None for row in found)


def test_the_current_adapter_is_listed_wherever_it_lies(tmp_path: Path) -> None:
    assert [row["folder"] for row in known_adapters(tmp_path / "none", tmp_path / "mine")] == [str(tmp_path / "mine")]
    assert known_adapters(tmp_path / "none", None) == []


ALIVE = {"pid": os.getpid(), "started_at": psutil.Process().create_time()}
STEP = {"state": "training", "step": 7, "num_steps": 40, "left_s": 95.5}


@pytest.mark.parametrize(
    ("progress", "told"),
    [
        ({**ALIVE, **STEP}, {"run": "style-v2", "step": 7, "numSteps": 40, "leftS": 95.5}),
        ({**ALIVE, "state": "loading"}, {"run": "style-v2", "step": 0, "numSteps": 0, "leftS": None}),
        ({**ALIVE, **STEP, "state": "done"}, None),
        ({**ALIVE, **STEP, "started_at": 1.0}, None),  # the number belongs to another process by now
        (STEP, None),
        ([], None),
    ],
)
def test_a_run_is_told_while_its_process_lives(
    progress: object, told: dict[str, object] | None, tmp_path: Path
) -> None:
    folder = tmp_path / ".style-v2.partial"
    folder.mkdir()
    (folder / "progress.json").write_text(json.dumps(progress))
    (tmp_path / ".style-v1.partial").mkdir()
    (tmp_path / ".style-v1.partial" / "progress.json").write_text("{")
    assert training_run(tmp_path) == told


def test_without_a_folder_nothing_is_trained(tmp_path: Path) -> None:
    assert training_run(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("progress", "state", "message"),
    [
        ({**STEP, "state": "failed", "message": "The disk is full"}, "failed", "The disk is full"),
        ({**STEP, "state": "stopped", "message": "Cancelled"}, "stopped", "Cancelled"),
        (STEP, "cut off", ""),
        ([], "cut off", ""),
    ],
)
def test_a_run_that_ended_says_how(progress: object, state: str, message: str, tmp_path: Path) -> None:
    folder = tmp_path / ".style-v2.partial"
    folder.mkdir()
    (folder / "progress.json").write_text(json.dumps(progress))
    assert training_end(tmp_path, "style-v2") == {"run": "style-v2", "state": state, "message": message}


def test_a_run_whose_adapter_is_there_is_done(tmp_path: Path) -> None:
    (tmp_path / "style-v2").mkdir()
    (tmp_path / "style-v2" / "manifest.json").write_text("{}")
    assert training_end(tmp_path, "style-v2")["state"] == "done"
