"""JSON-RPC messages over stdio or one loopback TCP connection.

On stdio nothing else may reach the client: `take_stdio` keeps descriptors 0 and 1 for the protocol and points the
numbers at the null device and at stderr, so that whatever a library prints, in Python or in C, goes to stderr. A client
that does not read never stops the event loop.

A connection whose header has other fields than the protocol's is closed: a web page can make a browser post to a
loopback port, and an HTTP request must not be read as messages.
"""

from __future__ import annotations

import asyncio
import os
import queue
import re
import select
import stat
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from io import RawIOBase

MAX_MESSAGE_BYTES = 256 * 1024 * 1024
_MAX_HEADER_BYTES = 4096
_CHUNK_BYTES = 65536
_FIELD = re.compile(rb"(?i)(?:content-length[ \t]*:[ \t]*(\d{1,12})|content-type[ \t]*:[^\r\n]*)[ \t]*\r?\n")


class FramingFault(ValueError):
    """Bytes that are no message."""


def take_stdio() -> tuple[RawIOBase, RawIOBase]:
    """Keep stdin and stdout for the protocol, and point their descriptors elsewhere.

    Returns:
        The streams to read messages from and to write them to.
    """
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    streams = os.fdopen(os.dup(0), "rb", 0), os.fdopen(os.dup(1), "wb", 0)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    if sys.platform == "win32":
        import msvcrt

        for stream in streams:
            msvcrt.setmode(stream.fileno(), os.O_BINARY)
    return streams


class Framing:
    """Cuts a stream into messages' bodies, however its bytes come."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._length: int | None = None
        self._is_in_body = False
        self._num_header_bytes = 0

    def feed(self, data: bytes) -> list[bytes]:
        """Take in some bytes.

        Args:
            data: The stream's next bytes.

        Returns:
            The bodies that are whole now.

        Raises:
            FramingFault: The bytes are no message.
        """
        self._data += data
        bodies: list[bytes] = []
        while self._is_in_body or self._read_header():
            assert self._length is not None
            if len(self._data) < self._length:
                break
            bodies.append(bytes(self._data[: self._length]))
            del self._data[: self._length]
            self._length, self._is_in_body, self._num_header_bytes = None, False, 0
        return bodies

    def _read_header(self) -> bool:
        """Take in header lines; whether a body follows."""
        while (end := self._data.find(b"\n") + 1) > 0:
            line = bytes(self._data[:end])
            del self._data[:end]
            self._num_header_bytes += end
            if line not in (b"\r\n", b"\n"):
                self._length = _field(line, self._length, self._num_header_bytes)
            elif self._length is not None:
                self._is_in_body = True
                return True
        if self._num_header_bytes + len(self._data) > _MAX_HEADER_BYTES:
            raise FramingFault(f"a message's header holds {bytes(self._data[:60])!r}")
        return False


def _field(line: bytes, length: int | None, num_header_bytes: int) -> int | None:
    match = _FIELD.fullmatch(line)
    if match is None or num_header_bytes > _MAX_HEADER_BYTES:
        raise FramingFault(f"a message's header holds {line[:60]!r}")
    if match[1] is None:
        return length
    if int(match[1]) > MAX_MESSAGE_BYTES:
        raise FramingFault(f"a message has {int(match[1])} bytes")
    return int(match[1])


class Writer:
    """Writes in order, and never makes its caller wait.

    A short message goes out at once where the pipe has room for it; all else is written on a thread of its own. Each
    thread that wakes takes the interpreter from the one that decodes.

    Args:
        stream: Where to, not buffered.
        on_closed: Called, on whatever thread, when nobody reads any more.
    """

    def __init__(self, stream: RawIOBase, on_closed: Callable[[], None]) -> None:
        self._stream = stream
        self._on_closed = on_closed
        self._is_pipe = os.name == "posix" and stat.S_ISFIFO(os.fstat(stream.fileno()).st_mode)
        self._queue: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._num_queued = 0
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="planpatch-writer", daemon=True)
        self._thread.start()

    def write(self, data: bytes) -> None:
        """Send some bytes; returns at once."""
        with self._lock:
            if self._num_queued == 0 and self._has_room(len(data)):
                try:
                    os.write(self._stream.fileno(), data)
                except OSError:
                    self._on_closed()
                return
            self._num_queued += 1
        self._queue.put(data)

    def _has_room(self, num_bytes: int) -> bool:
        """Whether a write cannot block: a pipe that can be written to takes `PIPE_BUF` bytes (POSIX, write)."""
        if not self._is_pipe or num_bytes > select.PIPE_BUF:
            return False
        poll = select.poll()
        poll.register(self._stream.fileno(), select.POLLOUT)
        return any(event == select.POLLOUT for _, event in poll.poll(0))

    def close(self) -> None:
        """Send what is left, for a moment at most."""
        self._queue.put(None)
        self._thread.join(2)

    def _run(self) -> None:
        try:
            while (data := self._queue.get()) is not None:
                view = memoryview(data)
                while view:
                    view = view[self._stream.write(view) or 0 :]
                with self._lock:
                    self._num_queued -= 1
        except (OSError, ValueError):
            self._on_closed()


def read_messages(
    stream: RawIOBase,
    loop: asyncio.AbstractEventLoop,
    on_message: Callable[[bytes], None],
    on_end: Callable[[str], None],
) -> None:
    """Read messages until the stream ends; both callbacks run on the loop.

    Args:
        stream: Blocking, not buffered.
        loop: The event loop; it reads by itself where it can, else a thread does.
        on_message: Takes each body.
        on_end: Takes the reason; empty for a plain end.
    """
    framing = Framing()

    def take(data: bytes) -> bool:
        """Whether the stream goes on."""
        try:
            for body in framing.feed(data) if data else ():
                on_message(body)
        except FramingFault as fault:
            on_end(str(fault))
            return False
        if not data:
            on_end("")
        return bool(data)

    def on_readable() -> None:
        if not take(_read(stream)):
            loop.remove_reader(stream.fileno())

    try:
        loop.add_reader(stream.fileno(), on_readable)
    except (NotImplementedError, OSError):  # Windows; or a plain file
        _read_on_thread(stream, loop, take)


def _read_on_thread(stream: RawIOBase, loop: asyncio.AbstractEventLoop, take: Callable[[bytes], bool]) -> None:
    def run() -> None:
        with suppress(RuntimeError):  # the loop is gone
            while data := _read(stream):
                loop.call_soon_threadsafe(take, data)
            loop.call_soon_threadsafe(take, b"")

    threading.Thread(target=run, name="planpatch-reader", daemon=True).start()


def _read(stream: RawIOBase) -> bytes:
    try:
        return stream.read(_CHUNK_BYTES) or b""
    except (OSError, ValueError):
        return b""  # it was closed under us
