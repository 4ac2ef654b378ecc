"""Installs the programs' libraries that speak Ollama, for tests/e2e/test_http_clients.py:

    python tests/clients/install.py           into .venv/clients; needs npm for JavaScript's
    python tests/clients/install.py --check   say whether they are there; exit code 1 if not

Standard library only.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
FOLDER = HERE.parent.parent / ".venv" / "clients"
PYTHON = FOLDER / "python" / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
NODE_MODULES = FOLDER / "node" / "node_modules"


def missing() -> str:
    """Why the tests cannot run here; empty if they can."""
    if not PYTHON.is_file():
        return f"there is no {PYTHON}"
    probe = subprocess.run([PYTHON, "-c", "import langchain_ollama, litellm, ollama"], capture_output=True, text=True)
    if probe.returncode:
        return f"a client of Python is missing: {probe.stderr.strip()[-300:]}"
    if shutil.which("node") is None:
        return "there is no node"
    return "" if (NODE_MODULES / "ollama").is_dir() else f"there is no ollama in {NODE_MODULES}"


def install() -> int:
    """Install what requirements.txt and package.json name, and return an exit code."""
    npm = shutil.which("npm")
    if npm is None:
        print("there is no npm here: install Node.js with npm", file=sys.stderr)
        return 3
    if not PYTHON.is_file():
        venv.create(PYTHON.parent.parent, with_pip=True)
    packages = [PYTHON, "-m", "pip", "install", "--quiet", "-r", HERE / "requirements.txt"]
    NODE_MODULES.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(HERE / "package.json", NODE_MODULES.parent)
    modules = [npm, "install", "--no-audit", "--no-fund", "--prefix", NODE_MODULES.parent]
    for command in (packages, modules):
        code = subprocess.call([str(part) for part in command], stdin=subprocess.DEVNULL)
        if code:
            return code
    return 0


def main(arguments: list[str]) -> int:
    """Run one command and return its exit code."""
    if arguments not in ([], ["--check"]):
        print(__doc__)
        return 2
    reason = missing()
    if reason and not arguments:
        if code := install():
            return code
        reason = missing()
    print(reason or f"the clients are in {FOLDER}")
    return 1 if reason else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
