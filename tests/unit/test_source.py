"""Bytes in, the same bytes out, and line numbers that agree with `ast`."""

from __future__ import annotations

import ast
import hashlib
import os
import sys
from pathlib import Path

import pytest

from engine.errors import PathError, SourceError
from engine.patching.source import MAX_SOURCE_BYTES, Source, coding_cookie, read_source, split_lines

pytestmark = pytest.mark.unit

EXACT = {
    "unix": b"def f():\n    return 1\n",
    "windows": b"def f():\r\n    return 1\r\n",
    "old mac": b"def f():\r    return 1\r",
    "mixed": b"a = 1\r\nb = 2\nc = 3\rd = 4\r\n\r\r\n",
    "emoji and no final newline": "s = '🙂'".encode(),
    "byte-order mark": b"\xef\xbb\xbfx = 1\n",
    "byte-order mark alone": b"\xef\xbb\xbf",
    "form feed, vertical tab, separators": "a = 1\n\x0c\n# \x0b \x1c \x85 \u2028 \u2029 end\nb = 2\n".encode(),
    "tabs, decorator, nested": b"@d\ndef f():\n\tdef g():\n\t\tpass\n\treturn g\n",
    "empty": b"",
    "blank lines": b"\n\n\r\n",
}


@pytest.mark.parametrize("data", EXACT.values(), ids=EXACT.keys())
def test_bytes_survive_the_round_trip(data: bytes) -> None:
    source = Source.from_bytes(data, "f.py")
    assert source.to_bytes() == data
    assert source.sha256 == hashlib.sha256(data).hexdigest()
    assert Source.from_text(data.decode(), "f.py") == source
    assert source.bom == data.startswith(b"\xef\xbb\xbf")


@pytest.mark.parametrize("data", EXACT.values(), ids=EXACT.keys())
def test_line_numbers_are_those_of_ast(data: bytes) -> None:
    source = Source.from_bytes(data, "f.py")
    for node in ast.walk(ast.parse(data.decode().removeprefix("\ufeff"))):
        if isinstance(node, ast.Name):
            column = len(source.lines[node.lineno - 1].encode()[: node.col_offset].decode())
            assert source.lines[node.lineno - 1][column:].startswith(node.id)


def test_only_three_line_ends_split_lines() -> None:
    assert split_lines("a\x0cb\x0bc\x1cd\x85e\u2028f\n\rg\r\n") == (
        ("a\x0cb\x0bc\x1cd\x85e\u2028f", "", "g"),
        ("\n", "\r", "\r\n"),
    )


@pytest.mark.parametrize(
    ("text", "newline", "final"),
    [
        ("", "\n", True),
        ("a", "\n", False),
        ("a\r\nb\nc\r\n", "\r\n", True),
        ("a\rb\nc", "\r", False),
        ("a\nb\r\nc\r\nd\n", "\n", True),
    ],
)
def test_the_usual_newline_is_the_most_frequent_and_the_first_on_a_tie(text: str, newline: str, final: bool) -> None:
    source = Source.from_text(text, "f.py")
    assert (source.newline, source.final_newline) == (newline, final)


def test_text_between_keeps_inner_terminators_and_drops_the_last() -> None:
    source = Source.from_text("a\r\nb\nc\rd", "f.py")
    assert source.text_between(1, 3) == "a\r\nb\nc"
    assert source.text_between(3, 4) == "c\rd"
    assert source.text_between(3, 2) == ""
    assert source.plain_text(2) == "b\nc\nd\n"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"x = '\0'\n", r"f\.py is binary: it has a NUL at offset 5"),
        (b"\x7fELF\x02\0\0", r"f\.py is binary: it has a NUL at offset 5"),
        ("x = 1\n".encode("utf-16"), r"f\.py is UTF-16"),
        (b"x = 'caf\xe9'\n", r"f\.py is not UTF-8: byte 0xE9 at offset 8\."),
        (b"# -*- coding: latin-1 -*-\nx = '\xe9'\n", r"byte 0xE9 at offset 31; it declares the encoding 'latin-1'"),
        (b"#!/usr/bin/python\n# vim: set fileencoding=cp1252 :\nx = 1\n", r"declares the encoding 'cp1252'"),
        (b"# coding: no-such-codec\n", r"declares the encoding 'no-such-codec'"),
        (b"\xef\xbb\xbf# coding: latin-1\n", r"declares the encoding 'latin-1'"),
        (b"#" * (MAX_SOURCE_BYTES + 1), r"2,000,001 bytes or more; the limit is 2,000,000 bytes"),
    ],
)
def test_bytes_that_are_not_small_utf8_text_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(SourceError, match=message) as caught:
        Source.from_bytes(data, "f.py")
    assert caught.value.hint


