"""The wheel holds the application and nothing else, and installs into an environment of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
NOT_PINNED = {"pip", "planpatch", "triton-windows"}  # the environment's own, ourselves, and what torch's build decides


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built offline from a copy of what git tracks or would track."""
    folder = tmp_path_factory.mktemp("a wheel")
    source = folder / "source"
    for name in ("engine", "lsp_server", "training", "scripts"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    (source / "tests").mkdir()
    (source / "tests" / "__init__.py").write_text("", encoding="utf-8")
    for name in ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "constraints.txt"):
        shutil.copy(ROOT / name, source / name)
    _pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder), str(source))
    return next(folder.glob("planpatch-*.whl"))


def _pip(*arguments: str, python: Path = Path(sys.executable)) -> None:
    command = [str(python), "-I", "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_wheel_holds_the_packages_the_data_and_the_launchers(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {
        "engine",
        "lsp_server",
        "planpatch-0.1.0.data",
        "planpatch-0.1.0.dist-info",
        "training",
    }
    assert {name for name in names if name.startswith("planpatch-0.1.0.data/")} == {
        "planpatch-0.1.0.data/scripts/planpatch",
        "planpatch-0.1.0.data/scripts/planpatch.cmd",
    }
    assert "engine/inference/catalogue.json" in names
    assert "lsp_server/http/status.html" in names
    for size in ("0.5b-edits-v2", "1.5b-edits-v1"):
        assert f"engine/inference/shipped/qwen2.5-coder-{size}/adapter_model.safetensors" in names
    assert "planpatch-0.1.0.dist-info/licenses/LICENSE" in names
    assert "planpatch-0.1.0.dist-info/entry_points.txt" not in names


def test_the_launchers_keep_the_newlines_of_their_platform(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    posix = archive.read("planpatch-0.1.0.data/scripts/planpatch")
    windows = archive.read("planpatch-0.1.0.data/scripts/planpatch.cmd")
    assert b"\r" not in posix
    assert windows.count(b"\n") == windows.count(b"\r\n") > 0
    assert windows.isascii()
    assert windows.count(b" -I ") == 1


def test_a_fresh_environment_gets_a_launcher_that_is_isolated(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "an environment"
    venv.create(environment, with_pip=False, symlinks=os.name != "nt")
    scripts = environment / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / ("python.exe" if os.name == "nt" else "python")
    _pip("--python", str(python), "install", "--no-deps", "--no-index", str(wheel))

    # The command's own dependencies are not installed here: a stand-in for lsp_server's entry shows how it was started.
    code = "import sys; print(sys.flags.isolated, sys.flags.utf8_mode, sys.argv[1:], sys.path)"
    package = next(environment.rglob("lsp_server"))
    (package / "__main__.py").write_text(code, encoding="utf-8")
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    for name in ("sitecustomize.py", "lsp_server.py"):
        (workspace / name).write_text("raise SystemExit('the workspace ran')", encoding="utf-8")

    launcher = scripts / ("planpatch.cmd" if os.name == "nt" else "planpatch")
    arguments = ["patch", "a file.py", "--intent", 'it\'s "here" & 100% 😀']
    result = subprocess.run(
        [str(launcher), *arguments] if os.name != "nt" else [str(launcher), *arguments[:3], "plain"],
        cwd=workspace,
        env={**os.environ, "PYTHONPATH": "."},
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    assert result.returncode == 0, result.stderr
    expected = arguments if os.name != "nt" else [*arguments[:3], "plain"]
    assert result.stdout.startswith(f"1 1 {expected} ")
    assert str(workspace) not in result.stdout.removeprefix(f"1 1 {expected} ")


def test_every_pin_satisfies_the_package_and_every_dependency_is_pinned() -> None:
    from packaging.requirements import Requirement

    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    asked = [Requirement(text) for group in groups for text in group]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]

    wrong: list[str] = []
    for requirement in asked:
        versions = [next(iter(pin.specifier)).version for pin in pins if pin.name == requirement.name.replace("_", "-")]
        if not versions and requirement.name not in NOT_PINNED:
            wrong.append(f"{requirement.name} is not pinned")
        wrong += [f"{requirement}, not {version}" for version in versions if version not in requirement.specifier]
    assert wrong == []
