"""HTTP beside a language server: one process, one model, and what HTTP takes back goes through the editor."""

from __future__ import annotations

import json
import socket
import stat
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_language_server import SERVER, TEXT, ask_for_patch, opened
from tests.lsp_client import LspClient

FIXED = "def add(a, b):\n    return a + b\n"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., LspClient]]:
    clients: list[LspClient] = []
    script = tmp_path / "answer.txt"
    script.write_text(FIXED, encoding="utf-8")

    def start(port: int = 0) -> LspClient:
        command = [sys.executable, "-I", "-X", "utf8", str(SERVER), "lsp"]
        env = {"SCRIPT": str(script), "PLANPATCH_HTTP": "true", "PLANPATCH_PORT": str(port), "ADAPTER_PATH": "__none__"}
        client = LspClient(tmp_path / "home", command=command, env=env, settings={"apply": "direct"})
        clients.append(client)
        return client

    yield start
    for client in clients:
        client.kill()


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    folder = tmp_path / "workspace"
    folder.mkdir()
    (folder / "math_box.py").write_text(TEXT, encoding="utf-8", newline="")
    return folder


def call(url: str, body: Any = None, token: str = "") -> tuple[int, Any]:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=30) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def url_of(client: LspClient) -> str:
    return client.wait_for(lambda: client.command("planpatch.status")["http"], 30)


def test_plan_and_patch_over_http_use_the_editors_model(start: Callable[..., LspClient], workspace: Path) -> None:
    client = start()
    opened(client, workspace)
    url = url_of(client)
    status, health = call(f"{url}/health")
    assert status == 200 and health["model_loaded"] is True and health["adapter_version"] == "__none__"
    status, made = call(
        f"{url}/plan", {"intent": "add() adds", "paths": [], "code_paste": "def add(a, b):\n    return a"}
    )
    assert (status, made["plan"]["function"]) == (200, "add")
    status, patch = call(f"{url}/patch_smart", {"plan": made["plan"], "feedback": {"hint": "h", "reason": "smoke"}})
    assert (status, patch["ok"], patch["patched"]) == (200, True, "def add(a, b):\n    return a + b")
    changed = {"plan": made["plan"], "code_paste": "def add(a, b):\n    return b"}
    assert call(f"{url}/patch_smart", changed)[0] == 409
    assert call(f"{url}/patch_smart", {"plan": {"id": "pl_none"}})[0] == 404


def test_what_http_rolls_back_goes_through_the_editor(start: Callable[..., LspClient], workspace: Path) -> None:
    client = start()
    uri = opened(client, workspace)
    patch_id = ask_for_patch(client, uri)["patchId"]
    client.wait_for(lambda: client.text(uri) == TEXT.replace("a - b", "a + b"))
    url = url_of(client)
    runtime = client.home / "runtime.json"
    if sys.platform != "win32":
        assert stat.S_IMODE(runtime.stat().st_mode) == 0o600
    token = json.loads(runtime.read_text())["token"]
    assert call(f"{url}/rollback", {"patch_id": patch_id})[0] == 401
    assert call(f"{url}/rollback", {"patch_id": patch_id}, token="wrong")[0] == 401
    assert call(f"{url}/rollback", {"patch_id": "p_none"}, token)[0] == 404
    status, done = call(f"{url}/rollback", {"patch_id": patch_id}, token)
    assert (status, done["ok"], done["patchState"]) == (200, True, "rolled_back")
    assert client.text(uri) == TEXT
    assert (workspace / "math_box.py").read_text(encoding="utf-8") == TEXT, (
        "the editor had it open: nobody wrote to disk"
    )
    status, listed = call(f"{url}/ledger", token=token)
    assert [(one["id"], one["state"]) for one in listed["proposals"]] == [(patch_id, "rolled_back")]
    assert client.stop() == 0
    assert not runtime.exists()


def test_a_taken_port_is_told_and_the_editor_goes_on(start: Callable[..., LspClient], workspace: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        client = start(port)
        uri = opened(client, workspace)
        told = client.wait_for(lambda: [one for one in client.messages() if "HTTP cannot listen" in one], 30)
        assert f"127.0.0.1:{port}" in told[0] and "holds it" in told[0]
        assert f"This server listens on {url_of(client)}. Another port is the setting port." in told[0]
        assert ask_for_patch(client, uri)["state"] == "done"


def test_a_second_editor_leaves_the_port_to_the_first(start: Callable[..., LspClient], workspace: Path) -> None:
    first = start()
    opened(first, workspace)
    url = url_of(first)
    second = start(int(url.rpartition(":")[2]))
    opened(second, workspace)
    logged = second.wait_for(lambda: [one["message"] for one in second.seen("window/logMessage")], 30)
    assert f"the PlanPatch server of process {first.process.pid} holds it" in logged[0]
    assert not any("HTTP" in message for message in second.messages())
    own = url_of(second)  # the command line has to reach it too
    assert own != url and own in logged[0] and call(f"{own}/health")[0] == 200
