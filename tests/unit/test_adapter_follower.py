"""A server whose model failed to load because of its adapter: another choice brings it back."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.errors import AdapterError, ModelError
from engine.inference.adapters import read_adapter
from engine.patching.ledger import Ledger
from lsp_server import adapter_follower
from lsp_server.adapter_choice import AdapterChoice
from lsp_server.adapter_follower import AdapterFollower
from lsp_server.http.app import make_app
from lsp_server.http.errors import HttpError
from lsp_server.http.service import Service
from lsp_server.model_host import ModelHost
from lsp_server.paths import Paths
from lsp_server.process_marks import own_facts
from lsp_server.records import Records
from lsp_server.session import Session
from lsp_server.settings import Settings
from tests.unit.test_adapters import write
from tests.unit.test_http_guard import ask

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n"
PLAN = b'{"intent": "x", "code_paste": "x = 1"}'


class Weights:
    """What a load takes."""


class Engine:
    """As much of an engine as host and follower use. It keeps an unreadable adapter's error with its frames."""

    open = most = 0
    weights: weakref.ref[Any] | None = None

    def __init__(self, adapter: Path | None) -> None:
        self._adapter = adapter
        Engine.open += 1
        Engine.most = max(Engine.most, Engine.open)

    def wait_until_ready(self) -> None:
        weights = Weights()
        Engine.weights = weakref.ref(weights)
        time.sleep(0.05)
        try:
            if self._adapter is not None:
                read_adapter(self._adapter)
        except AdapterError as error:
            self._failure = error
            raise

    def use_adapter(self, path: str | None) -> None:
        self._adapter = None if path is None else Path(path)

    def status(self) -> Any:
        return SimpleNamespace(
            state="ready", adapter=str(self._adapter) if self._adapter else None, num_running=0, num_waiting=0
        )

    def close(self) -> None:
        Engine.open -= 1


class Home(Session):
    """A session with a model of no weights. `read` holds loads after they read the choice."""

    def __init__(self, folder: Path) -> None:
        super().__init__(Paths(folder, folder / "planpatch.toml"), Settings(), [])
        self.num_loads = 0
        self.fault: Exception | None = None
        self.read = threading.Event()
        self.read.set()

    def model_ref(self) -> Any:
        return SimpleNamespace(name="tiny", hub_id="")

    def local_model(self, ref: Any, progress: Any = None, *, pull: bool = False) -> Any:
        return SimpleNamespace(name="tiny", hub_id="")

    def engine(self, local: Any, ref: Any) -> Any:
        self.num_loads += 1
        if self.fault is not None:
            raise self.fault
        adapter = self.adapter("")
        self.read.wait(10)
        return Engine(adapter)

    def choose(self, folder: Path | None) -> None:
        AdapterChoice(self.paths.adapter_choice).use(folder)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """A home whose chosen adapter is a git-lfs pointer; servers look often."""
    monkeypatch.setattr(adapter_follower, "_LOOK_EVERY_S", 0.02)
    Engine.open = Engine.most = 0
    damage(write(tmp_path / "house-v1"))
    write(tmp_path / "house-v2")
    home = Home(tmp_path)
    home.choose(tmp_path / "house-v1")
    return home


@pytest.fixture
def host(home: Home) -> Iterator[ModelHost]:
    """The model of a server that follows the home's choice."""
    host = ModelHost(lambda status: None)
    follower = AdapterFollower(host, lambda: home, lambda message, is_done: None)
    follower.start()
    host.start(home)
    yield host
    follower.close()
    host.close()
    assert (Engine.open, Engine.most) in ((0, 0), (0, 1)), "each model is closed, before another is read"


