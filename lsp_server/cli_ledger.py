"""`planpatch ledger`: what was proposed, what became of it, and the way back."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from engine.errors import StaleTextError, UsageError, WriteError
from engine.patching.ledger import Ledger
from engine.patching.ledger_records import Applied, Label, Operation, State, Summary
from lsp_server import console, survival
from lsp_server.cli_options import JsonOption, open_session
from lsp_server.running import edit_in_editor

ledger_app = typer.Typer(help="Proposed patches and what became of them.", no_args_is_help=True, rich_markup_mode=None)

IdArgument = Annotated[str, typer.Argument(help="Patch id or its beginning.", show_default=False)]
ReasonOption = Annotated[str, typer.Option(help="Why, for the record.", show_default=False)]
DiskOption = Annotated[bool, typer.Option("--disk", help="Write the file without asking the editors that run.")]

_OPERATIONS: Mapping[Operation, tuple[Callable[[Ledger, str], Applied], str]] = {
    "apply": (Ledger.apply, "written to"),
    "rollback": (Ledger.rollback, "taken back in"),
    "redo": (Ledger.redo, "put again into"),
}


@ledger_app.command("list")
def list_proposals(
    file: Annotated[Path | None, typer.Option(help="Only this file.", show_default=False)] = None,
    state: Annotated[State | None, typer.Option(help="Only this state.", show_default=False)] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 20,
    as_json: JsonOption = False,
) -> None:
    """Show proposals, newest first."""
    with open_session({}, None, as_json).ledger() as ledger:
        lines = ledger.list_proposals(path=file.absolute() if file else None, state=state, limit=limit)
    if as_json:
        console.print_json([line.to_json() for line in lines])
        return
    if not lines:
        console.say("no such patch" if file or state else "no patch yet; planpatch patch makes one")
        return
    rows = [
        (
            line.id,
            line.created_at[5:16].replace("T", " "),
            _standing(line),
            f"{line.path.name if line.path else 'pasted code'}{f':{line.scope}' if line.scope else ''}",
            " ".join(line.intent.split()),
        )
        for line in lines
    ]
    console.print_lines(("patch", "made (UTC)", "state", "where", "intent"), rows, num_whole=3)


def _standing(line: Summary) -> str:
    return _words(line.state.value, line.label, is_applied=line.is_applied)


def _words(state: str, label: Label, *, is_applied: bool) -> str:
    """The verdict, and `applied` beside it while the patch is in its file."""
    word = state if label is Label.UNREVIEWED else label.value
    return f"{word}, applied" if is_applied and word != State.APPLIED.value else word


@ledger_app.command()
def show(patch_id: IdArgument, as_json: JsonOption = False) -> None:
    """Show one proposal: its diff, gates and events."""
    with open_session({}, None, as_json).ledger() as ledger:
        entry = ledger.get(patch_id)
    if as_json:
        console.print_json(entry.to_json())
        return
    proposal = entry.proposal
    facts = [
        ("patch", entry.id),
        ("file", proposal.path or "pasted code"),
        ("scope", proposal.scope or "the whole file"),
        ("intent", proposal.intent),
        ("plan", proposal.plan_text),
        ("model", f"{proposal.model} · {proposal.edit_format}"),
        ("state", _words(entry.state.value, entry.label, is_applied=entry.standing.is_applied)),
        *((f"gate {gate['gate']}", "passed" if gate["ok"] else gate["reason"]) for gate in proposal.gates),
        *(("event", f"{event.at[:19].replace('T', ' ')} {event.kind}") for event in entry.events),
    ]
    console.print_table("", ("", ""), [fact for fact in facts if fact[1]])
    if proposal.error:
        console.say(f"\n[bold red]{escape(str(proposal.error['code']))}:[/] {escape(str(proposal.error['message']))}")
    console.out.print()
    console.print_diff(proposal.diff)


@ledger_app.command()
def apply(patch_id: IdArgument, disk: DiskOption = False, as_json: JsonOption = False) -> None:
    """Write a proposed patch to its file. An editor that has it open does it; save there."""
    _write(patch_id, "apply", disk, as_json)


@ledger_app.command()
def rollback(patch_id: IdArgument, disk: DiskOption = False, as_json: JsonOption = False) -> None:
    """Take an applied patch out of its file; edits elsewhere stay. An editor that has it open does it; save there."""
    _write(patch_id, "rollback", disk, as_json)


@ledger_app.command()
def redo(patch_id: IdArgument, disk: DiskOption = False, as_json: JsonOption = False) -> None:
    """Put a rolled back patch into its file again. An editor that has it open does it; save there."""
    _write(patch_id, "redo", disk, as_json)


@ledger_app.command()
def accept(patch_id: IdArgument, reason: ReasonOption = "", as_json: JsonOption = False) -> None:
    """Say that a patch was good. If you changed it in its file, your text is what is learnt from."""
    _label(patch_id, survival.accept, reason, as_json)


@ledger_app.command()
def reject(patch_id: IdArgument, reason: ReasonOption = "", as_json: JsonOption = False) -> None:
    """Say that a patch was not good; its file stays as it is."""
    _label(patch_id, Ledger.reject, reason, as_json)


@ledger_app.command()
def export(
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File to write; stdout without.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file.")] = False,
) -> None:
    """Write every proposal with its texts and events as JSON lines."""
    with open_session({}, None, False).ledger() as ledger:
        if out is None:
            ledger.export(sys.stdout)
            return
        if out.exists() and not force:
            raise UsageError(f"{out} exists already", hint="Give another name, or --force.")
        try:
            with open(out, "w", encoding="utf-8", newline="\n", opener=_private) as stream:
                num_written = ledger.export(stream)
        except OSError as fault:
            raise WriteError(
                f"{out} cannot be written: {fault.strerror or fault}", hint="Give another --out, or free disk space."
            ) from fault
    console.say(f"{num_written} proposals written to {escape(str(out))}")


def _private(path: str, flags: int) -> int:
    """Open a file that only its owner can read, since it will hold source code; a device is left as it is."""
    descriptor = os.open(path, flags, 0o600)
    status = os.fstat(descriptor)
    if sys.platform != "win32" and stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid():
        os.fchmod(descriptor, 0o600)
    return descriptor


@ledger_app.command()
def prune(
    days: Annotated[
        float | None, typer.Option(min=0, help="Keep this many days, 0 for no limit; without it the setting.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Drop what is older or larger than the settings allow."""
    session = open_session({}, None, as_json)
    with session.ledger() as ledger:
        pruned = session.prune(ledger, days=days)
    if as_json:
        console.print_json({"proposals": pruned.num_proposals})
        return
    console.say(f"{pruned.num_proposals} proposals dropped")


