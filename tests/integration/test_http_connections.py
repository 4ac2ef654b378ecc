"""Connections to the listener: slow, vanishing, kept alive, malformed. A real socket, no model."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.patching.ledger import Ledger
from lsp_server.http import bodies, connection
from lsp_server.http.listener import Listener, bind
from lsp_server.http.service import Service
from lsp_server.model_host import ModelHost
from lsp_server.paths import Paths
from lsp_server.records import Records
from lsp_server.session import Session
from lsp_server.settings import Settings


@pytest.fixture
def listener(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Listener]:
    for module, name in ((connection, "HEAD_TIME_S"), (connection, "READ_TIME_S"), (bodies, "BODY_TIME_S")):
        monkeypatch.setattr(module, name, 1.0)
    session = Session(Paths(tmp_path, tmp_path / "planpatch.toml"), Settings(), [])
    records = Records(lambda: Ledger(tmp_path / "ledger.sqlite3"))
    service = Service(ModelHost(lambda status: None), lambda: session, records, "token")
    runtime_file = tmp_path / "runtime.json"
    made = Listener(service, bind("127.0.0.1", 0, has_token=False, runtime_file=runtime_file), runtime_file)
    made.start()
    yield made
    made.close()
    assert not runtime_file.exists()


def test_a_second_server_of_a_home_leaves_the_firsts_token_where_it_is(tmp_path: Path) -> None:
    """It took the file over, and at its end took it away: nobody could read the first one's token any more."""
    runtime_file = tmp_path / "runtime.json"
    first = json.dumps({"pid": os.getppid(), "port": 1, "token": "first"})
    runtime_file.write_text(first)
    session = Session(Paths(tmp_path, tmp_path / "planpatch.toml"), Settings(), [])
    service = Service(
        ModelHost(lambda status: None), lambda: session, Records(lambda: Ledger(tmp_path / "l")), "second"
    )
    made = Listener(service, bind("127.0.0.1", 0, has_token=False, runtime_file=runtime_file), runtime_file)
    own = tmp_path / f"runtime-{made.address.port}.json"
    made.start()
    assert json.loads(own.read_text())["token"] == "second" and service.runtime_name == own.name
    made.close()
    assert not own.exists() and runtime_file.read_text() == first


def connected(listener: Listener) -> socket.socket:
    return socket.create_connection((listener.address.host, listener.address.port), timeout=10)


