"""The model of a language server: absent, too large, failing, replaced; and who else holds memory."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.errors import CancelledError, ModelError
from lsp_server.model_host import HostStatus, ModelHost, ServerMark, other_holders
from lsp_server.paths import Paths


class FakeSession:
    """As much of a session as the host uses; `fault` is raised where the model is looked for."""

    def __init__(self, folder: Path, fault: Exception) -> None:
        self.paths = Paths(folder, folder / "none.toml")
        self._fault = fault

    def model_ref(self) -> Any:
        raise self._fault


def loaded(session: FakeSession) -> tuple[ModelHost, list[HostStatus]]:
    seen: list[HostStatus] = []
    host = ModelHost(seen.append)
    host.start(session)  # type: ignore[arg-type]
    deadline = time.monotonic() + 10
    while host.status.state == "loading" and time.monotonic() < deadline:
        time.sleep(0.01)
    return host, seen


def test_an_absent_model_is_told_with_what_to_do(tmp_path: Path) -> None:
    host, seen = loaded(FakeSession(tmp_path, ModelError("It is not here", hint="Pull it", absent=True)))
    assert [status.state for status in seen] == ["loading", "absent"]
    with pytest.raises(ModelError, match="It is not here") as caught:
        host.wait(threading.Event())
    assert caught.value.hint == "Pull it"


def test_too_little_memory_names_who_holds_it(tmp_path: Path) -> None:
    folder = tmp_path / "servers"
    folder.mkdir()
    other = os.getppid()
    facts = {"pid": other, "client": "Neovim", "workspace": "/work/app", "model": "qwen3-8b"}
    (folder / f"{other}.json").write_text(json.dumps(facts))
    (folder / "99999999.json").write_text(json.dumps({"pid": 99999999, "model": "gone"}))
    (folder / "bad.json").write_text("{")
    host, _ = loaded(FakeSession(tmp_path, ModelError("It needs 9 GB, and 2 are free", needed_bytes=9)))
    assert host.status.state == "failed"
    assert host.status.reason == "held"
    assert host.status.message.startswith("It needs 9 GB, and 2 are free; process ")
    assert f"process {other} (Neovim, /work/app) holds qwen3-8b, " in host.status.message
    assert [file.name for file in folder.iterdir()] == [f"{other}.json"], "marks of the dead are removed"


def test_too_little_memory_that_nobody_holds_is_told_apart(tmp_path: Path) -> None:
    host, _ = loaded(FakeSession(tmp_path, ModelError("It needs 9 GB, and 2 are free", needed_bytes=9)))
    assert (host.status.reason, host.status.message) == ("memory", "It needs 9 GB, and 2 are free")


def test_a_library_that_fails_leaves_the_server_alive(tmp_path: Path) -> None:
    host, _ = loaded(FakeSession(tmp_path, RuntimeError("no kernel image")))
    assert host.status.message == "The model cannot be loaded: RuntimeError: no kernel image"


class TwoModels:
    """A session whose model takes a while to read; it notes who reads at once."""

    now, most, read = 0, 0, 0

    def __init__(self, folder: Path, name: str) -> None:
        self.paths = Paths(folder, folder / "none.toml")
        self.name = name

    def model_ref(self) -> Any:
        return SimpleNamespace(name=self.name)

    def local_model(self, ref: Any, progress: Any, *, pull: bool) -> Any:
        return SimpleNamespace(name=self.name)

    def engine(self, local: Any, ref: Any) -> Any:
        def wait() -> None:
            TwoModels.now, TwoModels.read = TwoModels.now + 1, TwoModels.read + 1
            TwoModels.most = max(TwoModels.most, TwoModels.now)
            time.sleep(0.2)

        def close() -> None:
            TwoModels.now -= 1

        return SimpleNamespace(wait_until_ready=wait, close=close, status=lambda: SimpleNamespace(state="ready"))


def test_models_are_read_one_at_a_time_and_those_not_wanted_any_more_not_at_all(tmp_path: Path) -> None:
    """VS Code's settings came twice, two threads imported transformers at once, and every second start failed."""
    host = ModelHost(lambda status: None)
    for name in ("first", "second", "third"):
        host.start(TwoModels(tmp_path, name))  # type: ignore[arg-type]
        time.sleep(0.05)
    host.wait(threading.Event())
    assert (host.status.model, TwoModels.most, TwoModels.read) == ("third", 1, 2)
    host.close()
    assert TwoModels.now == 0


def test_a_wait_ends_when_its_job_is_cancelled() -> None:
    host, is_cancelled = ModelHost(lambda status: None), threading.Event()
    is_cancelled.set()
    with pytest.raises(CancelledError):
        host.wait(is_cancelled)


def test_a_server_marks_itself_and_does_not_name_itself(tmp_path: Path) -> None:
    mark = ServerMark(tmp_path / "servers")
    mark.write("Emacs", "/work", "qwen")
    assert json.loads((tmp_path / "servers" / f"{os.getpid()}.json").read_text())["client"] == "Emacs"
    assert other_holders(tmp_path / "servers") == []
    mark.remove()
    assert list((tmp_path / "servers").iterdir()) == []