def _write(patch_id: str, operation: Operation, disk: bool, as_json: bool) -> None:
    """Have the editor do it that has the file open; else write the file."""
    session = open_session({}, None, as_json)
    on_disk, done = _OPERATIONS[operation]
    with session.ledger() as ledger:
        try:
            entry_id = ledger.get(patch_id).id
            answer = None if disk else edit_in_editor(session.paths, operation, entry_id)
            applied = on_disk(ledger, entry_id) if answer is None else _applied_in_editor(operation, answer)
        except StaleTextError as error:
            if not as_json:
                _show_hunks(error)
            raise
    if as_json:
        console.print_json({**applied.to_json(), "via": "disk" if answer is None else "editor"})
        return
    for warning in applied.warnings:
        console.warn(warning)
    if not applied.was_so_already:
        where = "" if answer is None else ", in the editor that has it open; save it there"
        console.say(f"{applied.patch_id} {done} {escape(str(applied.path))}{where}")


def _applied_in_editor(operation: Operation, answer: Mapping[str, Any]) -> Applied:
    hunks, was_so_already = tuple(answer["hunks"]), bool(answer.get("wasSoAlready"))
    path = Path(answer["path"])
    return Applied(answer["patch_id"], path, operation, hunks, answer["sha256"], was_so_already=was_so_already)


def _show_hunks(error: StaleTextError) -> None:
    """The three-way view of each hunk that was edited since."""
    for hunk in error.details.get("hunks", ()):
        view = hunk.get("view") or hunk.get("three_way")
        if view:
            sys.stderr.write(f"{view}\n")  # as it is, tabs included: the user may copy lines from it


def _label(patch_id: str, operation: Callable[..., None], reason: str, as_json: bool) -> None:
    with open_session({}, None, as_json).ledger() as ledger:
        entry_id = ledger.get(patch_id).id
        operation(ledger, entry_id, reason=reason)
        entry = ledger.get(entry_id)
    if as_json:
        console.print_json({"ok": True, "patch_id": entry.id, "state": entry.state.value, "label": entry.label.value})
        return
    console.say(f"{entry.id} is {entry.label.value}")
    if entry.label is Label.REJECTED and entry.standing.is_applied:
        console.say(f"it is still in its file; planpatch ledger rollback {entry.id} takes it out")
