"""A workspace full of files with our modules' names runs none of them, whatever PYTHONPATH says."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
HOSTILE_FILES = (
    "engine/__init__.py",
    "engine/errors.py",
    "lsp_server/__init__.py",
    "lsp_server/__main__.py",
    "lsp_server/cli.py",
    "torch.py",
    "transformers.py",
    "typer.py",
    "typing.py",
    "json.py",
    "sitecustomize.py",
    "usercustomize.py",
    "planpatch.py",
    "planpatch",
    "python",
    "readlink",
)
# Says by a file of its own that it ran, in Python and in sh alike, and stops what runs it.
SNITCH = """#!/bin/sh
''':'
echo ran > "$PP_MARKERS/$(echo "$0" | tr / _)"
exit 66
'''
import os
open(os.path.join(os.environ["PP_MARKERS"], __name__ + "-in-python"), "w").close()
raise SystemExit(66)
"""


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A workspace whose every file tells when it runs."""
    workspace = tmp_path / "hostile workspace"
    for name in HOSTILE_FILES:
        path = workspace / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(SNITCH, encoding="utf-8", newline="\n")
        path.chmod(0o755)
    (tmp_path / "markers").mkdir()
    return workspace


def installed_launcher() -> Path:
    """The `planpatch` command of the environment that runs the tests."""
    folder = Path(sys.executable).parent
    launcher = folder / ("planpatch.cmd" if os.name == "nt" else "planpatch")
    assert launcher.exists(), f"{launcher} is missing: PlanPatch is not installed here; use `python run.py test`"
    return launcher


def run_in(workspace: Path, command: list[str], home: Path) -> subprocess.CompletedProcess[str]:
    """Run a command in the workspace the way a user with the worst of settings would."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([".", str(workspace)]),
        "PYTHONSTARTUP": str(workspace / "sitecustomize.py"),
        "PATH": os.pathsep.join([".", os.environ["PATH"]]),
        "PP_MARKERS": str(workspace.parent / "markers"),
        "PLANPATCH_HOME": str(home),
    }
    return subprocess.run(
        command, cwd=workspace, env=environment, capture_output=True, text=True, encoding="utf-8", check=False
    )


def markers(workspace: Path) -> list[str]:
    """What of the workspace ran."""
    return sorted(path.name for path in (workspace.parent / "markers").iterdir())


def test_the_workspace_would_run_without_isolation(hostile: Path, home: Path) -> None:
    result = run_in(hostile, [sys.executable, "-c", "print('started')"], home)
    assert markers(hostile) != [], result.stdout + result.stderr


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["models", "list", "--json"]])
def test_the_launcher_runs_nothing_of_the_workspace(hostile: Path, home: Path, arguments: list[str]) -> None:
    result = run_in(hostile, [str(installed_launcher()), *arguments], home)
    assert (markers(hostile), result.returncode) == ([], 0), result.stdout + result.stderr
    assert result.stdout.strip()


@pytest.mark.parametrize("arguments", [["--version"], ["models", "list", "--json"]])
def test_the_module_runs_nothing_of_the_workspace(hostile: Path, home: Path, arguments: list[str]) -> None:
    result = run_in(hostile, [sys.executable, "-I", "-X", "utf8", "-m", "lsp_server", *arguments], home)
    assert (markers(hostile), result.returncode) == ([], 0), result.stdout + result.stderr


def test_the_model_libraries_come_from_the_environment_not_the_workspace(hostile: Path, home: Path) -> None:
    code = "import engine, lsp_server, torch, transformers; print(engine.__file__, lsp_server.__file__, torch.__file__)"
    result = run_in(hostile, [sys.executable, "-I", "-c", code], home)
    assert (markers(hostile), result.returncode) == ([], 0), result.stderr
    assert str(hostile) not in result.stdout


@pytest.mark.skipif(os.name == "nt", reason="uv tool and pipx link on POSIX and copy on Windows")
@pytest.mark.parametrize("kind", ["absolute link", "relative link", "link to a link"])
def test_the_launcher_is_isolated_behind_links(hostile: Path, home: Path, tmp_path: Path, kind: str) -> None:
    launcher, folder = installed_launcher(), tmp_path / "user bin"
    folder.mkdir()
    link = folder / "planpatch"
    if kind == "relative link":
        link.symlink_to(os.path.relpath(launcher, folder.resolve()))
    elif kind == "absolute link":
        link.symlink_to(launcher)
    else:
        (folder / "second").symlink_to(launcher)
        link.symlink_to("second")
    result = run_in(hostile, [str(link), "--version"], home)
    assert (markers(hostile), result.returncode) == ([], 0), result.stdout + result.stderr


@pytest.mark.skipif(os.name == "nt", reason="a POSIX launcher")
def test_a_launcher_without_its_environment_says_what_to_do(hostile: Path, home: Path, tmp_path: Path) -> None:
    lonely = tmp_path / "lonely"
    lonely.mkdir()
    copy = shutil.copy(installed_launcher(), lonely / "planpatch")
    result = run_in(hostile, [str(copy), "--version"], home)
    assert result.returncode == 3
    assert result.stderr == (
        f"planpatch: there is no Python beside {copy}.\n"
        "Install PlanPatch in an environment of its own, for example with 'uv tool install planpatch'"
        " or 'pipx install planpatch'.\n"
    )
    assert markers(hostile) == []


@pytest.mark.skipif(os.name == "nt", reason="a POSIX locale")
def test_text_is_utf8_even_in_the_c_locale(home: Path, tmp_path: Path) -> None:
    overrides = {"LC_ALL": "C", "LANG": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "COLUMNS": "500"}
    environment = {**os.environ, **overrides, "PLANPATCH_HOME": str(home)}
    command = [str(installed_launcher()), "patch", "größe😀.py", "--function", "f", "--intent", "x"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert result.returncode == 2
    assert "größe😀.py" in (result.stdout + result.stderr).decode("utf-8")


def test_importing_the_patching_package_loads_no_model_library(home: Path) -> None:
    code = (
        "import importlib, pkgutil, sys, engine.patching as package\n"
        "modules = pkgutil.walk_packages(package.__path__, 'engine.patching.')\n"
        "for module in modules: importlib.import_module(module.name)\n"
        "print(sorted({'torch', 'transformers', 'tokenizers', 'peft'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-I", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.stdout, result.stderr) == ("[]\n", "")
