"""`planpatch doctor`: what works on this machine, and what to do about the rest.

Each check stands alone: when it breaks, what broke becomes its result and the others go on. No model is loaded.
"""

from __future__ import annotations

import os
import shutil
import stat
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import typer
from rich.table import Table
from rich.text import Text

from engine.errors import ModelError, PlanPatchError
from engine.inference.adapters import read_adapter
from engine.inference.catalogue import ModelRef, shipped_adapter
from engine.inference.loading import free_memory_bytes
from engine.inference.store_files import gigabytes
from engine.patching.ledger import Ledger
from lsp_server import console
from lsp_server.cli_options import JsonOption
from lsp_server.doctor_machine import (
    Check,
    bitsandbytes_checks,
    cpu_checks,
    kernel_checks,
    package_checks,
    python_checks,
    torch_checks,
)
from lsp_server.paths import Paths
from lsp_server.session import Session

_HUB_TIMEOUT_S = 4.0
_LITTLE_DISK_BYTES = 2 * 10**9
_COLOURS = {"ok": "green", "warning": "yellow", "problem": "bold red"}
_MARKS = {"ok": "ok", "warning": "warning", "problem": "PROBLEM"}


def doctor(as_json: JsonOption = False) -> None:
    """Say what works on this machine, and what to do about the rest. Exit code 3 when something needed is broken."""
    checks = examine(os.environ)
    is_well = all(check.level != "problem" for check in checks)
    if as_json:
        console.print_json({"ok": is_well, "checks": [check.to_json() for check in checks]})
    else:
        _show(checks)
    if not is_well:
        raise typer.Exit(3)


def examine(environ: Mapping[str, str]) -> list[Check]:
    """Look at everything.

    Args:
        environ: Environment variables.

    Returns:
        The checks, in the order in which they are shown.
    """
    checks = [*isolated("python", python_checks)]
    with console.TokenCounter() as status:
        for name, look in {
            "packages": package_checks,
            "torch": torch_checks,
            "bitsandbytes": bitsandbytes_checks,
            "kernels": kernel_checks,
            "cpu": cpu_checks,
        }.items():
            status.note(f"looking at {name}")
            checks += isolated(name, look)
        checks += _state_checks(environ, status.note)
    return checks


def isolated(name: str, look: Callable[[], list[Check]]) -> list[Check]:
    """The checks of `look`; if it breaks, one problem that says how.

    Args:
        name: Names the problem.
        look: Makes the checks.

    Returns:
        The checks.
    """
    try:
        return look()
    except PlanPatchError as error:
        return [Check(name, "problem", error.message, error.hint)]
    except Exception as fault:
        what = f"{type(fault).__name__}: {fault}".strip()
        return [Check(name, "problem", what, "Mend what it names, or install PlanPatch again in a fresh environment.")]


def _state_checks(environ: Mapping[str, str], note: Callable[[str], None]) -> list[Check]:
    """What needs a home; without a usable one there is nothing further to look at."""
    try:
        session = Session.open(environ)
    except PlanPatchError as error:
        rest = "Settings, models and the ledger could not be looked at."
        return [Check("home", "problem", f"{error.message} {rest}", error.hint)]
    looks: dict[str, Callable[[], list[Check]]] = {
        "home": lambda: _home(session.paths),
        "settings": lambda: _settings(session),
        "ledger": lambda: _ledger(session.paths.ledger),
        "model": lambda: _model(session),
        "adapter": lambda: _adapter(session),
        "hub": lambda: _hub(session, environ),
        "completion": _completion,
    }
    checks: list[Check] = []
    for name, look in looks.items():
        note(f"looking at {name}")
        checks += isolated(name, look)
    return checks


# --- the home --------------------------------------------------------------------------------------------------------


def _home(paths: Paths) -> list[Check]:
    """Whether files can be made there and there is room for a model."""
    try:
        with tempfile.TemporaryFile(dir=paths.home) as file:
            file.write(b"planpatch")
    except OSError as fault:
        fix = "Give this user write access there, or set PLANPATCH_HOME to another folder."
        return [Check("home", "problem", f"{paths.home} cannot be written: {fault.strerror or fault}", fix)]
    free = shutil.disk_usage(paths.home).free
    found = f"{paths.home} ({gigabytes(free)} free)"
    if free < _LITTLE_DISK_BYTES:
        return [Check("home", "warning", found, "Free some disk space: the smallest code model takes 1.8 GB to pull.")]
    return [Check("home", "ok", found)]


