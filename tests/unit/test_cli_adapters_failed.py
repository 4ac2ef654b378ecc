"""What `planpatch adapters use` says of the servers that run. They are scripted: one answer of `/health` a look."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lsp_server import cli_adapters
from lsp_server.cli_adapters import say_current
from lsp_server.paths import Paths
from lsp_server.session import Session
from lsp_server.settings import Settings

FAILED = {"status": "failed", "message": "The adapter cannot be read", "hint": "Train it again.", "model_loaded": False}
LOADING = {"status": "loading", "message": "loading the weights", "hint": "", "model_loaded": False}
BASE = {"status": "ok", "model_loaded": True, "adapter_path": None, "adapter_setting": "auto"}
OTHER = {**BASE, "adapter_path": "/adapters/house-v1"}
FIXED = {**OTHER, "adapter_setting": "/adapters/house-v1"}
RELEASED = {**LOADING, "status": "released"}


class Server:
    """A server that answers `/health` in turn; the last answer stays."""

    def __init__(self, pid: int, *answers: dict[str, Any]) -> None:
        self.pid = pid
        self._answers = itertools.chain(answers, itertools.repeat(answers[-1]))

    def health(self) -> dict[str, Any]:
        return next(self._answers)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The time that the command sees: it passes by its sleeps alone."""
    now = [0.0]
    monkeypatch.setattr(cli_adapters.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(cli_adapters.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    yield now


def said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *servers: Server) -> Session:
    monkeypatch.setattr(cli_adapters, "listeners", lambda runtime_file: servers)
    session = Session(Paths(tmp_path, tmp_path / "planpatch.toml"), Settings(), [])
    monkeypatch.setattr(session, "adapter", lambda: None)
    return session


@pytest.mark.parametrize(
    ("answers", "live", "others", "failed", "took_s"),
    [
        ([BASE], [1], [], False, 0),
        ([OTHER, OTHER, BASE], [1], [], False, 0.4),
        ([LOADING], [], [], False, 15.0),
        ([LOADING, LOADING, BASE], [1], [], False, 0.4),
        ([LOADING, LOADING, FAILED, LOADING, BASE], [1], [], False, 0.8),
        ([LOADING, LOADING, FAILED], [], [], True, 2.2),
        ([OTHER], [], [1], False, 15.0),
        ([FIXED], [], [1], False, 0),
        ([RELEASED], [], [], False, 0),
        ([FAILED, FAILED, LOADING, LOADING, BASE], [1], [], False, 0.8),
        ([FAILED, LOADING, FAILED], [], [], True, 2.2),
        ([FAILED], [], [], True, 2.0),
        ([FAILED, *[LOADING] * 20, FAILED], [], [], True, 6.0),
        ([FAILED, LOADING], [], [], False, 15.0),
    ],
)
def test_a_server_is_waited_for_until_it_has_taken_the_choice_or_failed_again(
    answers: list[dict[str, Any]],
    live: list[int],
    others: list[int],
    failed: bool,
    took_s: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    clock: list[float],
) -> None:
    say_current(said(tmp_path, monkeypatch, Server(1, *answers)), True)
    found = json.loads(capsys.readouterr().out)
    assert (found["live_in"], found["not_taken_by"]) == (live, others)
    assert found["loading"] == ([] if live or others or failed or answers == [RELEASED] else [1])
    message = "The adapter cannot be read. Train it again."
    assert found["failed"] == ([{"pid": 1, "message": message}] if failed else [])
    assert clock[0] == pytest.approx(took_s, abs=0.25)


def test_a_server_that_is_still_failed_is_named_with_its_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    """It said that the base model was used from now on, and nothing of the server that answered nobody."""
    say_current(said(tmp_path, monkeypatch, Server(7, FAILED), Server(8, BASE), Server(9, LOADING)), False)
    text = " ".join(capsys.readouterr().err.split())
    assert "used from now on: the base model the server of process 8 has taken it" in text
    assert "the server of process 9 still loads its model, and takes it then" in text
    assert "the server of process 7 still has no model: The adapter cannot be read. Train it again." in text
