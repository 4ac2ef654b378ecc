"""`planpatch demo`: the whole flow on a real model and a real file, in a folder of its own."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import time
from pathlib import Path

from engine.errors import GateError
from engine.patching.scopes import find_scope
from engine.patching.source import read_source
from lsp_server import console
from lsp_server.cli_options import open_engine
from lsp_server.session import Session

FUNCTION = "bitcount"
INTENT = "The loop never ends: each turn must clear the lowest set bit of n, by & and not by ^."
BROKEN = '''"""Counting bits."""


def bitcount(n):
    """Return the number of 1-bits in the binary form of n."""
    count = 0
    while n:
        n ^= n - 1
        count += 1
    return count


def is_power_of_two(n):
    return bitcount(n) == 1
'''


def run_demo(session: Session, *, keep: bool) -> None:
    """Plan, patch, show, write, check, roll back, compare.

    Args:
        session: Names the model.
        keep: Whether the folder with the file stays.

    Raises:
        GateError: The model wrote nothing that passed the gates.
    """
    folder = Path(tempfile.mkdtemp(prefix="planpatch-demo-"))
    try:
        _run(session, folder / "bits.py")
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def _run(session: Session, file: Path) -> None:
    file.write_bytes(BROKEN.encode("utf-8"))
    before = file.read_bytes()
    _step(f"A file with a broken function: {file}")
    console.out.print(BROKEN.rstrip(), markup=False)
    console.out.print(f"\nWhat we want: {INTENT}", markup=False)
    with open_engine(session, False, pull=True) as engine, session.ledger() as ledger:
        status = engine.status()
        _step(f"{status.model} is loaded on {status.device} ({status.quantization})")
        source = read_source(file)
        scope = find_scope(source, FUNCTION)
        patcher = session.patcher(engine, ledger, "cli")
        started_at = time.monotonic()
        with console.TokenCounter() as counter:
            plan = patcher.plan(source, scope, INTENT, listener=counter)
        _step(f"PLAN, {plan.timings.total_s:.1f} s")
        console.out.print(plan.text, markup=False)
        with console.TokenCounter() as counter:
            patch = patcher.patch(source, scope, INTENT, plan=plan, fresh=True, listener=counter)
        _step(f"PATCH, {patch.timings.total_s:.1f} s, {len(patch.gates)} gates passed")
        console.print_diff(patch.diff)
        ledger.apply(patch.id)
        _step(f"written as {patch.id}; what the function says now")
        _say_what_it_does(file)
        ledger.rollback(patch.id)
        seconds = time.monotonic() - started_at
    if file.read_bytes() != before:
        raise GateError(f"{file} is not as it was before the demo", hint="Please report this as a bug.")
    digest = hashlib.sha256(before).hexdigest()[:12]
    _step(f"rolled back: the file is as it was, byte for byte (sha256 {digest}…), after {seconds:.1f} s")
    console.out.print("\nOn your own code:\n  planpatch patch FILE --function NAME --intent TEXT", markup=False)


def _step(text: str) -> None:
    console.out.print(f"\n== {text}", markup=False, style="bold")


def _say_what_it_does(file: Path) -> None:
    """Run the patched function on three numbers, in a process that is stopped if it never returns."""
    import subprocess
    import sys

    code = f"import runpy; f = runpy.run_path({str(file)!r})['{FUNCTION}']; print([f(n) for n in (127, 128, 0)])"
    try:
        done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=10)
    except subprocess.TimeoutExpired:
        console.out.print("it still never returns: the patch is valid Python, but not right", markup=False)
        return
    said = done.stdout.strip() or done.stderr.strip().splitlines()[-1]
    console.out.print(f"bitcount of 127, 128 and 0: {said}", markup=False)