def _settings(session: Session) -> list[Check]:
    """Those that cannot be used, and which settings are not at their default."""
    lines = [
        f"{line['name']} = {line['value']!r} ({line['source']})"
        for line in session.settings.report()
        if line["source"] != "default"
    ]
    file = session.paths.user_settings
    where = f"{file}{'' if file.is_file() else ' (not there; it is not needed)'}"
    if not session.problems:
        return [Check("settings", "ok", "\n".join([where, *(lines or ["every setting has its default"])]))]
    problems = [str(problem) for problem in session.problems]
    fix = "Correct or remove it where it is set; until then it is ignored."
    return [Check("settings", "warning", "\n".join([*problems, *lines]), fix)]


def _ledger(path: Path) -> list[Check]:
    """Whether it can be read, is private and is sound. Opening it makes its mode 0600 and ends interrupted writes."""
    if not path.exists():
        return [Check("ledger", "ok", f"{path} is not there yet; the first plan makes it")]
    mode = stat.S_IMODE(path.stat().st_mode)
    with Ledger(path) as ledger:
        problems = ledger.problems()
        states = Counter(line.state.value for line in ledger.list_proposals(limit=None))
    counts = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    found = (
        f"{path}: {sum(states.values())} patches{f' ({counts})' if counts else ''}, {gigabytes(path.stat().st_size)}"
    )
    if problems:
        shown = "\n".join([*problems[:5], *([f"… and {len(problems) - 5} more"] if len(problems) > 5 else [])])
        fix = "Save it with planpatch ledger export --out FILE, then rename it: the next start makes a new one."
        return [Check("ledger", "problem", f"{found}; the check of the file found:\n{shown}", fix)]
    if sys.platform != "win32" and mode & 0o077:
        still = stat.S_IMODE(path.stat().st_mode) & 0o077
        fix = f"chmod 600 {path}" if still else ""
        done = "" if still else "; it is 0600 now"
        return [Check("ledger", "warning", f"{found}; others could read it (mode {mode:04o}){done}", fix)]
    return [Check("ledger", "ok", f"{found}, sound, readable by you alone")]


# --- the model -------------------------------------------------------------------------------------------------------


def _model(session: Session) -> list[Check]:
    """Which model is meant, whether it is here and whole, and whether it fits."""
    ref = session.model_ref()
    device, quantization = session.placement()
    named = f"{ref.name} on {device} in {quantization}"
    meant = f"auto means {named}" if session.settings.model == "auto" else named
    try:
        local = session.store.get(ref)
    except ModelError as error:
        is_absent = ref.kind in ("catalogue", "hub") and session.store.show(ref.name).state in ("absent", "partial")
        level = "warning" if is_absent else "problem"
        first = " It has to be pulled first." if is_absent else ""
        return [Check("model", level, f"{meant}. {error.message}.{first}", error.hint)]
    checks = [Check("model", "ok", f"{meant}; it is here and whole ({gigabytes(local.bytes)}, {local.folder})")]
    return checks + isolated("model memory", lambda: _memory(session, ref, device))


def _memory(session: Session, ref: ModelRef, device: str) -> list[Check]:
    session.check_memory(ref)
    return [
        Check("model memory", "ok", f"{ref.name} fits: {gigabytes(free_memory_bytes(device))} are free on {device}")
    ]


