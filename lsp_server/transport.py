"""JSON-RPC messages over stdio or one loopback TCP connection.

On stdio nothing else may reach the client: `take_stdio` keeps descriptors 0 and 1 for the protocol and points the
numbers at the null device and at stderr, so that whatever a library prints, in Python or in C, goes to stderr. Reading
and writing have threads of their own; a client that does not read never stops the event loop.

A connection whose header has other fields than the protocol's is closed: a web page can make a browser post to a
loopback port, and an HTTP request must not be read as messages.
"""

from __future__ import annotations

import asyncio
import os
import queue
import re
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import BinaryIO

MAX_MESSAGE_BYTES = 256 * 1024 * 1024
_MAX_HEADER_BYTES = 4096
_FIELD = re.compile(rb"(?i)(?:content-length[ \t]*:[ \t]*(\d{1,12})|content-type[ \t]*:[^\r\n]*)[ \t]*\r?\n")


class FramingFault(ValueError):
    """Bytes that are no message."""


def take_stdio() -> tuple[BinaryIO, BinaryIO]:
    """Keep stdin and stdout for the protocol, and point their descriptors elsewhere.

    Returns:
        The streams to read messages from and to write them to.
    """
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    streams = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    if sys.platform == "win32":
        import msvcrt

        for stream in streams:
            msvcrt.setmode(stream.fileno(), os.O_BINARY)
    return streams


def read_message(stream: BinaryIO) -> bytes | None:
    """The next message's body.

    Args:
        stream: Blocking.

    Returns:
        The body; None at the end of the stream.

    Raises:
        FramingFault: The bytes are no message.
    """
    length: int | None = None
    num_header_bytes = 0
    while True:
        line = stream.readline(_MAX_HEADER_BYTES)
        if not line:
            return None
        num_header_bytes += len(line)
        if line in (b"\r\n", b"\n"):
            if length is not None:
                break
            continue
        length = _field(line, length, num_header_bytes)
    body = stream.read(length)
    return body if len(body) == length else None


def _field(line: bytes, length: int | None, num_header_bytes: int) -> int | None:
    match = _FIELD.fullmatch(line)
    if match is None or num_header_bytes > _MAX_HEADER_BYTES:
        raise FramingFault(f"a message's header holds {line[:60]!r}")
    if match[1] is None:
        return length
    if int(match[1]) > MAX_MESSAGE_BYTES:
        raise FramingFault(f"a message has {int(match[1])} bytes")
    return int(match[1])


class ThreadWriter:
    """Writes on a thread of its own, in order.

    Args:
        stream: Where to.
        on_closed: Called on that thread when nobody reads any more.
    """

    def __init__(self, stream: BinaryIO, on_closed: Callable[[], None]) -> None:
        self._stream = stream
        self._on_closed = on_closed
        self._queue: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="planpatch-writer", daemon=True)
        self._thread.start()

    def write(self, data: bytes) -> None:
        """Send some bytes; returns at once."""
        self._queue.put(data)

    def close(self) -> None:
        """Send what is left, for a moment at most."""
        self._queue.put(None)
        self._thread.join(2)

    def _run(self) -> None:
        try:
            while (data := self._queue.get()) is not None:
                self._stream.write(data)
                if self._queue.empty():
                    self._stream.flush()
            self._stream.flush()
        except (OSError, ValueError):
            self._on_closed()


def read_on_thread(
    stream: BinaryIO,
    loop: asyncio.AbstractEventLoop,
    on_message: Callable[[bytes], None],
    on_end: Callable[[str], None],
) -> None:
    """Read messages on a thread until the stream ends; both callbacks run on the loop.

    Args:
        stream: Blocking.
        loop: The event loop.
        on_message: Takes each body.
        on_end: Takes the reason; empty for a plain end.
    """

    def run() -> None:
        reason = ""
        try:
            while (body := read_message(stream)) is not None:
                loop.call_soon_threadsafe(on_message, body)
        except FramingFault as fault:
            reason = str(fault)
        except (OSError, ValueError):
            pass  # the pipe was closed under us
        except RuntimeError:
            return  # the loop is gone
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(on_end, reason)

    threading.Thread(target=run, name="planpatch-reader", daemon=True).start()
