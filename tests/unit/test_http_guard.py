"""Who may call over HTTP: hosts, origins, tokens, sizes. A real application behind a real guard, no model."""

from __future__ import annotations

import asyncio
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from engine.patching.ledger import Ledger
from lsp_server.http.app import make_app
from lsp_server.http.edits import PlanBody, _check_length, _find  # pyright: ignore[reportPrivateUsage]
from lsp_server.http.errors import HttpError
from lsp_server.http.service import Service
from lsp_server.model_host import ModelHost
from lsp_server.paths import Paths
from lsp_server.records import Records
from lsp_server.session import Session
from lsp_server.settings import Settings

TOKEN = "t0ken"


def application(tmp_path: Path, **settings: Any) -> FastAPI:
    session = Session(Paths(tmp_path, tmp_path / "planpatch.toml"), Settings(**settings), [])
    records = Records(lambda: Ledger(tmp_path / "ledger.sqlite3"))
    return make_app(Service(ModelHost(lambda status: None), lambda: session, records, TOKEN, root=tmp_path / "root"))


class Answer:
    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def ask(
    app: FastAPI, method: str, path: str, headers: dict[str, str] | None = None, body: bytes = b"", chunks: int = 1
) -> Answer:
    """One request through the whole application, as a server would hand it over."""
    found = {"host": "127.0.0.1:8765", **(headers or {})}
    path, _, query = path.partition("?")
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in found.items() if value is not None],
    }
    size = max(1, len(body) // chunks)
    parts = [body[start : start + size] for start in range(0, len(body), size)] or [b""]
    messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts[:-1]]
    messages.append({"type": "http.request", "body": parts[-1], "more_body": False})
    sent: list[dict[str, Any]] = []

    async def run() -> None:
        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop(0)
            await asyncio.sleep(3600)
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        await asyncio.wait_for(app(scope, receive, send), 20)

    asyncio.run(run())
    start = next(one for one in sent if one["type"] == "http.response.start")
    headers_out = {name.decode().lower(): value.decode() for name, value in start["headers"]}
    return Answer(start["status"], headers_out, b"".join(one.get("body", b"") for one in sent[1:]))


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("127.0.0.1:8765", 200),
        ("localhost:1", 200),
        ("LOCALHOST.", 200),
        ("[::1]:8765", 200),
        ("app.localhost", 200),
        ("box.local", 200),
        ("host.docker.internal:8765", 200),
        ("192.168.1.7", 200),
        ("10.0.0.1:80", 200),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("8.8.8.8", 403),
        ("", 200),
        ("::1", 200),
        ("127.0.0.1@evil.example", 403),
        ("evil.example/127.0.0.1", 403),
        ("127.0.0.1:port", 403),
    ],
)
def test_a_host_of_another_name_is_refused(host: str, status: int, tmp_path: Path) -> None:
    assert ask(application(tmp_path), "GET", "/api/version", {"host": host}).status == status


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://localhost:3000", 200),
        ("https://127.0.0.1", 200),
        ("http://app.localhost", 200),
        ("https://a.b.localhost:5173", 200),
        ("ftp://app.localhost", 403),
        ("http://app.localhost.evil.example", 403),
        ("http://evillocalhost", 403),
        ("http://0.0.0.0:1", 200),
        ("app://obsidian.md", 200),
        ("tauri://localhost", 200),
        ("vscode-webview://abc", 200),
        ("vscode-file://vscode-app", 200),
        ("file://", 200),
        ("https://mine.example", 200),
        ("https://a.team.example", 200),
        ("https://evil.example", 403),
        ("https://team.example.evil.example", 403),
        ("https://x/.team.example", 403),
        ("http://localhost.evil.example", 403),
        ("null", 403),
        ("http://[", 403),
    ],
)
def test_a_foreign_origin_is_refused_and_never_granted(origin: str, status: int, tmp_path: Path) -> None:
    app = application(tmp_path, origins=("https://mine.example", "https://*.team.example", "*"))
    for method, path in (("GET", "/api/version"), ("POST", "/api/show"), ("GET", "/health")):
        answer = ask(app, method, path, {"origin": origin, "content-type": "text/plain"})
        assert (answer.status == 403) == (status == 403), path
        granted = answer.headers.get("access-control-allow-origin")
        assert granted == (origin if status == 200 else None)
    preflight = ask(app, "OPTIONS", "/api/chat", {"origin": origin, "access-control-request-method": "POST"})
    assert preflight.status == (204 if status == 200 else 403)


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/ledger", b""),
        ("POST", "/rollback", b'{"patch_id": "p_1"}'),
        ("POST", "/redo", b'{"patch_id": "p_1"}'),
        ("POST", "/apply", b'{"patch_id": "p_1"}'),
        ("POST", "/feedback", b'{"patch_id": "p_1", "accepted": true}'),
        ("POST", "/api/pull", b'{"model": "no-such-model"}'),
        ("POST", "/api/create", b'{"model": "a", "from": "b"}'),
        ("POST", "/api/copy", b'{"source": "a", "destination": "b"}'),
        ("DELETE", "/api/delete", b'{"model": "a"}'),
    ],
)
def test_what_changes_or_tells_something_needs_the_runtime_token(
    method: str, path: str, body: bytes, tmp_path: Path
) -> None:
    app = application(tmp_path)
    refused = ask(app, method, path, body=body)
    assert (refused.status, refused.headers["www-authenticate"]) == (401, "Bearer")
    assert ask(app, method, path, {"authorization": "Bearer wrong"}, body).status == 401
    assert ask(app, method, path, {"authorization": f"Bearer {TOKEN}"}, body).status not in (401, 403, 405)
    assert ask(app, method, path, {"x-planpatch-token": TOKEN}, body).status not in (401, 403, 405)


