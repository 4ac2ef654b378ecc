"""Plan documents: what is written, what is read back after the user's edits, and what is found again."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from engine.errors import PathError, UsageError
from engine.patching.patcher import Plan
from engine.patching.scopes import find_scope
from engine.patching.source import Source
from lsp_server.plan_documents import PlanDocuments, PlanText, shown_context


def test_a_document_is_written_read_and_found_again_by_another_server(tmp_path: Path) -> None:
    folder, path = tmp_path / "plans", tmp_path / "code 🙂" / "a.py"
    documents = PlanDocuments(folder)
    document = documents.write(path, "Box.area", "use the width", ["first", "second"], "pl_1")
    assert document.file.name == "a-Box.area.md"
    text = document.file.read_text(encoding="utf-8")
    assert text.endswith("## Intent\n\nuse the width\n\n## Plan\n\n- first\n- second\n")
    assert documents.read(document) == PlanText("use the width", ("first", "second"))
    found = PlanDocuments(folder).find(path, "Box.area")
    assert found is not None
    assert (found.file, found.plan_id, found.intent) == (document.file, "pl_1", "use the width")
    assert PlanDocuments(folder).find(path, "Box") is None
    assert PlanDocuments(folder).find(tmp_path / "b.py", "Box.area") is None


def test_what_is_shown_of_the_function_is_no_part_of_the_plan(tmp_path: Path) -> None:
    code = 'def f():\r\n    """<!-- x\r\n## Plan\r- not a step\n    -->"""\n    return 1  # 🙂\n'
    source = Source.from_text(code, "a.py")
    plan = Plan("pl_1", "a.py", find_scope(source), source.sha256, "x", ("one",), dropped=("3 of 30 lines above",))
    about = shown_context(plan, code, 2048)
    documents = PlanDocuments(tmp_path)
    document = documents.write(tmp_path / "a.py", "f", "do it", ["one"], "pl_1", about)
    text = document.file.read_text(encoding="utf-8")
    assert "Lines 1 to 6; context: 0 of 2048 tokens; left out: 3 of 30 lines above.\n\n    def f():\n" in text
    assert documents.read(document) == PlanText("do it", ("one",))
    assert [one.function for one in documents.of(tmp_path / "a.py")] == ["f"]
    assert documents.of(tmp_path / "b.py") == []


@pytest.mark.parametrize(
    ("written", "text"),
    [
        (
            "## Intent\r\n\r\nmake  it\r\nfast\r\n\r\n## Plan\r\n\r\n1) one\r\n* two\r\n",
            PlanText("make it fast", ("one", "two")),
        ),
        ("\ufeff## Plan\n- 🙂 only\n", PlanText("", ("🙂 only",))),
        ("## Intent\n<!-- not\nthis -->x\n## Plan\n\n", PlanText("x", ())),
        ("## Plan\nfree text\n\n  - indented\n## Intent\nlast", PlanText("last", ("free text", "indented"))),
    ],
)
def test_what_a_user_makes_of_it_is_read(written: str, text: PlanText, tmp_path: Path) -> None:
    documents = PlanDocuments(tmp_path)
    document = documents.write(tmp_path / "a.py", "f", "x", [])
    document.file.write_bytes(written.encode("utf-8"))
    assert documents.read(document) == text


def test_one_without_headings_or_that_is_gone_says_what_to_do(tmp_path: Path) -> None:
    documents = PlanDocuments(tmp_path)
    document = documents.write(tmp_path / "a.py", "f", "x", [])
    document.file.write_text("nothing")
    with pytest.raises(UsageError, match="neither `## Intent` nor `## Plan`"):
        documents.read(document)
    document.file.unlink()
    with pytest.raises(PathError, match="cannot be read"):
        documents.read(document)
    assert documents.find(tmp_path / "a.py", "f") is None


def test_planning_again_keeps_the_file_and_other_functions_get_their_own(tmp_path: Path) -> None:
    documents = PlanDocuments(tmp_path)
    first = documents.write(tmp_path / "a.py", "f", "x", ["1"])
    assert documents.write(tmp_path / "a.py", "f", "y", ["2"]).file == first.file
    assert documents.write(tmp_path / "other" / "a.py", "f", "x", ["1"]).file.name == "a-f-2.md"
    assert documents.write(tmp_path / "a.py", "", "x", []).file.name == "a-file.md"


def test_text_of_the_user_cannot_end_the_mark(tmp_path: Path) -> None:
    path = tmp_path / "a--> <!--.py"
    document = PlanDocuments(tmp_path).write(path, "f", "x", [])
    assert "-->" not in document.file.read_text().splitlines()[0].removesuffix(" -->")
    assert PlanDocuments(tmp_path).find(path, "f") is not None


def test_old_documents_and_other_files_are_left_out(tmp_path: Path) -> None:
    document = PlanDocuments(tmp_path).write(tmp_path / "a.py", "f", "x", [])
    (tmp_path / "notes.md").write_text("# mine\n")
    (tmp_path / "bad.md").write_text('<!-- planpatch {"path": 1} -->\n')
    long_ago = time.time() - 31 * 24 * 3600
    os.utime(document.file, (long_ago, long_ago))
    assert PlanDocuments(tmp_path).find(tmp_path / "a.py", "f") is None
    assert not document.file.exists()
    assert (tmp_path / "notes.md").exists()
