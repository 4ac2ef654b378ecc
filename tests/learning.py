"""Edits that a user keeps, made by the real patcher, ledger and gates with an engine that writes what a test says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.patching.ledger import Ledger, Proposal
from engine.patching.patcher import Patch, Patcher, PatcherOptions, Plan
from engine.patching.prompts import Feedback
from engine.patching.scopes import find_scope
from engine.patching.source import Source, read_source
from tests.scripted_engine import ScriptedEngine


@dataclass(frozen=True, slots=True)
class Made:
    """A patch and the prompt that the model was given for it."""

    patch: Patch
    prompt: str


def propose(
    ledger: Ledger,
    file: Path,
    function: str | None,
    answer: str,
    intent: str = "do it",
    *,
    options: PatcherOptions | None = None,
    plan: str = "",
    feedback: Feedback | None = None,
    drop_directives: bool = False,
) -> Made:
    """Have a patch made for a file; nothing is written."""
    engine = ScriptedEngine([answer])
    source = read_source(file)
    scope = find_scope(source, function)
    planned = Plan("plan_of_test", source.path, scope, source.sha256, intent, (plan,)) if plan else None
    patch = Patcher(engine, ledger, options).patch(
        source, scope, intent, plan=planned, feedback=feedback, fresh=True, drop_directives=drop_directives
    )
    return Made(patch, engine.prompts[0])


def keep(ledger: Ledger, made: Made, final: str | None = None) -> str:
    """Apply a patch and accept it, with the text that the user made of it."""
    ledger.apply(made.patch.id)
    if final is None:
        ledger.accept(made.patch.id)
    else:
        ledger.label(made.patch.id, "accepted", reason="kept 10 minutes", final_text=final.encode())
    return made.patch.id


def accepted(ledger: Ledger, file: Path, before: str, after: str, function: str, intent: str = "do it") -> str:
    """A file with a function, and its edit, accepted."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(before, encoding="utf-8", newline="")
    return keep(ledger, propose(ledger, file, function, answer_of(after, function), intent))


def answer_of(text: str, function: str) -> str:
    """What a model would write to give a file's function."""
    source = Source.from_text(text, "m.py")
    scope = find_scope(source, function)
    return source.plain_text(scope.start_line, scope.end_line)


def refuse_many(path: Path, file: Path, num: int) -> None:
    """Fill the ledger at a path with refusals of `wish no0` to `wish noN` for a file, in this order."""
    error = {"code": "gate", "message": "it does not parse", "hint": "", "details": {}}
    with Ledger(path) as ledger:
        for number in range(num):
            ledger.propose(
                Proposal(
                    key=f"key {number}",
                    path=file,
                    scope="clamp",
                    scope_kind="function",
                    start_line=1,
                    end_line=1,
                    base=b"x = 1\n",
                    patched=None,
                    edits=(),
                    surface="lsp",
                    outcome="refused",
                    error=error,
                    intent=f"wish no{number}",
                )
            )