def response(stream: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """One response with a length, read to its end and no further."""
    data = b""
    while b"\r\n\r\n" not in data:
        part = stream.recv(1)
        if not part:
            raise ConnectionError(f"closed after {data!r}")
        data += part
    head, _, _ = data.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    body = b""
    while len(body) < int(headers["content-length"]):
        body += stream.recv(int(headers["content-length"]) - len(body))
    return int(first.split()[1]), headers, body


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()


def post(path: str, body: bytes, *more: str) -> bytes:
    head = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {len(body)}", *more]
    return ("\r\n".join(head) + "\r\n\r\n").encode() + body


def ended(stream: socket.socket) -> bool:
    try:
        return stream.recv(1) == b""
    except ConnectionResetError:
        return True


def test_one_connection_serves_request_after_request_errors_included(listener: Listener) -> None:
    with connected(listener) as stream:
        for _ in range(3):
            stream.sendall(get("/api/version"))
            assert json.loads(response(stream)[2])["version"].startswith("0.")
            stream.sendall(post("/api/show", b"{"))
            assert response(stream)[0] == 400
            stream.sendall(post("/api/none", b'{"a": 1}'))
            assert response(stream)[0] == 404
            stream.sendall(get("/health"))
            assert response(stream)[0] == 200


def test_chunked_bodies_and_expect_continue(listener: Listener) -> None:
    with connected(listener) as stream:
        head = "POST /api/show HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        stream.sendall(head.encode() + b'5\r\n{"mod\r\n' + b'9\r\nel": "x"}\r\n0\r\n\r\n')
        assert response(stream)[0] == 404
        body = b'{"model": "y"}'
        stream.sendall(
            post("/api/show", b"", f"X: {len(body)}", "Expect: 100-continue").replace(
                b"Content-Length: 0", f"Content-Length: {len(body)}".encode()
            )
        )
        assert stream.recv(25) == b"HTTP/1.1 100 Continue\r\n\r\n"
        stream.sendall(body)
        assert b"model 'y' not found" in response(stream)[2]


def test_a_head_that_never_ends_is_given_up(listener: Listener) -> None:
    for beginning in (b"", b"GET / HTTP/1.1\r\nHost: x"):
        with connected(listener) as stream:
            stream.sendall(beginning)
            started_at = time.monotonic()
            assert ended(stream)
            assert 0.5 < time.monotonic() - started_at < 5
    with connected(listener) as stream:  # also on a connection that was served before
        stream.sendall(get("/api/version"))
        response(stream)
        stream.sendall(b"GET /")
        assert ended(stream)


def test_a_body_that_never_ends_is_given_up(listener: Listener) -> None:
    with connected(listener) as stream:
        stream.sendall(post("/api/show", b"", "X: y").replace(b"Content-Length: 0", b"Content-Length: 9") + b'{"a"')
        status, headers, body = response(stream)
        assert status == 408 and headers["connection"] == "close"
        assert b"did not arrive" in body
        assert ended(stream)


def test_a_body_that_is_too_large_is_refused_before_it_is_read(listener: Listener) -> None:
    with connected(listener) as stream:
        stream.sendall(post("/api/show", b"").replace(b"Content-Length: 0", b"Content-Length: 99999999"))
        assert response(stream)[0] == 413


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
        b"POST /api/show HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n",
    ],
)
def test_what_is_no_http_is_refused_and_others_are_served(request_bytes: bytes, listener: Listener) -> None:
    with connected(listener) as stream:
        stream.sendall(request_bytes)
        try:
            answer = stream.recv(100)
        except ConnectionResetError:
            answer = b""
        assert answer == b"" or answer.split()[1] in (b"400", b"403", b"431")
    with connected(listener) as stream:
        stream.sendall(get("/api/version"))
        assert response(stream)[0] == 200


def test_idle_connections_block_nobody(listener: Listener) -> None:
    idle = [connected(listener) for _ in range(200)]
    with connected(listener) as stream:
        started_at = time.monotonic()
        stream.sendall(get("/api/version"))
        assert response(stream)[0] == 200
        assert time.monotonic() - started_at < 5
    for stream in idle:
        stream.close()


@pytest.mark.parametrize(
    "path", ["/", "/health", "/status", "/api/version", "/api/tags", "/api/ps", "/v1/models", "/openapi.json"]
)
def test_head_is_answered_as_get_is_without_the_body(path: str, listener: Listener) -> None:
    with connected(listener) as stream:
        stream.sendall(get(path))
        status, headers, body = response(stream)
        assert (status, len(body)) == (200, int(headers["content-length"]))
        for _ in range(2):  # also on the same connection, where a body would be taken for the next answer
            stream.sendall(get(path).replace(b"GET", b"HEAD", 1))
            stream.settimeout(10)
            head = b""
            while b"\r\n\r\n" not in head:
                head += stream.recv(1)
            assert head.startswith(b"HTTP/1.1 200 ")
            assert f"content-length: {headers['content-length']}\r\n".encode() in head.lower()
        stream.sendall(get("/api/version"))
        assert response(stream)[0] == 200


def test_head_of_what_is_missing_refused_or_no_get_is_what_get_is(listener: Listener) -> None:
    for path, status in (("/none", 404), ("/ledger", 401), ("/plan", 405), ("/v1/models/none", 404)):
        with connected(listener) as stream:
            stream.sendall(get(path).replace(b"GET", b"HEAD", 1))
            assert int(stream.recv(12).split()[1]) == status, path


def test_a_request_to_upgrade_is_served_as_http_and_logged_nowhere(
    listener: Listener, caplog: pytest.LogCaptureFixture
) -> None:
    """uvicorn wrote two warnings to stderr, which anyone could fill the editor's log with."""
    upgrade = b"Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    key = b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    with connected(listener) as stream:
        for path, status in (("/api/version", 200), ("/ws", 404)):
            stream.sendall(get(path).removesuffix(b"\r\n") + upgrade + key)
            answer = response(stream)
            assert (answer[0], "upgrade" in answer[1]) == (status, False)
    assert not caplog.records
