"""`GET /status` and `GET /requests` over real HTTP, without a browser; test_status_page.py has one."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lsp_server import serve_command
from lsp_server.http.generation import Call
from lsp_server.http.listener import Address, Listener, TakenError, bind, new_token
from lsp_server.http.service import Service
from lsp_server.model_host import ModelHost
from lsp_server.records import Records
from lsp_server.session import Session

STATUS = Path(__file__).resolve().parents[2] / "lsp_server" / "http" / "status.html"


@dataclass
class Served:
    listener: Listener
    service: Service

    def get(self, path: str, *, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers by lower-case name, and body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.listener.address.port, timeout=30)
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, body

    @property
    def bearer(self) -> str:
        return f"Bearer {self.service.token}"


def serve(home: Path, **options: object) -> Served:
    session = Session.open(os.environ, {"model": "smollm2-135m-instruct", "device": "cpu", **options})
    service = Service(ModelHost(lambda _: None), lambda: session, Records(session.ledger), new_token())
    bound = bind("127.0.0.1", 0, has_token=False, runtime_file=home / "runtime.json")
    listener = Listener(service, bound, home / "runtime.json")
    listener.start()
    return Served(listener, service)


@pytest.fixture
def served(home: Path) -> Iterator[Served]:
    made = serve(home)
    yield made
    made.listener.close()
    made.service.records.close()


@pytest.fixture
def guarded(home: Path) -> Iterator[Served]:
    """One whose user set a token."""
    made = serve(home, token="the-users-own")
    yield made
    made.listener.close()
    made.service.records.close()


def test_the_page_comes_with_a_strict_policy_and_is_kept_nowhere(served: Served) -> None:
    status, headers, body = served.get("/status")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert headers["x-frame-options"] == "DENY"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cache-control"] == "no-store"
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    for tag in ("script", "style"):
        (block,) = re.findall(rb"<%s>(.*?)</%s>" % (tag.encode(), tag.encode()), body, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(block).digest()).decode()
        assert policy.pop(f"{tag}-src") == f"'sha256-{digest}'"
    assert policy == {
        "default-src": "'none'",
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    assert b"\r" not in body


def test_the_page_is_small_and_needs_nothing_from_elsewhere() -> None:
    text = STATUS.read_text(encoding="utf-8")
    assert len(text.encode()) < 20_000
    assert re.findall(r"https?://[^' ]+", text) == ["http://www.w3.org/2000/svg"]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b| style=| on\w+=\"", text)
    assert not re.search(r"<(link|script|img|iframe)[^>]* (src|href)=\"(?!data:)", text)


def test_requests_are_told_to_the_token_alone_newest_first(served: Served) -> None:
    recent = served.service.generations.recent
    recent.append(Call(1, "/plan", 1000.0, "done", 1.23456, 16))
    recent.append(Call(2, "/api/chat", time.time() - 5, "running"))
    status, _, body = served.get("/requests")
    assert (status, json.loads(body)["error"]["code"]) == (401, "unauthorized")
    status, _, body = served.get("/requests", Authorization=served.bearer)
    newest, oldest = json.loads(body)["requests"]
    assert status == 200
    assert oldest == {
        "id": 1,
        "path": "/plan",
        "started_at": 1000.0,
        "state": "done",
        "seconds": 1.235,
        "num_tokens": 16,
    }
    assert newest["state"] == "running"
    assert 5 <= newest["seconds"] < 60
    for number in range(3, 40):
        recent.append(Call(number, "/plan"))
    _, _, body = served.get("/requests", Authorization=served.bearer)
    assert [call["id"] for call in json.loads(body)["requests"]] == list(range(39, 19, -1))


def test_a_listener_with_a_token_shows_the_bare_page_and_takes_the_runtime_token_too(guarded: Served) -> None:
    def code(path: str, **facts: Any) -> int:
        return guarded.get(path, **facts)[0]

    assert code("/status") == 200
    assert code("/status", method="HEAD") == 200
    assert code("/status", method="POST") == 401
    assert [code(path) for path in ("/health", "/requests", "/ledger", "/status/", "/")] == [401] * 5
    for token in (guarded.service.token, "the-users-own"):
        given = {"Authorization": f"Bearer {token}"}
        assert [code(path, **given) for path in ("/health", "/requests", "/ledger")] == [200] * 3
    assert code("/health", Authorization="Bearer no") == 401


def test_the_page_of_another_name_of_this_machine_may_post_to_itself(served: Served) -> None:
    port = served.listener.address.port
    for name in ("192.168.1.5", "planpatch.local"):
        own, other = f"http://{name}:{port}", f"http://{name}:{port + 1}"
        assert served.get("/health", Host=f"{name}:{port}", Origin=own)[0] == 200
        assert served.get("/health", Host=f"{name}:{port}", Origin=other)[0] == 403
    evil = f"evil.example:{port}"
    assert served.get("/health", Host=evil, Origin=f"http://{evil}")[0] == 403


def test_the_page_of_a_server_for_the_whole_network_is_opened_by_loopback() -> None:
    assert Address("0.0.0.0", 1).local_url == "http://127.0.0.1:1"
    assert Address("::", 1).local_url == "http://[::1]:1"
    assert Address("192.168.1.5", 1).local_url == Address("192.168.1.5", 1).url == "http://192.168.1.5:1"


def test_a_listener_that_is_closed_while_it_starts_ends_at_once(home: Path) -> None:
    """It was waited for 10 s: whoever closed it found no server to stop."""
    started_at = time.monotonic()
    made = serve(home)
    made.listener.close()
    assert time.monotonic() - started_at < 8
    assert not made.listener._thread.is_alive()


@pytest.mark.parametrize("name", ["runtime.json", "runtime-1.json"])
def test_where_a_server_has_the_port_serve_open_shows_its_page(
    name: str, served: Served, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a server that was not the home's first the runtime file was not found: the port was said to be taken."""
    (home / "runtime.json").rename(home / name)
    opened: list[tuple[str, str]] = []
    monkeypatch.setattr(serve_command, "_open_page", lambda url, token, _: opened.append((url, token)))
    session = Session.open(os.environ, {"port": served.listener.address.port})
    serve_command.serve(session, open_page=True)
    assert opened == [(served.listener.address.url, served.service.token)]
    with pytest.raises(TakenError, match=f"the PlanPatch server of process {os.getpid()} holds it"):
        serve_command.serve(session)
