"""What every test gets: an environment of its own, no network, and the real 0.5B where it asks for it.

Everything that PlanPatch would read from the environment is removed, so that no test depends on the shell it was
started from. What steers the run itself is read first (steering.py).
"""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from engine.inference.loading import set_runtime_defaults
from tests.homes import make_home
from tests.results import Figure, Run, write_summary
from tests.steering import TEST_MODEL

ROOT = Path(__file__).resolve().parent.parent
TIERS = ("unit", "integration", "e2e")
LONG = os.environ.get("PLANPATCH_LONG") == "1"
SLOW = os.environ.get("PLANPATCH_SLOW") == "1"
RESULTS = os.environ.get("PLANPATCH_RESULTS")
TEST_HOME = Path(os.environ.get("PLANPATCH_TEST_HOME") or ROOT / ".venv" / "test-home").resolve()
_OURS = re.compile(
    r"PLANPATCH_(?!(TEST_HOME|LONG|RESULTS)$).*|(QWEN|GEN)_.*|TORCH_DTYPE|ADAPTER_PATH|CTX_LIMIT|CLEAN_RESP|OLLAMA_CTX_CHARS"
)

hypothesis.settings.register_profile("quick", deadline=None, derandomize=True)
hypothesis.settings.register_profile("long", deadline=None)
hypothesis.settings.load_profile("long" if LONG else "quick")


# --- the run ---------------------------------------------------------------------------------------------------------


def pytest_configure(config: pytest.Config) -> None:
    for name in [name for name in os.environ if _OURS.fullmatch(name)]:
        del os.environ[name]
    os.environ.update(HF_HUB_OFFLINE="1", PLANPATCH_TEST_HOME=str(TEST_HOME))
    set_runtime_defaults()
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background job; children would inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.stash[_RUN] = Run(arguments=list(config.invocation_params.args))
    config.stash[_STARTED] = time.monotonic()


_RUN = pytest.StashKey[Run]()
_STARTED = pytest.StashKey[float]()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark each test with its tier, run cheap tiers first, and leave out what this run is not for."""
    for item in items:
        item.add_marker(_tier(item))
    items.sort(key=lambda item: TIERS.index(_tier(item)))
    left_out = [item for item in items if not _is_wanted(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def _is_wanted(item: pytest.Item) -> bool:
    """A long run takes every test, a slow run the slow ones alone, a quick run all that are neither."""
    is_slow, is_long = (item.get_closest_marker(name) is not None for name in ("slow", "long"))
    return LONG or (not is_long and is_slow == SLOW)


def _tier(item: pytest.Item) -> str:
    parts = item.path.relative_to(ROOT / "tests").parts
    return parts[0] if parts[0] in TIERS else "unit"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    report = yield
    item.config.stash[_RUN].add(report.nodeid, report.outcome, report.duration)
    return report


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    run = config.stash[_RUN]
    if run.figures:
        terminalreporter.section("figures")
    for figure in run.figures:
        terminalreporter.write_line(f"{figure.name}: {figure.value} {figure.unit}".rstrip())
    if RESULTS:
        path = write_summary(run, Path(RESULTS), time.monotonic() - config.stash[_STARTED])
        terminalreporter.write_line(f"summary: {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}")


# --- isolation -------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A test that names no home still cannot reach the user's ledger."""
    for name in [name for name in os.environ if _OURS.fullmatch(name)]:
        monkeypatch.delenv(name)
    spare, settings = (tmp_path_factory.getbasetemp() / name for name in ("spare-home", "no-settings.toml"))
    settings.touch()
    monkeypatch.setenv("PLANPATCH_HOME", str(spare))
    monkeypatch.setenv("PLANPATCH_CONFIG", str(settings))


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> Iterator[None]:
    """Refuse connections that leave this machine; the one pull that tests need has happened before they start."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        host = address[0] if isinstance(address, tuple) else ""
        if self.family in (socket.AF_INET, socket.AF_INET6) and host not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"tests do not use the network: {host}")
        connect(self, address)

    patch = pytest.MonkeyPatch()
    patch.setattr(socket.socket, "connect", guarded)
    yield
    patch.undo()


# --- fixtures --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def long_run() -> bool:
    """Whether this is `run.py test --long`: tests that have a size take the full one."""
    return LONG


@pytest.fixture(scope="session")
def test_home() -> Path:
    """The tests' own PLANPATCH_HOME, kept between runs for its models alone."""
    return TEST_HOME


@pytest.fixture(scope="session")
def model_folder_05b(test_home: Path) -> Path:
    """Folder of the real Qwen2.5-Coder-0.5B; a test that needs it fails without it."""
    from engine.errors import ModelError
    from engine.inference.catalogue import resolve
    from engine.inference.store import ModelStore

    if TEST_MODEL:
        return Path(TEST_MODEL).resolve()
    try:
        return ModelStore(test_home).get(resolve("qwen2.5-coder-0.5b-instruct")).folder
    except ModelError as error:
        pytest.fail(f"{error.message} `python run.py test` pulls it into {test_home}.", pytrace=False)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, test_home: Path) -> Path:
    """A fresh PLANPATCH_HOME that shares the pulled models."""
    folder = make_home(tmp_path / "planpatch home", test_home)
    monkeypatch.setenv("PLANPATCH_HOME", str(folder))
    monkeypatch.setenv("PLANPATCH_CONFIG", str(folder / "planpatch.toml"))
    return folder


@pytest.fixture
def record_figure(request: pytest.FixtureRequest) -> Callable[[str, float | int | str, str], None]:
    """`record_figure(name, value, unit)` puts a measured figure into the run's summary."""

    def record(name: str, value: float | int | str, unit: str = "") -> None:
        request.config.stash[_RUN].figures.append(Figure(request.node.nodeid, name, value, unit))

    return record