def test_with_a_token_of_the_user_every_request_needs_it(tmp_path: Path) -> None:
    app = application(tmp_path, token="mine")
    refused = ask(app, "GET", "/api/version")
    assert (refused.status, refused.headers["www-authenticate"]) == (401, "Bearer")
    assert ask(app, "GET", "/api/version", {"authorization": "Bearer mine"}).status == 200


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"", 400, "missing request body"),
        (b"{", 400, "not valid JSON"),
        (b"[]", 400, "a JSON object, not an array"),
        (b'{"model": 5}', 400, "model"),
        (b'{"model": "\xff"}', 400, "not UTF-8"),
        (b'{"model": "\\ud800"}', 400, "lone surrogate"),
        (b'{"model": NaN}', 400, "NaN"),
        (b'{"model": ' + b"[" * 5000 + b"]" * 5000 + b"}", 400, "nested"),
        (b'{"model": "x", "more": 1, "name": null}', 404, "model 'x' not found"),
        (b"\xef\xbb\xbf" + '{"model": "모델"}'.encode(), 404, "model '\\ubaa8\\ub378' not found"),
        (b" " * 8_000_001, 413, "larger than"),
    ],
)
def test_a_body_is_json_whatever_its_type_says(body: bytes, status: int, said: str, tmp_path: Path) -> None:
    app = application(tmp_path)
    for content_type in ("application/json", "text/plain", "application/x-www-form-urlencoded"):
        answer = ask(app, "POST", "/api/show", {"content-type": content_type}, body, chunks=7)
        assert answer.status == status
        assert said in answer.body.decode()
        assert isinstance(answer.json["error"], str)


def test_a_compressed_body_is_refused_by_the_name_of_its_header(tmp_path: Path) -> None:
    """It was said to be no JSON."""
    app, body = application(tmp_path), b'{"model": "x"}'
    answer = ask(app, "POST", "/api/show", {"content-encoding": "gzip"}, gzip.compress(body))
    assert (answer.status, answer.json) == (
        415,
        {"error": "Content-Encoding: gzip is not supported; send the body as it is"},
    )
    assert ask(app, "POST", "/api/show", {"content-encoding": "identity"}, body).status == 404


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"intent": "x", "code_paste": "x = 1\n" * 400_000}, "code_paste is larger than 2,000,000 bytes"),
        ({"intent": "x " * 50_000, "code_paste": "x = 1"}, "The intent has 100,000 characters"),
    ],
)
def test_what_is_too_large_is_413_wherever_it_stands(body: Any, said: str, tmp_path: Path) -> None:
    """Pasted code was 400 `source`, where a file of that size was 413."""
    with pytest.raises(HttpError) as caught:
        _check_length(body["intent"])
        _find(Any, PlanBody.model_validate(body))  # type: ignore[arg-type]
    assert (caught.value.status, caught.value.code) == (413, "too_large")
    assert said in caught.value.message


def test_errors_have_the_shape_of_the_api_that_was_called(tmp_path: Path) -> None:
    app = application(tmp_path)
    assert ask(app, "GET", "/api/none").json == {"error": "404 page not found"}
    assert ask(app, "GET", "/api/chat").status == 405
    ours = ask(app, "POST", "/plan", body=b'{"intent": ""}')
    assert ours.status == 400
    assert ours.json == {
        "ok": False,
        "error": {
            "code": "bad_request",
            "message": "intent: say what is to be changed",
            "hint": "",
            "details": {"param": "intent"},
        },
    }


def test_without_a_model_generation_says_so_and_discovery_works(tmp_path: Path) -> None:
    app = application(tmp_path)
    assert ask(app, "GET", "/").body == b"Ollama is running"
    assert ask(app, "HEAD", "/").status == 200
    assert ask(app, "GET", "/api/tags").json == {"models": []}
    assert ask(app, "GET", "/api/ps").json == {"models": []}
    answer = ask(app, "POST", "/plan", body=b'{"intent": "x", "code_paste": "x = 1"}')
    assert answer.status == 503 and "retry-after" in answer.headers
    assert ask(app, "POST", "/api/generate", body=b'{"prompt": "x"}').status == 503
