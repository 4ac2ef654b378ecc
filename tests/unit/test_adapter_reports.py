"""What an editor is told of the adapters on this machine."""

from __future__ import annotations

import json
from pathlib import Path

from lsp_server.adapter_reports import known_adapters


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
