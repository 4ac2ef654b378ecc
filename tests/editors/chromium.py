"""Installs Chromium for tests/e2e/test_status_page.py, on Debian:

    python tests/editors/chromium.py           install it if it is missing; needs root or a sudo that asks nothing
    python tests/editors/chromium.py --check   say whether it is there; exit code 1 if not

Standard library only. Elsewhere install Chromium or Chrome by hand, or name one in PLANPATCH_CHROMIUM.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

PACKAGES = ("chromium", "fonts-dejavu-core")
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
VARIABLE = "PLANPATCH_CHROMIUM"


def program(named: str = "") -> str | None:
    """The browser to test with: the one that is named, else the first on PATH; None if there is none."""
    return shutil.which(named) if named else next(filter(None, map(shutil.which, NAMES)), None)


def missing(named: str = "") -> str:
    """Why the tests cannot run here; empty if they can."""
    found = program(named)
    if found is None:
        return f"there is no {named or 'chromium on PATH'}"
    probe = subprocess.run([found, "--version"], capture_output=True, text=True)
    return "" if probe.returncode == 0 else f"{found} does not start: {probe.stderr.strip()[-300:]}"


def install() -> int:
    """Install the packages with apt-get and return its exit code."""
    if shutil.which("apt-get") is None:
        print("there is no apt-get here: install Chromium by hand", file=sys.stderr)
        return 3
    prefix = [] if os.geteuid() == 0 else ["sudo", "-n"]
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    install_command = ["apt-get", "install", "-y", "--no-install-recommends", *PACKAGES]
    for command in (["apt-get", "update"], install_command):
        code = subprocess.call([*prefix, *command], env=environment, stdin=subprocess.DEVNULL)
        if code:
            return code
    return 0


def main(arguments: list[str]) -> int:
    """Run one command and return its exit code."""
    if arguments not in ([], ["--check"]):
        print(__doc__)
        return 2
    named = os.environ.get(VARIABLE, "")
    reason = missing(named)
    if reason and not arguments and not named:
        if code := install():
            return code
        reason = missing()
    print(reason or f"{program(named)} is here")
    return 1 if reason else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
