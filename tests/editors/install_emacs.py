"""Installs Emacs with eglot and lsp-mode for tests/e2e/test_emacs.py, on Debian and Ubuntu:

    python tests/editors/install_emacs.py           install what is missing; needs root or a sudo that asks nothing
    python tests/editors/install_emacs.py --check   say whether everything is there; exit code 1 if not

Standard library only. Elsewhere install Emacs 28 or newer with eglot and lsp-mode by hand; the test finds them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

PACKAGES = ("emacs-nox", "elpa-eglot", "elpa-lsp-mode")
PACKAGE_FOLDER = "/usr/share/emacs/site-lisp/elpa"  # where Debian's elpa-* packages are; `emacs -Q` does not look there
PROBE = f"""(progn
  (require 'package)
  (add-to-list 'package-directory-list "{PACKAGE_FOLDER}")
  (package-initialize)
  (require 'eglot)
  (require 'lsp-mode))"""


def missing() -> str:
    """Why the tests cannot run here; empty if they can."""
    if shutil.which("emacs") is None:
        return "there is no emacs on PATH"
    probe = subprocess.run(["emacs", "-Q", "--batch", "--eval", PROBE], capture_output=True, text=True)
    return "" if probe.returncode == 0 else f"emacs has no eglot or no lsp-mode: {probe.stderr.strip()[-300:]}"


def install() -> int:
    """Install the packages with apt-get and return its exit code."""
    if shutil.which("apt-get") is None:
        print("there is no apt-get here: install Emacs 28 or newer, eglot and lsp-mode by hand", file=sys.stderr)
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
    reason = missing()
    if reason and not arguments:
        if code := install():
            return code
        reason = missing()
    print(reason or "Emacs, eglot and lsp-mode are here")
    return 1 if reason else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
