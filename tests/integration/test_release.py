"""A server that lends its model to training: the real server with the real 0.5B, and training that is killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lsp_server.process_marks import own_facts
from tests.homes import make_home
from tests.http_server import serve_05b
from tests.training_model import make_base, row, write_config, write_rows


def ask(url: str, path: str, body: dict[str, Any] | None = None, token: str = "") -> tuple[int, dict[str, Any], Any]:
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {token}"} if token else {})}
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{url}{path}", data, headers), timeout=200) as answer:
            return answer.status, json.loads(answer.read()), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read()), error.headers


def until(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.1)


def state(url: str) -> str:
    return ask(url, "/health")[1]["status"]


def rss_bytes(pid: int) -> int:
    import psutil

    return psutil.Process(pid).memory_info().rss


@contextmanager
def sleeper() -> Iterator[tuple[subprocess.Popen[bytes], dict[str, Any]]]:
    """A process that could train."""
    import psutil

    with subprocess.Popen([sys.executable, "-I", "-c", "import time; time.sleep(300)"]) as process:
        try:
            facts = {"pid": process.pid, "started_at": psutil.Process(process.pid).create_time()}
            yield process, {**facts, "booted_at": psutil.boot_time()}
        finally:
            process.kill()


@pytest.mark.slow
def test_a_server_lends_its_memory_and_takes_it_back(test_home: Path, tmp_path: Path) -> None:
    with serve_05b(test_home, tmp_path) as url:
        runtime = json.loads((tmp_path / "planpatch home" / "runtime.json").read_text())
        token, server = runtime["token"], runtime["pid"]
        until(lambda: state(url) == "ok")
        time.sleep(1.5)  # what looks at the engine now and then has seen it, and must not hold its memory
        held = rss_bytes(server)
        assert ask(url, "/release", own_facts())[0] == 401
        with sleeper() as (process, facts):
            status, answer, _ = ask(url, "/release", {**facts, "purpose": "Training"}, token)
            assert (status, answer["ok"], answer["state"]) == (200, True, "released")
            assert rss_bytes(server) < held - 300_000_000
            health = ask(url, "/health")[1]
            assert (health["status"], health["model_loaded"]) == ("released", False)
            assert health["message"] == f"Training holds the model's memory (process {process.pid})"
            for path, body in (
                ("/plan", {"intent": "do it", "code_paste": "x = 1"}),
                ("/api/generate", {"prompt": "x", "stream": False}),
                ("/v1/completions", {"model": "qwen2.5-coder-0.5b-instruct", "prompt": "x"}),
            ):
                status, answer, headers = ask(url, path, body)
                assert (path, status, headers["Retry-After"]) == (path, 503, "60")
                assert "Training holds the model's memory" in json.dumps(answer)
            assert ask(url, "/release", own_facts(), token)[0] == 409, "another process has it"
            assert ask(url, "/resume", {"pid": os.getpid()}, token)[0] == 409
            assert ask(url, "/release", facts, token)[0] == 200, "the same process may ask again"
            assert ask(url, "/resume", {"pid": process.pid}, token)[0] == 200
            until(lambda: state(url) == "ok")

            assert ask(url, "/release", facts, token)[0] == 200
            process.kill()  # it cannot say that it is done
            process.wait()
            until(lambda: state(url) == "ok")
        status, answer, _ = ask(
            url, "/api/generate", {"prompt": "x = ", "stream": False, "options": {"num_predict": 3}}
        )
        assert status == 200 and answer["done"]
        assert ask(url, "/release", {"pid": 2**22 + 1}, token)[0] == 409, "a process that does not run"


@pytest.mark.long
def test_training_asks_the_running_server_and_brings_it_back(test_home: Path, tmp_path: Path) -> None:
    base = make_base(tmp_path / "tiny")
    data = write_rows(tmp_path / "d.jsonl", [row(number) for number in range(40)])
    config = write_config(tmp_path / "c.json", num_epochs=40)
    with serve_05b(test_home, tmp_path) as url:
        until(lambda: state(url) == "ok")
        home = tmp_path / "planpatch home"
        environ = {**os.environ, "PLANPATCH_HOME": str(home), "PLANPATCH_CONFIG": str(home / "planpatch.toml")}
        command = [sys.executable, "-I", "-X", "utf8", "-m", "lsp_server", "train", "qlora", str(config)]
        options = ["--data", str(data), "--model", str(base), "--device", "cpu"]
        with subprocess.Popen([*command, *options], env=environ, stderr=subprocess.PIPE, text=True) as training:
            try:
                until(lambda: state(url) == "released")
                assert f"process {training.pid}" in ask(url, "/health")[1]["message"]
                out = home / "training" / "qlora-out"
                until(lambda: bool(list(out.glob(".tiny-v1.partial/checkpoints/*/complete.json"))))
            finally:
                training.kill()
        until(lambda: state(url) == "ok")

        done = subprocess.run([*command, *options, "--resume", "--json"], env=environ, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["manifest"]["resumed_at_step"] > 0
        assert "has released qwen2.5-coder-0.5b-instruct" in done.stderr
        assert "loads its model again" in done.stderr
        until(lambda: state(url) == "ok")


def test_a_server_without_a_model_yet_is_not_loaded_while_it_is_lent(tmp_path: Path, test_home: Path) -> None:
    from lsp_server.model_host import ModelHost
    from lsp_server.session import Session

    home = make_home(tmp_path / "home", test_home)
    environ = {"PLANPATCH_HOME": str(home), "PLANPATCH_CONFIG": str(home / "planpatch.toml")}
    session = Session.open(environ, {"model": str(make_base(tmp_path / "tiny")), "device": "cpu"})
    host = ModelHost(lambda _: None)
    with sleeper() as (process, facts):
        assert host.release(facts, "Training")
        host.start(session)
        time.sleep(0.3)
        assert (host.status.state, host.engine_or_none) == ("released", None)
        process.kill()
        process.wait()
        until(lambda: host.status.state != "released")
        until(lambda: host.status.state == "ready")
    host.close()
