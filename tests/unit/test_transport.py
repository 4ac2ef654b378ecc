"""Messages on a stream, and file URIs."""

from __future__ import annotations

import io
import threading
from pathlib import Path

import pytest

from lsp_server.transport import FramingFault, ThreadWriter, read_message
from lsp_server.uris import path_of, uri_of


def messages(data: bytes) -> list[bytes]:
    stream, found = io.BytesIO(data), []
    while (body := read_message(stream)) is not None:
        found.append(body)
    return found


def test_messages_are_read_one_after_another() -> None:
    data = b"Content-Length: 2\r\n\r\n{}content-length:4\r\nContent-Type: x; charset=utf-8\r\n\r\n\xf0\x9f\x99\x82"
    assert messages(data) == [b"{}", b"\xf0\x9f\x99\x82"]


@pytest.mark.parametrize("data", [b"", b"Content-Length: 5\r\n\r\n{}", b"Content-Length: 5\r\n", b"\r\n\r\n"])
def test_a_stream_that_ends_early_is_its_end(data: bytes) -> None:
    assert messages(data) == []


@pytest.mark.parametrize(
    "data",
    [
        b"POST / HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}",
        b"Host: localhost\r\nContent-Length: 2\r\n\r\n{}",
        b"Content-Length: -1\r\n\r\n",
        b"Content-Length: 99999999999\r\n\r\n",
        b"Content-Length: 2" + b" " * 10_000 + b"\r\n\r\n{}",
        b"hello\n",
    ],
)
def test_anything_else_is_refused(data: bytes) -> None:
    with pytest.raises(FramingFault):
        messages(data)


def test_a_writer_keeps_the_order_and_tells_of_a_closed_pipe() -> None:
    class Pipe(io.BytesIO):
        def write(self, data: object) -> int:
            if data == b"break":
                raise BrokenPipeError
            return super().write(data)  # type: ignore[arg-type]

    pipe, closed = Pipe(), threading.Event()
    writer = ThreadWriter(pipe, closed.set)
    for number in range(100):
        writer.write(b"%d " % number)
    writer.write(b"break")
    assert closed.wait(5)
    assert pipe.getvalue() == b"".join(b"%d " % number for number in range(100))


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