def _adapter(session: Session) -> list[Check]:
    """Which adapter is used, whether it can be read, and whether it was made for the model as far as it says."""
    folder, ref = session.adapter(), session.model_ref()
    shipped = shipped_adapter(ref.hub_id or "")
    if folder is None:
        ships = ref.entry.adapter if ref.entry is not None else None
        why = f"; {ships.name} is not part of this installation" if ships is not None and shipped is None else ""
        return [Check("adapter", "ok", f"none: the base model is used{why}")]
    files = read_adapter(folder)
    if (other := session.made_for_another(folder)) is not None:
        fix = "planpatch adapters use auto, or __none__ for the base model."
        return [Check("adapter", "problem", f"{folder} was made for {other}, and the model is {ref.name}", fix)]
    if shipped is not None and folder == shipped.path:
        return [Check("adapter", "ok", f"{shipped.name}, which ships with PlanPatch (sha256 {files.digest[:12]}…)")]
    base = f", made for {files.base_model}" if files.base_model else ""
    return [Check("adapter", "ok", f"{folder}{base} (sha256 {files.digest[:12]}…)")]


def _hub(session: Session, environ: Mapping[str, str]) -> list[Check]:
    """Whether the hub answers: information, and a warning only where it is the one source of the model."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:
        return [Check("hub", "ok", "not asked: HF_HUB_OFFLINE is set")]
    fault = _why_out_of_reach(str(constants.ENDPOINT))
    if not fault:
        return [Check("hub", "ok", f"{constants.ENDPOINT} answers")]
    found = f"{constants.ENDPOINT} is out of reach ({fault})"
    ref = session.model_ref()
    if ref.hub_id is None or session.store.show(ref.name).state == "ready":
        return [Check("hub", "ok", f"{found}; {ref.name} is here and does not need it")]
    if ref.entry is not None and "pypi" in ref.entry.sources:
        return [Check("hub", "ok", f"{found}; {ref.name} can be pulled from PyPI without it")]
    fix = "Check the network, or name a model folder or .gguf file on this machine with --model."
    return [Check("hub", "warning", f"{found}, and {ref.name} comes from there alone", fix)]


def _why_out_of_reach(url: str) -> str:
    """Empty if the server answers. On a thread of its own, since looking up a name knows no time limit."""
    outcome = [f"no answer within {_HUB_TIMEOUT_S:g} s"]

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=_HUB_TIMEOUT_S):
                outcome[0] = ""
        except urllib.error.HTTPError:
            outcome[0] = ""
        except (OSError, ValueError) as fault:
            outcome[0] = str(getattr(fault, "reason", "") or fault)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_HUB_TIMEOUT_S)
    return outcome[0]


# --- the shell, and what is shown ------------------------------------------------------------------------------------


def _completion() -> list[Check]:
    """Whether the files that --install-completion writes are there."""
    user = Path.home()
    places = {
        "bash": user / ".bash_completions" / "planpatch.sh",
        "zsh": user / ".zfunc" / "_planpatch",
        "fish": user / ".config" / "fish" / "completions" / "planpatch.fish",
    }
    found = [shell for shell, path in places.items() if path.exists()]
    if found:
        return [Check("completion", "ok", f"installed for {', '.join(found)}")]
    return [Check("completion", "ok", "not installed; planpatch --install-completion does it for your shell")]


def _show(checks: list[Check]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    for column in ("check", "verdict", "found"):
        table.add_column(column, overflow="fold", no_wrap=column != "found")
    for check in checks:
        table.add_row(check.name, Text(_MARKS[check.level], _COLOURS[check.level]), Text(check.detail))
    console.out.print(table)
    todo = [check for check in checks if check.fix]
    if todo:
        console.out.print("\nWhat to do", style="bold")
    for check in todo:
        console.out.print(f"\n{check.name}:", style=_COLOURS[check.level])
        for line in check.fix.splitlines():
            console.out.print(f"  {line}", markup=False)
    console.out.print(f"\n{verdict(checks)}", style="bold")


def verdict(checks: list[Check]) -> str:
    """The last line; a model that is not here yet is no fault, but nothing can be patched without one.

    Args:
        checks: Every check.

    Returns:
        One line.
    """
    broken = sum(check.level == "problem" for check in checks)
    warnings = [check for check in checks if check.level == "warning"]
    if broken:
        return f"{broken} of {len(checks)} checks found something broken."
    told = f" {len(warnings)} warning{'s' if len(warnings) > 1 else ''}: see above." if warnings else ""
    if any(check.name == "model" for check in warnings):
        return f"Nothing is broken, but there is no model yet: pull it first, with the command above.{told}"
    return f"Everything needed works.{told}"
