"""The engine fails for good: what HTTP says of it, and how `planpatch serve` ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from engine.errors import EngineError
from tests.http_server import SCRIPTED, ScriptedChat, call, listen
from tests.integration.test_language_server import SERVER

PLAN = {"intent": "add() adds", "code_paste": "def add(a, b):\n    return a"}
GENERATIONS: list[tuple[str, dict[str, Any]]] = [
    ("/plan", PLAN),
    ("/api/generate", {"prompt": "x"}),
    ("/api/chat", {"model": SCRIPTED, "messages": [{"role": "user", "content": "x"}], "stream": False}),
    ("/api/embed", {"model": SCRIPTED, "input": "x"}),
    ("/v1/completions", {"model": SCRIPTED, "prompt": "x"}),
    ("/v1/chat/completions", {"model": SCRIPTED, "messages": [{"role": "user", "content": "x"}]}),
]


def refusal(url: str, body: Any) -> tuple[int, str | None, str]:
    """Status, Retry-After and body of a request that is refused."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode()), timeout=30) as answer:
            return answer.status, answer.headers["Retry-After"], answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers["Retry-After"], error.read().decode()


@pytest.mark.parametrize(("path", "body"), GENERATIONS)
def test_after_the_engine_failed_generation_is_refused_for_good(
    path: str, body: dict[str, Any], tmp_path: Path
) -> None:
    engine = ScriptedChat(["never"], tmp_path)
    with listen(engine, tmp_path / "home") as url:
        assert call(f"{url}/health")[1]["status"] == "ok"
        engine.fail("The device failed: an illegal memory access was encountered")
        status, retry_after, text = refusal(f"{url}{path}", body)
        assert (status, retry_after) == (503, None)
        assert "the engine failed" in text and "Restart PlanPatch" in text
        status, health = call(f"{url}/health")
        assert (status, health["status"], health["model_loaded"]) == (200, "failed", False)
        assert health["message"] == "the engine failed; restart PlanPatch"
    assert not engine.requests


@pytest.mark.parametrize(("path", "body"), GENERATIONS[1:])
def test_the_request_that_the_engine_fails_with_is_not_asked_to_come_again(
    path: str, body: dict[str, Any], tmp_path: Path
) -> None:
    """It was told to try again in two seconds."""

    def fail(_prompt: str) -> Any:
        engine.fail()
        return EngineError("The device failed")

    engine = ScriptedChat(fail, tmp_path)
    with listen(engine, tmp_path / "home") as url:
        status, retry_after, text = refusal(f"{url}{path}", body)
        assert (status, retry_after) == (503, None)
        assert "The device failed" in text


def test_serve_ends_with_code_3_and_says_why(tmp_path: Path) -> None:
    script = tmp_path / "answer.txt"
    script.write_text("FAIL", encoding="utf-8")
    home = tmp_path / "home"
    command = [sys.executable, "-I", "-X", "utf8", str(SERVER), "serve", "--port", "0"]
    environ = {**os.environ, "PLANPATCH_HOME": str(home), "SCRIPT": str(script), "COLUMNS": "200"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=environ, text=True, encoding="utf-8") as process:
        try:
            assert process.stderr is not None
            url = ""
            while not url:
                line = process.stderr.readline()
                assert line, "it ended"
                url = line.partition("listening on ")[2].partition(";")[0]
            status, retry_after, text = refusal(f"{url}/plan", PLAN)
            assert (status, retry_after) == (503, None), text
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 3
    assert "engine: The device failed: CUDA error: an illegal memory access was encountered\n" in said
    assert said.endswith("  Start the server again.\n")
    assert "Traceback" not in said
    assert not (home / "runtime.json").exists()
