"""Edit lists: their JSON, finding their place, applying, inverting, diffing."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from engine.errors import UsageError
from engine.patching.edits import (
    EDITS_SCHEMA,
    AnchorError,
    Edit,
    SchemaFault,
    apply_edits,
    diff_edits,
    edits_from_json,
    invert,
    resolve_anchors,
    select_hunks,
    unified_diff,
)
from engine.patching.scopes import find_scope, module_scope
from engine.patching.source import Source

pytestmark = pytest.mark.unit

GOOD: dict[str, Any] = {
    "path": "a.py",
    "action": "replace",
    "start_line": 2,
    "end_line": 3,
    "pre": "x\ny",
    "new": "z 🙂",
}


def source(text: str) -> Source:
    return Source.from_text(text, "a.py")


def replace(start: int, end: int, pre: str, new: str, path: str = "a.py") -> Edit:
    return Edit(path, "replace", start, end, pre, new)


def insert(line: int, new: str) -> Edit:
    return Edit("a.py", "insert", line, line - 1, "", new)


def delete(start: int, end: int, pre: str) -> Edit:
    return Edit("a.py", "delete", start, end, pre, "")


# JSON


def test_an_edit_survives_json_with_its_keys_in_order() -> None:
    edit = Edit.from_json(json.loads(json.dumps(GOOD)))
    assert edit == replace(2, 3, "x\ny", "z 🙂")
    assert list(edit.to_json()) == EDITS_SCHEMA["items"]["required"] == list(GOOD)
    assert edit.to_json() == GOOD


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start_line": True}, "`start_line` is a whole number, not true or false"),
        ({"end_line": 3.0}, "`end_line` is a whole number, not a number"),
        ({"end_line": "3"}, "`end_line` is a whole number, not a string"),
        ({"start_line": 0}, "`start_line` is at least 1, not 0"),
        ({"end_line": 1}, "`end_line` 1 is before `start_line` 2"),
        ({"pre": None}, "`pre` is a string, not null"),
        ({"new": ["a"]}, "`new` is a string, not a list"),
        ({"action": "Replace"}, "`action` is replace, insert or delete, not 'Replace'"),
        ({"action": "delete"}, "a delete's `new` is empty"),
        ({"action": "insert"}, "an insert's `end_line` is start_line - 1, not 3"),
        ({"action": "insert", "end_line": 1}, "an insert's `pre` is empty"),
        ({"why": "because"}, "the key `why` is unknown"),
    ],
)
def test_json_that_breaks_a_rule_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SchemaFault) as caught:
        edits_from_json([GOOD, {**GOOD, **change}])
    assert str(caught.value) == f"edit 2: {message}"


@pytest.mark.parametrize("key", GOOD)
def test_every_key_is_required(key: str) -> None:
    with pytest.raises(SchemaFault, match=f"edit 1: the key `{key}` is missing"):
        edits_from_json([{name: value for name, value in GOOD.items() if name != key}])


@pytest.mark.parametrize("value", [GOOD, None, "[]", 7])
def test_only_a_list_is_a_list_of_edits(value: object) -> None:
    with pytest.raises(SchemaFault, match="the edits are a list, not"):
        edits_from_json(value)
    assert edits_from_json([]) == []


# Applying


@pytest.mark.parametrize(
    ("before", "edits", "after"),
    [
        ("a\nb\nc\n", [replace(2, 2, "b", "x\ny")], "a\nx\ny\nc\n"),
        ("a\r\nb\r\nc", [replace(3, 3, "c", "x\ny")], "a\r\nb\r\nx\r\ny"),
        ("a\r\nb", [insert(3, "c 🙂")], "a\r\nb\r\nc 🙂"),
        ("a\rb\r", [insert(1, "x"), insert(1, "y"), replace(1, 1, "a", "z")], "x\ry\rz\rb\r"),
        ("\ufeffa\n\x0c\nb\u2028\n", [delete(2, 2, "\x0c")], "\ufeffa\nb\u2028\n"),
        ("a\nb\r\nc\n", [replace(2, 2, "b", "x\ny")], "a\nx\ny\r\nc\n"),
        ("a\nb", [delete(2, 2, "b")], "a"),
        ("", [insert(1, "a\nb")], "a\nb\n"),
        ("\n", [replace(1, 1, "", "")], "\n"),
        ("@d\ndef f():\n\tpass\n", [insert(3, "\tdef g():\n\t\tpass")], "@d\ndef f():\n\tdef g():\n\t\tpass\n\tpass\n"),
    ],
)
def test_edits_change_only_their_lines(before: str, edits: list[Edit], after: str) -> None:
    old = source(before)
    new = apply_edits(old, edits)
    assert new.to_bytes() == after.encode()
    assert apply_edits(old, edits[::-1] if len({e.start_line for e in edits}) == len(edits) else edits) == new
    assert apply_edits(new, invert(old, edits), keep_newlines=True) == old


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ([replace(1, 2, "", ""), replace(2, 2, "", "")], "two edits change line 2"),
        ([replace(1, 3, "", ""), insert(2, "x")], "two edits change line 2"),
        ([replace(4, 4, "", "")], "line 4 is beyond the end of a.py, line 3"),
        ([insert(5, "x")], "beyond the end"),
    ],
)
def test_edits_that_overlap_or_leave_the_file_do_not_apply(edits: list[Edit], message: str) -> None:
    with pytest.raises(AnchorError, match=message):
        apply_edits(source("a\nb\nc\n"), edits)


def test_a_deleted_line_comes_back_at_a_neighbour_found_by_its_text() -> None:
    old = source("a\r\nb\nc\r\nd\n")
    edits = [delete(2, 2, "b"), delete(4, 4, "d")]
    new = apply_edits(old, edits)
    assert new.text == "a\r\nc\n"
    inverse = invert(old, edits)
    assert inverse == [replace(2, 2, "c", "b\nc\r\nd")]
    assert apply_edits(new, inverse, keep_newlines=True).text == old.text


# Finding the place

CODE = source("def f(a):\r\n\tx = 1  \r\n\ty = 2\r\n\tx = 1  \r\n\treturn '🙂'\r\n\ndef g():\n\ty = 2\n\treturn 3")
F = find_scope(CODE, "f")


@pytest.mark.parametrize(
    ("proposed", "resolved", "repairs"),
    [
        (replace(3, 3, "\ty = 2", "\ty = 3"), replace(3, 3, "\ty = 2", "\ty = 3"), []),
        (
            replace(1, 1, "\ty = 2", "\ty = 3"),
            replace(3, 3, "\ty = 2", "\ty = 3"),
            ["Edit 1: moved from line 1 to line 3, where its text is."],
        ),
        (
            replace(2, 3, "\ty = 2\n\tx = 1", "\ty = 3\n\tx = 1"),
            replace(3, 4, "\ty = 2\r\n\tx = 1  ", "\ty = 3\r\n\tx = 1"),
            [
                "Edit 1: trailing whitespace in `pre` was overlooked; "
                "moved from lines 2-3 to lines 3-4, where its text is."
            ],
        ),
        (
            replace(2, 2, "\tx = 1", "\tx = 2"),
            replace(2, 2, "\tx = 1  ", "\tx = 2"),
            ["Edit 1: trailing whitespace in `pre` was overlooked."],
        ),
        (
            replace(5, 5, "\treturn '🙂'\n", "\treturn 1\n"),
            replace(5, 5, "\treturn '🙂'", "\treturn 1"),
            ["Edit 1: a newline at the end of `pre` was dropped."],
        ),
        (
            replace(3, 9, "\ty = 2", "\ty = 3", path="b/a.py"),
            replace(3, 3, "\ty = 2", "\ty = 3"),
            [
                "Edit 1: the path 'b/a.py' was taken as 'a.py', the only file edited.",
                "Edit 1: moved from lines 3-9 to line 3, where its text is.",
            ],
        ),
        (delete(8, 8, "\ty = 2"), delete(8, 8, "\ty = 2"), []),
        (insert(3, "\tz = 1\n\tw = 2"), insert(3, "\tz = 1\r\n\tw = 2"), []),
        (Edit(".\\a.py", "insert", 10, 9, "", "x = 1"), insert(10, "x = 1"), []),
    ],
)
def test_an_edit_is_found_by_its_text(proposed: Edit, resolved: Edit, repairs: list[str]) -> None:
    assert resolve_anchors(CODE, F, [proposed]) == ([resolved], repairs)


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        (
            [replace(1, 1, "\tx = 1  ", "")],
            "edit 1 is not at line 1 but at lines 2, 4; give the right line",
        ),
        ([replace(1, 1, "\treturn 3", "")], "edit 1 is not at line 1 nor anywhere else in lines 1-5; copy the text"),
        ([replace(1, 1, "", "x = 1")], "edit 1 is not at line 1"),
        ([replace(3, 3, "\ty = 2", "a"), replace(1, 1, "\ty = 2", "b")], "two edits change line 3; make them one"),
        ([insert(11, "x")], "edit 1 inserts before line 11 of 9"),
        (
            [replace(3, 3, "\ty = 2", "a"), replace(5, 5, "\treturn '🙂'", "b", path="b.py")],
            "several files (a.py, b.py); only a.py may be edited",
        ),
    ],
)
def test_an_edit_without_one_clear_place_is_refused(edits: list[Edit], message: str) -> None:
    with pytest.raises(AnchorError) as caught:
        resolve_anchors(CODE, F, edits)
    assert message in str(caught.value)


def test_one_wrong_path_for_all_edits_is_mended_and_an_edit_that_changes_nothing_is_left_out() -> None:
    edits = [
        replace(3, 3, "\ty = 2", "\ty = 2", path="wrong.py"),
        replace(5, 5, "\treturn '🙂'", "\treturn 1", path="wrong.py"),
    ]
    resolved, repairs = resolve_anchors(CODE, F, edits)
    assert resolved == [replace(5, 5, "\treturn '🙂'", "\treturn 1")]
    assert len(repairs) == 3 and "Edit 1 was left out" in repairs[2]


# Hunks


def hunks(before: str, after: str) -> list[tuple[str, int, int, str]]:
    old = source(before)
    edits = diff_edits(old, after.split("\n"), module_scope(old))
    assert all(edit.pre == old.text_between(edit.start_line, edit.end_line) for edit in edits)
    return [(edit.action, edit.start_line, edit.end_line, edit.new) for edit in edits]


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("a\nb\nc", "a\nx\nc", [("replace", 2, 2, "x")]),
        ("a\nb\nc", "a\nb\nc", []),
        ("a\nb\nc\nd", "a2\nb\nc\nd2", [("replace", 1, 1, "a2"), ("replace", 4, 4, "d2")]),
        ("a\r\nb\r\n", "a\nx\ny\nb", [("insert", 2, 1, "x\r\ny")]),
        ("a\nb\nc\n", "b", [("delete", 1, 1, ""), ("delete", 3, 3, "")]),
        ("a = 1  \nb = 2\n", "a = 1\nb = 3  ", [("replace", 2, 2, "b = 3  ")]),
        ("a = 1\n   \nb = 2\x0c\n", "a = 1\n\nb = 2", []),
        ("x = '''\na  \n'''\n", "x = '''\na\n'''", [("replace", 2, 2, "a")]),
        ("x = f'''{a}\nb  \n'''  \n", "x = f'''{a}\nb\n'''", [("replace", 2, 2, "b")]),
        ("@d\ndef f():\n\tdef g(): '🙂'\n", "@d\ndef f():\n\tdef g(): '🙁'", [("replace", 3, 3, "\tdef g(): '🙁'")]),
        ("", "a\nb", [("insert", 1, 0, "a\nb")]),
    ],
)
def test_hunks_are_minimal_and_ignore_trailing_whitespace_outside_strings(
    before: str, after: str, expected: list[tuple[str, int, int, str]]
) -> None:
    assert hunks(before, after) == expected


def test_hunks_of_a_scope_count_the_lines_of_the_file() -> None:
    old = source("x = 1\n\nclass A:\n    def f(self):\n        '''Doc  \n        '''\n        return 1\n")
    lines = ["    def f(self):", "        '''Doc", "        '''", "        return 2"]
    edits = diff_edits(old, lines, find_scope(old, "f"))
    assert [(edit.start_line, edit.new) for edit in edits] == [(5, "        '''Doc"), (7, "        return 2")]


def test_any_subset_of_hunks_applies_and_rolls_back() -> None:
    old = source("a\r\nb\r\nc\r\nd\r\ne")
    edits = diff_edits(old, ["a2", "b", "new", "c", "e2"], (1, 5))
    assert len(edits) == 3
    for number in range(1, 8):
        part = select_hunks(edits, [index for index in range(3) if number >> index & 1])
        new = apply_edits(old, part)
        assert new.text != old.text
        assert apply_edits(new, invert(old, part), keep_newlines=True).to_bytes() == old.to_bytes()


@pytest.mark.parametrize("indexes", [[3], [-1], [], [0, 7]])
def test_hunks_that_are_not_there_are_named(indexes: list[int]) -> None:
    with pytest.raises(UsageError, match="3 hunks, counted from 0"):
        select_hunks([insert(1, "a"), insert(2, "b"), insert(3, "c")], indexes)


# Diffs


def test_a_diff_is_shown_with_both_names() -> None:
    old = source("a\nb\n")
    assert unified_diff(old, [replace(2, 2, "b", "c 🙂")]) == (
        "--- a/a.py\n+++ b/a.py\n@@ -1,2 +1,2 @@\n a\n-b\n+c 🙂\n"
    )
    assert unified_diff(old, []) == ""
    assert unified_diff(old, [replace(2, 2, "b", "b")]) == ""


def test_a_diff_shows_the_edit_alone_however_alike_the_lines_are() -> None:
    old = source("def f():\n    return 1\n\n" * 400)
    edits = [replace(2, 2, "    return 1", "    return 2"), insert(901, "# here")]
    diff = unified_diff(old, edits)
    assert [line for line in diff.splitlines() if line[0] in "+-"] == [
        *("--- a/a.py", "+++ b/a.py", "-    return 1", "+    return 2", "+# here")
    ]
    assert diff.count("\n") < 25


def test_a_large_edit_is_shown_as_small_as_it_is() -> None:
    old = source("a\nb\nc\nd\n")
    diff = unified_diff(old, [replace(1, 4, "a\nb\nc\nd", "a\nb\nC\nd")])
    assert [line for line in diff.splitlines()[3:] if line[0] in "+-"] == ["-c", "+C"]


@pytest.mark.skipif(shutil.which("git") is None, reason="git is what applies the diff")
@pytest.mark.parametrize("before", ["a\nb\nc\n", "a\r\nb\r\nc\r\n", "a\nb\nc", "\tα\r\n\x0c\nb🙂\r\nc"])
@pytest.mark.parametrize(
    "edits", [[insert(1, "new\nlines")], [delete(2, 3, "")], [replace(3, 3, "", "x"), insert(1, "y")]]
)
def test_git_applies_the_diff(tmp_path: Path, before: str, edits: list[Edit]) -> None:
    old = source(before)
    new = apply_edits(old, edits)
    (tmp_path / "a.py").write_bytes(old.to_bytes())
    (tmp_path / "change.diff").write_bytes(unified_diff(old, edits).encode())
    command = ["git", "-c", "core.autocrlf=false", "apply", "--whitespace=nowarn", "change.diff"]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert (tmp_path / "a.py").read_bytes() == new.to_bytes()
