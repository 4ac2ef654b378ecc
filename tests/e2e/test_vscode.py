"""Real VS Code with the packed extension, the real server and the real 0.5B, driven as a user types and clicks.

Pictures of what is seen go to the folder that PLANPATCH_PICTURES names, for the documents; else to the test's own.

Not covered: the desktop application's own window and its file dialogs, Remote-SSH and dev containers, other platforms.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.command_line import planpatch
from tests.e2e.conftest import MODEL, Start
from tests.steering import PICTURES
from tests.vscode import VSCode, wait_until

CLAMP = '''"""Numbers."""


def clamp(x, low, high):
    if x < low:
        return high
    return min(x, high)
'''
TOAST = ".notification-toast"


@pytest.fixture
def code(start_code: Start, vsix: Path, model_folder_05b: Path) -> VSCode:
    """A VS Code that has the extension; the test starts it."""
    code = start_code()
    code.install(vsix)
    return code


@pytest.fixture
def picture(tmp_path: Path) -> Callable[[VSCode, str], Path]:
    """Keeps a picture of the window."""
    folder = Path(PICTURES) if PICTURES else tmp_path
    return lambda code, name: code.picture(folder / f"{name}.png")


def servers(code: VSCode) -> list[psutil.Process]:
    """The language servers that this VS Code started."""
    children = psutil.Process(code.process_id).children(recursive=True)
    return [child for child in children if child.is_running() and "lsp_server" in _command_line(child)]


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []


def ledger(folder: Path) -> list[dict[str, Any]]:
    return planpatch("ledger", "list", "--json", cwd=folder).json


def long_function() -> str:
    """A function whose rewriting takes a while."""
    branches = (f"    if x == {number}:\n        return table[{number}] + {number}\n" for number in range(60))
    return f"\n\ndef long(x, table):\n{''.join(branches)}    return None\n"


# --- what it weighs --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_extension_is_small_and_brings_nothing_but_itself(vsix: Path, record_figure: Callable[..., None]) -> None:
    size = vsix.stat().st_size
    record_figure("vsix", size, "bytes")
    assert size < 1_000_000
    with zipfile.ZipFile(vsix) as archive:
        names = archive.namelist()
    assert "extension/out/extension.js" in names
    unwanted = ("node_modules", "/src/", "/test/", ".map", "package-lock", ".ts")
    assert [name for name in names if any(part in name for part in unwanted)] == []


# --- when something is not there -------------------------------------------------------------------------------------


@pytest.mark.long
def test_nothing_starts_before_a_python_file_is_open_and_a_server_that_is_killed_comes_back(
    code: VSCode, workspace: Path
) -> None:
    (workspace / "notes.md").write_text("# Notes\n", encoding="utf-8")
    (workspace / "clamp.py").write_text(CLAMP, encoding="utf-8")
    with code:
        code.open("notes.md")
        code.wait_for_extensions()
        assert servers(code) == []

        code.open("clamp.py")
        wait_until(lambda: "planpatch 0" in code.log_of("PlanPatch"), "no server was started")
        (first,) = servers(code)
        first.kill()
        (second,) = wait_until(lambda: [one for one in servers(code) if one.pid != first.pid], "no server came back")
        assert second.pid != first.pid

        code.go_to(5)
        code.press("Control+Alt+P")
        code.answer("return low when x is too small")
        code.wait_for(".tab", "clamp-clamp.md", 120)


@pytest.mark.long
def test_a_model_that_is_not_there_is_told_and_one_click_gets_it(
    start_code: Start,
    vsix: Path,
    workspace: Path,
    home: Path,
    tmp_path: Path,
    model_folder_05b: Path,
    picture: Callable[[VSCode, str], Path],
) -> None:
    (home / "models").unlink()
    cache = a_hub_cache(tmp_path / "hub", model_folder_05b)
    (workspace / "clamp.py").write_text(CLAMP, encoding="utf-8")
    code = start_code({"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"})
    code.install(vsix)
    with code:
        code.open("clamp.py")
        said = code.wait_for(TOAST, "not on this machine")
        picture(code, "model-missing")
        assert MODEL in said
        assert len(code.texts(TOAST, "not on this machine")) == 1
        code.click(f"{TOAST} .monaco-button", "Download Model")
        wait_until(lambda: (home / "models" / MODEL / "model.safetensors").is_file(), "no model came", 120)
        code.go_to(5)
        code.press("Control+Alt+P")
        code.answer("return low when x is too small")
        code.wait_for(".tab", "clamp-clamp.md", 120)


def a_hub_cache(folder: Path, model: Path) -> Path:
    """The cache that the hub's own library would have after fetching the model: what "pull" takes first."""
    from engine.inference.catalogue import resolve

    known = resolve(MODEL)
    assert known.hub_id is not None and known.revision is not None
    snapshot = folder / f"models--{known.hub_id.replace('/', '--')}" / "snapshots" / known.revision
    snapshot.mkdir(parents=True)
    for file in model.iterdir():
        if file.name != "planpatch-model.json":
            (snapshot / file.name).symlink_to(file)
    return folder
