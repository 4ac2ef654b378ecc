"""Where state is kept."""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

import pytest

from engine.errors import PathError, WriteError
from lsp_server.paths import find_paths, make_private_folder


def test_all_state_lies_under_the_home(tmp_path: Path) -> None:
    home = tmp_path / "home 😀"
    paths = find_paths({"PLANPATCH_HOME": str(home)})
    shown = {
        name: getattr(paths, name).relative_to(home).as_posix()
        for name in ("ledger", "models", "plans", "runtime_file", "success_logs", "training_data", "default_adapter")
    }
    assert shown == {
        "ledger": "ledger.sqlite3",
        "models": "models",
        "plans": "plans",
        "runtime_file": "runtime.json",
        "success_logs": "training/success_logs",
        "training_data": "training/data",
        "default_adapter": "training/qlora-out/adapter",
    }
    assert not home.exists()


def test_without_variables_the_platforms_user_folders_are_taken() -> None:
    paths = find_paths({})
    assert paths.home.is_absolute() and paths.home.name == "planpatch"
    assert paths.user_settings.is_absolute() and paths.user_settings.name == "planpatch.toml"


@pytest.mark.parametrize("variable", ["PLANPATCH_HOME", "PLANPATCH_CONFIG"])
def test_a_relative_home_is_refused_because_it_would_move_with_the_folder(variable: str) -> None:
    with pytest.raises(PathError) as caught:
        find_paths({variable: "state"})
    assert caught.value.message.startswith(f"{variable} is 'state', a relative path")
    assert caught.value.hint == f"Set {variable} to an absolute path."


def test_a_tilde_is_the_users_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("USERPROFILE" if sys.platform == "win32" else "HOME", str(tmp_path))
    assert find_paths({"PLANPATCH_HOME": "~/pp"}).home == tmp_path / "pp"


def test_relative_paths_of_settings_stand_under_the_home_not_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = tmp_path / "workspace"
    (workspace / "training").mkdir(parents=True)
    monkeypatch.chdir(workspace)
    paths = find_paths({"PLANPATCH_HOME": str(tmp_path / "home")})
    assert paths.resolve("training/qlora-out/adapter") == tmp_path / "home/training/qlora-out/adapter"
    assert paths.resolve(str(tmp_path / "mine")) == tmp_path / "mine"


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
def test_new_folders_are_private_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o000)
    try:
        made = make_private_folder(tmp_path / "a" / "b")
    finally:
        os.umask(before)
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in (made.parent, made)] == [0o700, 0o700]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
def test_a_folder_that_exists_keeps_its_permissions(tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o755)
    make_private_folder(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("not a folder", encoding="utf-8")
    with pytest.raises(WriteError) as caught:
        make_private_folder(tmp_path / "home" / "plans")
    assert str(tmp_path / "home" / "plans") in caught.value.message
    with pytest.raises(WriteError, match="is a file"):
        make_private_folder(tmp_path / "home")
