"""Messages on a stream, and file URIs."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from lsp_server.transport import Framing, FramingFault, Writer
from lsp_server.uris import path_of, uri_of


def messages(data: bytes, chunk: int = 1000) -> list[bytes]:
    framing = Framing()
    return [body for start in range(0, len(data), chunk) for body in framing.feed(data[start : start + chunk])]


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_messages_are_read_one_after_another(chunk: int) -> None:
    data = b"Content-Length: 2\r\n\r\n{}content-length:4\r\nContent-Type: x; charset=utf-8\r\n\r\n\xf0\x9f\x99\x82"
    data += b"\r\nContent-Length: 0\n\n"
    assert messages(data, chunk) == [b"{}", b"\xf0\x9f\x99\x82", b""]


@pytest.mark.parametrize("data", [b"", b"Content-Length: 5\r\n\r\n{}", b"Content-Length: 5\r\n", b"\r\n\r\n"])
def test_what_is_not_whole_is_no_message(data: bytes) -> None:
    assert messages(data) == []


@pytest.mark.parametrize("chunk", [1, 1000])
@pytest.mark.parametrize(
    "data",
    [
        b"POST / HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}",
        b"Host: localhost\r\nContent-Length: 2\r\n\r\n{}",
        b"Content-Length: -1\r\n\r\n",
        b"Content-Length: 99999999999\r\n\r\n",
        b"Content-Length: 2" + b" " * 10_000 + b"\r\n\r\n{}",
        b"x" * 10_000,
        b"hello\n",
    ],
)
def test_anything_else_is_refused(data: bytes, chunk: int) -> None:
    with pytest.raises(FramingFault):
        messages(data, chunk)


def test_a_writer_keeps_the_order_and_its_caller_never_waits_for_a_reader() -> None:
    read, write = os.pipe()
    with os.fdopen(write, "wb", 0) as stream:
        writer = Writer(stream, lambda: pytest.fail("it is open"))
        sent = [b"%d." % number * (20_000 if number % 7 == 3 else 1) for number in range(200)]
        for data in sent:
            writer.write(data)  # far more than a pipe holds, and nobody reads yet
        with os.fdopen(read, "rb") as reader:
            assert reader.read(sum(map(len, sent))) == b"".join(sent)
        writer.close()


@pytest.mark.parametrize("size", [10, 100_000])
def test_a_writer_tells_of_a_closed_pipe(size: int) -> None:
    read, write = os.pipe()
    os.close(read)
    closed = threading.Event()
    with os.fdopen(write, "wb", 0) as stream:
        Writer(stream, closed.set).write(b"x" * size)
        assert closed.wait(5)


@pytest.mark.parametrize(
    ("uri", "windows", "path"),
    [
        ("file:///home/me/a%20b/%F0%9F%99%82.py", False, "/home/me/a b/🙂.py"),
        ("file://localhost/tmp/a.py", False, "/tmp/a.py"),
        ("FILE:///tmp/a%23b.py", False, "/tmp/a#b.py"),
        ("file://server/share/a.py", False, None),
        ("untitled:Untitled-1", False, None),
        ("vscode-notebook-cell:/a.ipynb#W0", False, None),
        ("file:///c%3A/work/a.py", True, "C:/work/a.py"),
        ("file:///C:/work/a.py", True, "C:/work/a.py"),
        ("file://server/share/a.py", True, "//server/share/a.py"),
    ],
)
def test_uris_name_files_on_every_platform(uri: str, windows: bool, path: str | None) -> None:
    found = path_of(uri, windows=windows)
    assert (None if found is None else found.as_posix()) == path


@pytest.mark.parametrize("name", ["a b.py", "🙂.py", "100%.py", "a#b?.py", "ü/ö.py", "x;y=z&(1).py"])
def test_a_path_comes_back_from_its_uri(name: str, tmp_path: Path) -> None:
    assert path_of(uri_of(tmp_path / name)) == tmp_path / name
