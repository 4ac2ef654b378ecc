"""Arguments that are not UTF-8: refused by name before anything is loaded; paths keep their own messages."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from lsp_server import cli

BAD = os.fsdecode(b"a\xff")
posix_only = pytest.mark.skipif(sys.platform == "win32", reason="names of bytes as POSIX has them")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "bits.py").write_bytes("def f():  # 🐍\r\n\treturn 1".encode())
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["patch", "bits.py", "-f", "f", "-i", BAD], "--intent"),
        (["patch", "bits.py", "-f", BAD, "-i", "x"], "--function"),
        (["patch", "bits.py", "-f", "f", "-i", "x", "--plan", BAD], "--plan"),
        (["patch", "bits.py", "--plan-id", BAD], "--plan-id"),
        (["patch", "bits.py", "-f", "f", "-i", "x", "--hint", BAD], "--hint"),
        (["patch", "bits.py", "-f", "f", "-i", "x", "--reason", BAD], "--reason"),
        (["patch", "bits.py", "-f", "f", "-i", "x", "-m", BAD], "--model"),
        (["plan", "bits.py", "-f", "f", "-i", BAD], "--intent"),
        (["ledger", "show", BAD], "PATCH_ID"),
        (["ledger", "reject", "p_1", "--reason", BAD], "--reason"),
        (["models", "rm", BAD], "NAME"),
        (["models", "pull", BAD], "NAME"),
        (["bench", "--path", "bits.py", "-f", "f", "-i", BAD], "--intent"),
        (["bench", "cases", "c.jsonl", "--out", "r.jsonl", "--model", BAD], "--model"),
    ],
)
def test_an_argument_that_is_not_utf_8_is_refused_by_name(
    folder: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    assert cli.main(arguments) == 2
    assert capfd.readouterr().err == f"usage: {named} is not UTF-8: a\\udcff\n  Give it as text in UTF-8.\n"
    if arguments[0] != "bench":
        assert cli.main([*arguments, "--json"]) == 2
        assert json.loads(capfd.readouterr().out)["error"]["message"] == f"{named} is not UTF-8: a\\udcff"


@posix_only
def test_a_path_that_is_not_utf_8_is_told_as_a_path(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / BAD).write_bytes(b"")
    said = " has a name that is not UTF-8, which the ledger cannot keep.\n  Rename it.\n"
    for arguments in (["patch", BAD, "-f", "f", "-i", "x"], ["plan", BAD, "-f", "f", "-i", "x"]):
        assert cli.main(arguments) == 2
        assert capfd.readouterr().err.endswith(said)
    assert cli.main(["models", "show", f"./{BAD}"]) == 3
    assert f"There is no model folder {folder}/a" in capfd.readouterr().err
    assert cli.main(["ledger", "export", "--out", f"{BAD}.jsonl"]) == 0
    assert (folder / f"{BAD}.jsonl").read_bytes() == b""


@posix_only
def test_json_spells_what_is_not_utf_8_in_a_name_as_an_escape(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--path", BAD, "-f", "f", "-i", "x", "--json"]) == 2
    assert json.loads(capfd.readouterr().out)["error"]["details"]["path"] == BAD
