"""The programs that tests of whole flows drive: Chromium, and VS Code with the packed extension."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import installed_launcher
from tests.editors.chromium import missing, program
from tests.editors.vscode import Installed, NoVSCodeError, vscode
from tests.steering import CHROMIUM
from tests.vscode import VSCode

ROOT = Path(__file__).resolve().parent.parent.parent
EXTENSION = ROOT / "vscode-extension"
MODEL = "qwen2.5-coder-0.5b-instruct"
Start = Callable[..., VSCode]


@pytest.fixture(scope="session")
def chromium_program() -> str:
    """Skip where there is no Chromium; where CI is set it has to be there."""
    reason = missing(CHROMIUM)
    if reason and os.environ.get("CI") == "true":
        pytest.fail(f"{reason}: python tests/editors/chromium.py", pytrace=False)
    if reason:
        pytest.skip(f"{reason}: python tests/editors/chromium.py installs it")
    found = program(CHROMIUM)
    assert found is not None
    return found


@pytest.fixture(scope="session")
def vscode_installed() -> Installed:
    """Skip where there is no VS Code; where CI is set it has to be there."""
    try:
        return vscode()
    except NoVSCodeError as error:
        if os.environ.get("CI") == "true":
            pytest.fail(str(error), pytrace=False)
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def vsix(vscode_installed: Installed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The extension, packed as it is for users, without a network."""
    assert (EXTENSION / "node_modules").is_dir(), f"{EXTENSION} has no node_modules: `npm ci` there, or `run.py test`"
    npm = [str(vscode_installed.node), str(vscode_installed.npm)]
    environment = {
        **vscode_installed.environment(),
        "npm_config_offline": "true",
        "PLANPATCH_PYTHON": sys.executable,
    }
    packed = subprocess.run(
        [*npm, "run", "package"],
        cwd=EXTENSION,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert packed.returncode == 0, packed.stdout + packed.stderr
    (made,) = EXTENSION.glob("*.vsix")
    return made.rename(tmp_path_factory.mktemp("vsix") / made.name)


@pytest.fixture(scope="session")
def unpacked(vsix: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the packed extension."""
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(vsix) as archive:
        archive.extractall(folder)
    return folder / "extension"


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """The folder that VS Code opens."""
    folder = tmp_path / "a workspace"
    folder.mkdir()
    return folder


@pytest.fixture
def start_code(
    vscode_installed: Installed, chromium_program: str, home: Path, workspace: Path, tmp_path: Path
) -> Start:
    """Makes a VS Code on the workspace whose servers find `planpatch` on PATH and use the real 0.5B on the CPU."""

    def start(environment: Mapping[str, str] | None = None, **options: Any) -> VSCode:
        own = {
            "PATH": f"{installed_launcher().parent}{os.pathsep}{os.environ['PATH']}",
            "PLANPATCH_MODEL": MODEL,
            "PLANPATCH_DEVICE": "cpu",
            "PLANPATCH_PLAN_MAX_TIME_CPU_S": "3600",  # a busy machine is no fault of what is tested here
            "PLANPATCH_PATCH_MAX_TIME_CPU_S": "3600",
        }
        folder = tmp_path / "code"
        return VSCode(vscode_installed, chromium_program, folder, workspace, {**own, **(environment or {})}, **options)

    return start