def damage(folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(POINTER)


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_failed(host: ModelHost) -> bool:
    return host.status.state == "failed"


def runs_with(host: ModelHost) -> str | None:
    """The folder's name of the adapter that the server runs with once its model is ready."""
    until(lambda: host.engine_or_none is not None)
    engine = host.engine_or_none
    assert engine is not None
    adapter = engine.status().adapter
    return None if adapter is None else Path(adapter).name


@pytest.mark.parametrize("name", ["house-v2", None])
def test_a_server_that_an_adapter_kept_from_its_model_loads_again_with_another_one(
    home: Home, host: ModelHost, tmp_path: Path, name: str | None
) -> None:
    """It said `failed` for ever, while `adapters use` said that another one was used from now on."""
    until(lambda: is_failed(host))
    home.choose(tmp_path / name if name else None)
    assert runs_with(host) == name


def test_the_same_adapter_chosen_again_after_it_was_mended_is_taken(
    home: Home, host: ModelHost, tmp_path: Path
) -> None:
    until(lambda: is_failed(host))
    write(tmp_path / "house-v1")
    AdapterChoice(home.paths.adapter_choice).renew()
    assert runs_with(host) == "house-v1"


def test_a_load_that_failed_has_given_its_memory_back_before_that_is_told(home: Home, host: ModelHost) -> None:
    gc.disable()
    try:
        until(lambda: is_failed(host))
        assert Engine.weights is not None and Engine.weights() is None
    finally:
        gc.enable()


def test_without_a_choice_a_failed_server_is_left_alone(home: Home, host: ModelHost) -> None:
    until(lambda: is_failed(host))
    time.sleep(0.2)
    assert (host.status.state, home.num_loads) == ("failed", 1)


def test_a_choice_that_fails_too_is_tried_once(home: Home, host: ModelHost, tmp_path: Path) -> None:
    until(lambda: is_failed(host))
    damage(tmp_path / "house-v2")
    home.choose(tmp_path / "house-v2")
    until(lambda: "house-v2" in host.status.message)
    until(lambda: is_failed(host))
    time.sleep(0.2)
    assert home.num_loads == 2


def test_a_choice_that_comes_while_a_load_has_read_the_one_before_is_not_lost(home: Home, tmp_path: Path) -> None:
    host = ModelHost(lambda status: None)
    follower = AdapterFollower(host, lambda: home, lambda message, is_done: None)
    home.read.clear()
    follower.start()
    host.start(home)
    until(lambda: home.num_loads == 1)
    time.sleep(0.1)
    home.choose(tmp_path / "house-v2")
    time.sleep(0.1)
    home.read.set()
    assert runs_with(host) == "house-v2"
    assert (home.num_loads, Engine.most) == (2, 1)
    follower.close()
    host.close()
    assert Engine.open == 0


def test_an_adapter_damaged_while_training_had_the_memory_is_chosen_again_after_it_was_mended(
    home: Home, host: ModelHost, tmp_path: Path
) -> None:
    until(lambda: is_failed(host))
    write(tmp_path / "house-v1")
    home.choose(tmp_path / "house-v1")
    assert runs_with(host) == "house-v1"
    facts = own_facts()
    assert host.release(facts, "Training")
    damage(tmp_path / "house-v1")
    assert host.resume(facts["pid"])
    until(lambda: is_failed(host))
    write(tmp_path / "house-v1")
    home.choose(tmp_path / "house-v1")
    assert runs_with(host) == "house-v1"


def test_a_choice_while_training_has_the_memory_loads_nothing(home: Home, host: ModelHost, tmp_path: Path) -> None:
    until(lambda: is_failed(host))
    facts = own_facts()
    assert host.release(facts, "Training")
    home.choose(tmp_path / "house-v2")
    time.sleep(0.2)
    assert (host.status.state, home.num_loads) == ("released", 1)
    host.resume(facts["pid"])
    assert runs_with(host) == "house-v2"
    assert home.num_loads == 2


def test_nothing_is_loaded_again_where_nothing_failed_or_the_server_closes(home: Home, host: ModelHost) -> None:
    until(lambda: is_failed(host))
    home.choose(None)
    runs_with(host)
    assert not host.retry(home)
    host.close()
    assert not host.retry(home)
    assert home.num_loads == 2


def test_a_failed_server_answers_503_without_retry_after_until_another_adapter_is_chosen(
    home: Home, host: ModelHost
) -> None:
    app = make_app(Service(host, lambda: home, Records(lambda: Ledger(home.paths.ledger)), "t0ken"))
    until(lambda: is_failed(host))
    answer = ask(app, "POST", "/plan", body=PLAN)
    assert (answer.status, answer.json["error"]["code"]) == (503, "failed")
    assert "retry-after" not in answer.headers


def test_who_waited_for_a_load_that_fails_is_not_told_to_come_again(home: Home, host: ModelHost) -> None:
    until(lambda: is_failed(host))
    service = Service(host, lambda: home, Records(lambda: Ledger(home.paths.ledger)), "t0ken")
    home.read.clear()
    host.start(home)
    threading.Timer(0.1, home.read.set).start()
    with pytest.raises(HttpError, match="cannot be read") as caught:
        asyncio.run(service.engine())
    assert (caught.value.status, caught.value.headers()) == (503, {})


def test_an_unreadable_adapter_is_one_line_in_the_log(
    home: Home, host: ModelHost, caplog: pytest.LogCaptureFixture
) -> None:
    until(lambda: is_failed(host))
    (line,) = [record for record in caplog.records if record.name == "planpatch.model"]
    assert line.exc_info is None and line.levelno == logging.ERROR
    assert line.getMessage().startswith("The adapter in ") and line.getMessage().endswith(". Train or copy it again.")


def test_the_cause_of_one_of_our_errors_is_no_traceback_and_a_library_that_fails_has_one(
    home: Home, host: ModelHost, caplog: pytest.LogCaptureFixture
) -> None:
    until(lambda: is_failed(host))
    caplog.clear()
    home.fault = ModelError("It is\n damaged", hint="Pull it again.")
    home.fault.__cause__ = OSError("cut off")
    home.choose(None)
    until(lambda: is_failed(host) and "damaged" in host.status.message)
    home.fault = RuntimeError("no kernel image")
    home.choose(None)
    until(lambda: is_failed(host) and "kernel" in host.status.message)
    ours, theirs = [record for record in caplog.records if record.name == "planpatch.model"]
    assert (ours.getMessage(), ours.exc_info) == ("It is damaged. Pull it again.", None)
    assert theirs.exc_info is not None
