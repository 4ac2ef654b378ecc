"""uvicorn's HTTP/1.1 connection with time limits for clients that send or read slowly, or never.

A connection costs a little memory and no slot; still, one that sends no whole head within `HEAD_TIME_S`, or reads
nothing of what is waiting for it within `READ_TIME_S`, is closed. Bodies have their own limit (bodies.py), idle
connections between two requests uvicorn's (`timeout_keep_alive`).
"""

from __future__ import annotations

import asyncio
import json

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_TIME_S = 20.0
READ_TIME_S = 60.0


class TimedProtocol(H11Protocol):
    """See the module's docstring."""

    _head_timer: asyncio.TimerHandle | None = None
    _read_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Begin to wait for the first head."""
        super().connection_made(transport)  # type: ignore[arg-type]
        self._head_timer = self.loop.call_later(HEAD_TIME_S, self.transport.abort)

    def data_received(self, data: bytes) -> None:
        """Take data in; what is no whole head yet has a time limit."""
        super().data_received(data)
        cycle = self.cycle
        waits_for_head = cycle is None or cycle.response_complete  # pyright: ignore[reportUnnecessaryComparison]
        if waits_for_head and self._head_timer is None and not self.transport.is_closing():
            self._head_timer = self.loop.call_later(HEAD_TIME_S, self.transport.abort)
        elif not waits_for_head:
            self._head_timer = _cancelled(self._head_timer)

    def _unsupported_upgrade_warning(self) -> None:
        """A request to upgrade is served as if it did not ask for that; uvicorn would tell the log of it."""

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP is refused as everything else is, in JSON."""
        body = json.dumps({"error": msg}).encode("ascii")
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"connection", b"close"),
        ]
        for event in (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            data = self.conn.send(event)
            if data:
                self.transport.write(data)
        self.transport.close()

    def pause_writing(self) -> None:
        """The client reads too slowly: it has some time."""
        super().pause_writing()
        if self._read_timer is None:
            self._read_timer = self.loop.call_later(READ_TIME_S, self.transport.abort)

    def resume_writing(self) -> None:
        """It reads again."""
        self._read_timer = _cancelled(self._read_timer)
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """The end."""
        self._head_timer, self._read_timer = _cancelled(self._head_timer), _cancelled(self._read_timer)
        super().connection_lost(exc)


def _cancelled(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