@pytest.mark.parametrize("cookie", ["utf-8", "UTF8", "utf_8", "utf-8-sig", "U8"])
def test_every_name_of_utf8_is_accepted(cookie: str) -> None:
    data = f"# -*- coding: {cookie} -*-\nx = '🙂'\n".encode()
    assert Source.from_bytes(data, "f.py").to_bytes() == data


def test_a_cookie_counts_only_in_a_comment_of_the_first_two_lines() -> None:
    assert coding_cookie(["x = 1", "# coding: latin-1"]) is None
    assert coding_cookie(["", "  # coding: latin-1"]) == "latin-1"
    assert coding_cookie(["", "", "# coding: latin-1"]) is None
    assert coding_cookie(["x = '# coding'", ""]) is None


@pytest.mark.parametrize(
    ("text", "message"), [("a\0", "NUL at offset 1"), ("x = '\udc80'", r"lone surrogate \(U\+DC80\)")]
)
def test_text_of_an_editor_is_checked_like_a_file(text: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        Source.from_text(text, "f.py")


def test_a_file_is_named_relative_to_its_root(tmp_path: Path) -> None:
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "modulé 🙂.py").write_bytes(b"x = 1\r\n")
    source = read_source(Path("pkg") / "modulé 🙂.py", tmp_path)
    assert (source.path, source.text) == ("pkg/modulé 🙂.py", "x = 1\r\n")
    assert read_source(tmp_path / "pkg" / "modulé 🙂.py", tmp_path).path == "pkg/modulé 🙂.py"
    absolute = read_source(tmp_path / "pkg" / "modulé 🙂.py")
    assert absolute.path == (tmp_path / "pkg" / "modulé 🙂.py").as_posix()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.py", "does not exist"),
        ("folder", "is a folder"),
        ("../outside.py", "outside the root"),
        ("a\0b", "cannot be used"),
    ],
)
def test_a_path_that_is_no_file_inside_the_root_is_refused(tmp_path: Path, name: str, message: str) -> None:
    root = tmp_path / "root"
    (root / "folder").mkdir(parents=True)
    (tmp_path / "outside.py").write_text("x = 1\n")
    with pytest.raises(PathError, match=message) as caught:
        read_source(Path(name), root)
    assert name.rpartition("/")[2].partition("\0")[0] in caught.value.message


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege on Windows")
def test_a_link_that_leaves_the_root_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret.py").write_text("x = 1\n")
    (root / "link.py").symlink_to(tmp_path / "secret.py")
    (root / "loop.py").symlink_to(root / "loop.py")
    with pytest.raises(PathError, match="outside the root"):
        read_source(root / "link.py", root)
    with pytest.raises(PathError, match=r"loop\.py"):
        read_source(root / "loop.py", root)


def test_a_large_file_is_refused_by_its_size_alone(tmp_path: Path) -> None:
    path = tmp_path / "large.py"
    with path.open("wb") as file:
        file.truncate(20_000_000_000)  # sparse: reading it would take minutes and more memory than there is
    with pytest.raises(SourceError, match=r"20,000,000,000 bytes or more; the limit is 2,000,000 bytes"):
        read_source(path)


@pytest.mark.skipif(sys.platform == "win32" or not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads all")
def test_an_unreadable_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "closed.py"
    path.write_text("x = 1\n")
    path.chmod(0)
    with pytest.raises(PathError, match="cannot be read: Permission denied"):
        read_source(path)
