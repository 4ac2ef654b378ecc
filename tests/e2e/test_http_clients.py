"""Real clients of Ollama against `planpatch serve` with the real 0.5B: discovery, streams, options, tools, errors."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.clients.install import HERE, NODE_MODULES, PYTHON, missing
from tests.conftest import TEST_HOME
from tests.http_server import MODEL, call, serve_05b

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def clients() -> None:
    """The clients' libraries; looked for here, since importing them takes seconds."""
    reason = missing()
    if reason and os.environ.get("CI") != "true":
        pytest.skip(f"{reason}: python tests/clients/install.py")
    assert not reason


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serve_05b(TEST_HOME, tmp_path_factory.mktemp("serve")) as url:
        assert call(f"{url}/api/generate", {"model": MODEL})[1]["done_reason"] == "load"
        yield url


def seen_by(*command: object, url: str) -> dict[str, Any]:
    done = subprocess.run(
        [*map(str, command), url, MODEL], capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_ollamas_python_client(clients: None, url: str) -> None:
    seen = seen_by(PYTHON, HERE / "ollama_client.py", url=url)
    assert seen["list"] == [f"{MODEL}:latest"]
    assert set(seen["capabilities"]) == {"completion", "tools", "insert", "embedding"}
    assert seen["context_length"] == 32768
    assert seen["ps"] == [[f"{MODEL}:latest", 32768]]
    assert seen["chat"] == seen["chat streamed"] == seen["generate"] != ""
    reason, num_prompt, num_tokens, duration = seen["counts"]
    assert reason in ("stop", "length") and num_prompt > 20 and 0 < num_tokens <= 12 and duration > 1_000_000
    first, second = seen["seeded"]
    assert first == second != ""
    assert "4" in seen["stop"] and "5" not in seen["stop"]
    assert "a + b" in seen["middle"]
    assert isinstance(json.loads(seen["schema"])["size"], int) and isinstance(json.loads(seen["json"]), dict)
    assert seen["tool calls"] == [["add", {"a": 3, "b": 4}]]
    assert seen["after the tool"] != ""
    assert seen["embed"] == [896, 896] and seen["load"] == ["load", "unload"]
    assert seen["unknown"] == [404, "model 'nope' not found"]
    assert seen["images"][0] == 400 and seen["think"] == [400, f'"{MODEL}" does not support thinking']
    assert seen["pull"][0] == 401


def test_ollamas_javascript_client(clients: None, url: str) -> None:
    script = NODE_MODULES.parent / "ollama_client.mjs"  # it is looked for beside its modules
    shutil.copy(HERE / "ollama_client.mjs", script)
    seen = seen_by("node", script, url=url)
    assert seen["version"].startswith("0.") and seen["list"] == [f"{MODEL}:latest"]
    assert "tools" in seen["capabilities"]
    assert seen["chat"] == seen["streamed"] == seen["generate"] != ""
    assert seen["embed"] == [896, 896] and seen["unknown"] == [404, "model 'nope' not found"]
    assert seen["after_abort_ms"] < 10_000
    assert call(f"{url}/health")[1]["queue"]["running"] == 0


def test_langchain(clients: None, url: str) -> None:
    seen = seen_by(PYTHON, HERE / "langchain_client.py", url=url)
    assert seen["chat"] == seen["streamed"] != "" and seen["batch"] == [seen["chat"]] * 4
    assert seen["usage"]["input_tokens"] > 20 and seen["usage"]["output_tokens"] > 0
    assert seen["person"] == {"name": "Bob", "age": 5} and seen["embedding"] == 896 and seen["llm"] != ""


def test_litellm(clients: None, url: str) -> None:
    seen = seen_by(PYTHON, HERE / "litellm_client.py", url=url)
    for provider in ("ollama", "ollama_chat"):
        assert seen[provider] != "" and 0 < seen[f"{provider} usage"] <= 8
        assert seen[f"{provider} streamed"].strip() == seen[provider].strip()
    assert seen["embedding"] == 896 and "nope" in seen["unknown"]


def test_the_originals_examples(url: str) -> None:
    """Two calls for PLAN and PATCH, and Ollama's two without a model, as its scripts send them: UTF-8, no type."""
    _, made = call(f"{url}/plan", {"intent": "add() 음수 방지", "paths": [], "code_paste": "def add(a,b): return a+b"})
    feedback = {"hint": "Return ONLY items of the edits array. No markdown.", "reason": "smoke"}
    status, patch = call(f"{url}/patch_smart", {"plan": made["plan"], "feedback": feedback})
    assert (status, patch["ok"]) == (200, True), patch
    compile(patch["patched"], "add", "exec")
    assert patch["edits"][0]["pre"] == "def add(a,b): return a+b"
    status, answer = call(f"{url}/api/generate", {"prompt": "Say hi in one word."})
    assert status == 200 and answer["response"].strip() and answer["eval_count"] <= 24
    status, answer = call(f"{url}/api/chat", {"messages": [{"role": "user", "content": "한국의 수도는?"}]})
    assert status == 200 and answer["message"]["content"].strip()


def test_a_client_that_vanishes_leaves_no_slot_taken(url: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps({"model": MODEL, "prompt": "Count to a thousand", "options": {"num_predict": 2000}}).encode()
    for stream in (True, False):
        whole = json.dumps({**json.loads(body), "stream": stream}).encode()
        head = f"POST /api/generate HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(whole)}\r\n\r\n".encode()
        for _ in range(12):  # more than there are slots
            with socket.create_connection((host, int(port))) as connection:
                connection.sendall(head + whole)
                if stream:
                    connection.recv(100)
    started_at = time.monotonic()
    while (queue := call(f"{url}/health")[1]["queue"])["running"] or queue["waiting"]:
        assert time.monotonic() - started_at < 30, queue
        time.sleep(0.1)
    last = {"model": MODEL, "prompt": "hi", "options": {"num_predict": 1}, "stream": False}
    assert call(f"{url}/api/generate", last)[0] == 200
