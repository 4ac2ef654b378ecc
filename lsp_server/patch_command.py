"""`planpatch patch`: plan, patch, print, and with --write apply."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import typer
from rich.markup import escape

from engine.errors import StaleTextError, UsageError, WriteError
from engine.patching.edits import Edit
from engine.patching.ledger import Applied, Ledger
from engine.patching.notices import notices
from engine.patching.patcher import Patch, Patcher, Plan
from engine.patching.prompts import Feedback
from engine.patching.proof import check_hunks
from engine.patching.scopes import Scope
from engine.patching.source import Source
from lsp_server import console
from lsp_server.cli_options import find_target, open_engine
from lsp_server.session import Session


@dataclass(frozen=True, slots=True)
class PatchRequest:
    """What the user asked the command for.

    Args:
        file: The file.
        function: Its function, method or class.
        line: A line of it.
        module: Whether the whole file is meant.
        intent: What to change; None takes the plan's.
        preset: The preset that the intent came from.
        plan_id: A plan of the ledger.
        plan_text: A plan in the user's words.
        plan_first: Make a plan and follow it; without one the model patches at once, which measured better.
        reason: What was wrong with an earlier patch.
        hint: What to do about it.
        write: Whether to write the file.
        hunks: Indices of the hunks to write; None for all.
        fresh: Do not reuse an earlier answer.
    """

    file: Path
    function: str | None
    line: int | None
    module: bool
    intent: str | None
    preset: str
    plan_id: str | None
    plan_text: str | None
    plan_first: bool
    reason: str
    hint: str
    write: bool
    hunks: tuple[int, ...] | None
    fresh: bool


def run_patch(session: Session, request: PatchRequest, *, as_json: bool) -> None:
    """Make the patch, print it, and write it if asked; a second choice of the model is never written unseen.

    Args:
        session: Settings, model and ledger.
        request: What the user asked for.
        as_json: Whether stdout is for programs.

    Raises:
        GateError: No attempt passed the gates.
        UsageError: The options do not fit together.
        StaleTextError: The file changed while the model wrote.
        WriteError: The file cannot be written; the ledger keeps the patch.
        Exit: Code 1: it was not written though it was asked for.
    """
    if sum(map(bool, (request.plan_id, request.plan_text, request.plan_first))) > 1:
        raise UsageError("--plan-id, --plan and --plan-first exclude each other")
    if request.hunks is not None and not request.write:
        raise UsageError("--hunks says what --write writes", hint="Give both.")
    with session.ledger() as ledger:
        source, scope, intent, plan = _target(session, ledger, request)
        with open_engine(session, as_json) as engine:
            patcher = session.patcher(engine, ledger, "cli")
            patch = _make(patcher, request, source, scope, intent, plan, as_json=as_json)
        edits = patch.edits if request.hunks is None else _chosen_edits(patch, request.hunks)
        if not as_json:
            console.print_diff(patch.diff)
        may_write = request.write and not patch.is_second_choice
        applied = _apply(ledger, patch, request.hunks) if may_write else None
    warnings = notices(patch.source, patch.scope, edits) + (applied.warnings if applied else [])
    if as_json:
        console.print_json({**patch.to_json(), "written": applied is not None, "warnings": warnings})
    else:
        for warning in warnings:
            console.warn(warning)
        _say_what_next(patch, request, written=applied is not None)
    if request.write and applied is None:
        raise typer.Exit(1)


def _target(session: Session, ledger: Ledger, request: PatchRequest) -> tuple[Source, Scope, str, Plan | None]:
    if request.plan_id is None:
        source, scope = find_target(session, request.file, request.function, request.line, request.module)
        assert request.intent is not None
        plan = _own_plan(source, scope, request.intent, request.plan_text) if request.plan_text else None
        return source, scope, request.intent, plan
    record = ledger.get_plan(request.plan_id)
    source, scope = find_target(
        session, request.file, record.scope or None, record.start_line if record.scope else None, not record.scope
    )
    plan = Plan(
        id=record.id,
        path=source.path,
        scope=scope,
        base_sha256=Source.from_bytes(record.base, source.path).sha256,
        intent=record.intent,
        steps=tuple(record.steps),
        truncated=record.truncated,
    )
    return source, scope, record.intent, plan


def _own_plan(source: Source, scope: Scope, intent: str, text: str) -> Plan:
    steps = tuple(line.strip() for line in text.splitlines() if line.strip())
    return Plan(f"plan_{uuid.uuid4().hex[:12]}", source.path, scope, source.sha256, intent, steps)


def _make(
    patcher: Patcher,
    request: PatchRequest,
    source: Source,
    scope: Scope,
    intent: str,
    plan: Plan | None,
    *,
    as_json: bool,
) -> Patch:
    feedback = Feedback(request.reason, request.hint) if request.reason or request.hint else None
    with console.TokenCounter() as counter:
        if plan is None and request.plan_first:
            plan = patcher.plan(source, scope, intent, listener=counter)
        if plan is not None and not as_json:
            console.err.print(f"plan: {plan.text}", markup=False)
        return patcher.patch(
            source,
            scope,
            intent,
            plan=plan,
            feedback=feedback,
            preset=request.preset,
            fresh=request.fresh,
            listener=counter,
        )


def _apply(ledger: Ledger, patch: Patch, hunks: tuple[int, ...] | None) -> Applied:
    """Write the patch; where that fails it is not lost, and the user is told its id."""
    try:
        return ledger.apply(patch.id, hunks)
    except (WriteError, StaleTextError) as error:
        again = "apply {} writes it" if isinstance(error, WriteError) else "show {} shows it"
        error.hint += f" The patch is kept: planpatch ledger {again.format(patch.id)}."
        error.details["patch_id"] = patch.id
        raise


def _chosen_edits(patch: Patch, hunks: tuple[int, ...]) -> Sequence[Edit]:
    """A part of a patch is another patch: every gate must pass it too."""
    if max(hunks) >= len(patch.edits):
        raise UsageError(
            f"--hunks names hunk {max(hunks) + 1}, and {patch.id} has {len(patch.edits)}",
            hint=f"planpatch ledger show {patch.id}",
        )
    chosen = [edit for index, edit in enumerate(patch.edits) if index in hunks]
    check_hunks(patch.source, patch.scope, chosen, patch.imports, patch.id)
    return chosen


def _say_what_next(patch: Patch, request: PatchRequest, *, written: bool) -> None:
    seconds = f"{patch.timings.total_s:.1f} s, {patch.timings.num_tokens} tokens"
    made = "known from the ledger" if patch.is_known else seconds
    passed = f"{len(patch.gates)} gates passed"
    console.say(f"\n{patch.id} · {passed} · {made}")
    for repair in patch.repairs:
        console.warn(repair) if patch.is_second_choice else console.err.print(f"note: {repair}", markup=False)
    if request.write and not written:
        console.say(f"not written, for you to look at first; planpatch ledger apply {patch.id} writes it")
    elif written:
        console.say(f"written to {escape(str(request.file))}; planpatch ledger rollback {patch.id} takes it back")
    else:
        console.say(f"nothing was written; planpatch ledger apply {patch.id} writes it")
