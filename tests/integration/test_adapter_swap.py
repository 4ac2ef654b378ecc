"""Servers that run take the adapter that the command line chooses, without a restart. The model is scripted."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import Said, planpatch
from tests.http_server import call
from tests.lsp_client import LspClient
from tests.unit.test_adapters import write

SERVER = Path(__file__).resolve().parent.parent / "scripted_server.py"


@pytest.fixture
def adapters(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with two adapters, and a script for servers."""
    (tmp_path / "answer.txt").write_text("x", encoding="utf-8")
    monkeypatch.setenv("SCRIPT", str(tmp_path / "answer.txt"))
    out = home / "training" / "qlora-out"
    for number in (1, 2):
        write(out / f"house-v{number}", config={"peft_type": "LORA", "r": number})
    return out


@contextmanager
def serving(cwd: Path, *options: str) -> Iterator[tuple[int, str]]:
    """`planpatch serve`: its process id and URL."""
    command = [sys.executable, "-I", "-X", "utf8", str(SERVER), "serve", "--port", "0", "--json", *options]
    with subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            said = ""
            while not said.rstrip().endswith("}"):
                said += (line := process.stdout.readline())
                assert line, "the server ended"
            yield process.pid, json.loads(said)["url"]
        finally:
            process.terminate()
            _, err = process.communicate(timeout=30)
    assert "Traceback" not in err, err


def choose(cwd: Path, *arguments: str) -> Any:
    said: Said = planpatch("adapters", *arguments, "--json", cwd=cwd)
    assert said.code == 0, said
    return said.json


def eventually(holds: Callable[[], bool], timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
def test_a_server_takes_each_choice_and_the_way_back(adapters: Path, tmp_path: Path) -> None:
    with serving(tmp_path) as (pid, url):
        for name in ("house-v1", "house-v2"):
            said = choose(tmp_path, "use", name)
            assert (said["live_in"], said["not_taken_by"]) == ([pid], [])
            assert call(f"{url}/health")[1]["adapter_path"] == str(adapters / name)
        listed = {row["version"]: row for row in choose(tmp_path, "list")}
        old, new, ships = listed["house-v1"], listed["house-v2"], listed["qwen2.5-coder-0.5b-edits-v2"]
        assert (old["version"], old["used"], old["live_in"]) == ("house-v1", "", [])
        assert (new["version"], new["used"], new["live_in"]) == ("house-v2", "yes", [pid])
        assert call(f"{url}/health")[1]["adapter_version"] == new["digest"] != old["digest"]
        assert choose(tmp_path, "rollback")["live_in"] == [pid]
        assert call(f"{url}/health")[1]["adapter_path"] == str(adapters / "house-v1")
        choose(tmp_path, "rollback")
        health = call(f"{url}/health")[1]
        assert (health["adapter_path"], health["adapter_version"]) == (ships["folder"], ships["digest"])
        assert "used from now on" in planpatch("adapters", "use", "house-v2", cwd=tmp_path).err


def test_a_server_with_an_adapter_of_its_own_keeps_it(adapters: Path, tmp_path: Path) -> None:
    with serving(tmp_path, "--adapter", str(adapters / "house-v1")) as (pid, url):
        eventually(lambda: call(f"{url}/health")[1]["adapter_path"] == str(adapters / "house-v1"))
        said = choose(tmp_path, "use", "house-v2")
        assert (said["live_in"], said["not_taken_by"]) == ([], [pid])
        assert call(f"{url}/health")[1]["adapter_path"] == str(adapters / "house-v1")


def test_a_language_server_without_http_takes_it_too_and_tells_its_editor(
    home: Path, adapters: Path, tmp_path: Path
) -> None:
    client = LspClient(home, command=[sys.executable, "-I", "-X", "utf8", str(SERVER), "lsp"])
    try:
        client.initialize(tmp_path)
        client.wait_for(lambda: client.command("planpatch.status")["state"] == "ready")
        choose(tmp_path, "use", "house-v1")
        client.wait_for(lambda: client.command("planpatch.status")["adapter"] == str(adapters / "house-v1"))
        client.wait_for(lambda: "PlanPatch: the adapter house-v1 is used from now on" in client.messages())
        (adapters / "house-v2" / "adapter_model.safetensors").write_bytes(b"x")
        choice = home / "adapters.json"
        choice.write_text(json.dumps({"history": [str(adapters / "house-v2")]}), encoding="utf-8")
        client.wait_for(lambda: any("the adapter stays as it is" in text for text in client.messages()))
        assert client.command("planpatch.status")["adapter"] == str(adapters / "house-v1")
        choose(tmp_path, "use", "__none__")
        client.wait_for(lambda: client.command("planpatch.status")["adapter"] is None)
    finally:
        client.kill()
