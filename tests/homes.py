"""A fresh PLANPATCH_HOME that shares the pulled models."""

from __future__ import annotations

import sys
from pathlib import Path


def make_home(folder: Path, test_home: Path) -> Path:
    """Make `folder` a home without settings whose models are those of the tests' own home."""
    folder.mkdir(mode=0o700)
    (test_home / "models").mkdir(parents=True, exist_ok=True)
    _link_folder(folder / "models", test_home / "models")
    (folder / "planpatch.toml").touch()
    return folder


def _link_folder(link: Path, target: Path) -> None:
    """Link a folder; on Windows a junction, which needs no privilege."""
    if sys.platform == "win32":
        import _winapi

        _winapi.CreateJunction(str(target), str(link))
    else:
        link.symlink_to(target, target_is_directory=True)
