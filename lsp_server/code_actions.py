"""Which actions are offered where. Pure: a document, a range and what the server knows in, actions out.

A menu has to open while the model generates and the user types, so nothing here parses the file: the function at the
cursor is found by indentation. It only names the action; what it really means is found out when it is chosen.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lsp_server.documents import Document, Position
from lsp_server.setting_values import Preset

PLAN_KIND = "refactor.rewrite.planpatch.plan"
PATCH_KIND = "refactor.rewrite.planpatch.patch"
FIX_KIND = "quickfix"
KINDS = (PLAN_KIND, PATCH_KIND, FIX_KIND)
SOURCE = "planpatch"

_DEFINITION = re.compile(r"(?P<indent>[ \t\f]*)(?:async[ \t]+)?(?P<kind>def|class)[ \t]+(?P<name>\w+)")
_DECORATOR = re.compile(r"[ \t\f]*@")
_BLANK = re.compile(r"[ \t\f]*(?:#.*)?\Z")
_MAX_MESSAGE = 60
_MOST_JOBS = 5
_MAX_LINES_UP = 5000


@dataclass(frozen=True, slots=True)
class Action:
    """One entry of the menu: a command, never an edit.

    Args:
        title: What the menu shows.
        kind: Its kind.
        command: The command.
        argument: The command's one argument.
        diagnostics: Indices of the context's diagnostics that it mends.
        disabled: Why it cannot be chosen now; empty if it can.
    """

    title: str
    kind: str
    command: str
    argument: Mapping[str, Any]
    diagnostics: tuple[int, ...] = ()
    disabled: str = ""


@dataclass(frozen=True, slots=True)
class Offer:
    """A patch that waits for the user, or one that was refused."""

    patch_id: str
    function: str
    start_line: int
    end_line: int
    intent: str
    gate: str = ""
    reason: str = ""
    argument: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True)
class ActionState:
    """What the server knows of a document; lines are 0-based, ends inclusive.

    Args:
        presets: Offered by name.
        is_loading: Whether the model is not ready yet; titles say so.
        jobs: Title of each running job by its id.
        pending: Patches that were made for the document's very text.
        refused: Refusals that were made for it.
        applied: The last patch that is in the file, and what it was for, as the menu says it; None for none.
        rolled_back: The same of the last one that was rolled back.
        plans: Title of the plan document of each function by its name; "" is the whole file.
    """

    presets: Mapping[str, Preset] = field(default_factory=dict[str, Preset])
    is_loading: bool = False
    jobs: Mapping[str, str] = field(default_factory=dict[str, str])
    pending: Sequence[Offer] = ()
    refused: Sequence[Offer] = ()
    applied: tuple[str, str] | None = None
    rolled_back: tuple[str, str] | None = None
    plans: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, slots=True)
class Request:
    """What the client asks for.

    Args:
        start: Start of the selection, or the cursor.
        end: Its end.
        only: Kinds that are wanted; None for all.
        is_automatic: Whether the editor asks by itself, such as for its lightbulb.
        diagnostics: Diagnostics there, as JSON; ours are left out by their source.
    """

    start: Position
    end: Position
    only: Sequence[str] | None = None
    is_automatic: bool = False
    diagnostics: Sequence[Mapping[str, Any]] = ()


def actions(document: Document, request: Request, state: ActionState) -> list[Action]:
    """The menu at a place.

    Args:
        document: An open Python document.
        request: Where, and what is wanted.
        state: What the server knows.

    Returns:
        The actions, likeliest first.
    """
    start, end = request.start, request.end
    has_selection = start != end
    foreign = [index for index, found in enumerate(request.diagnostics) if found.get("source") != SOURCE]
    pending = [offer for offer in state.pending if _touches(offer, start.line, end.line)]
    refused = [offer for offer in state.refused if _touches(offer, start.line, end.line)]
    if request.is_automatic and not (has_selection or foreign or pending or refused):
        return []
    where = {"uri": document.uri, "range": _range_json(start, end)}
    name = function_at(document, start.line)
    found = [
        *_pending_actions(pending),
        *_fixes(request, foreign, where),
        *_retries(refused),
        *_writing_actions(name, where, state),
        *_history_actions(document.uri, state),
        *(
            Action(f"PlanPatch: cancel {title}", PLAN_KIND, "planpatch.cancel", {"jobId": job_id})
            for job_id, title in list(state.jobs.items())[:_MOST_JOBS]
        ),
    ]
    return [action for action in found if _is_wanted(action.kind, request.only)]


def function_at(document: Document, line: int) -> str:
    """The function or class around a line, by indentation.

    Args:
        document: A Python document.
        line: 0-based.

    Returns:
        Its dotted name; empty where the line is in none.
    """
    at = _skip_decorators(document, line)
    names: list[str] = []
    limit = _indent_below(document, at) if _is_empty(document, at) else None
    for number in range(at, max(-1, at - _MAX_LINES_UP), -1):
        text = document.line_text(number)
        if _BLANK.match(text):
            continue
        indent = len(text) - len(text.lstrip(" \t\f"))
        if limit is not None and indent >= limit:
            continue
        match = _DEFINITION.match(text)
        if match is not None:
            names.append(match["name"])
        limit = indent
        if indent == 0:
            break
    return ".".join(reversed(names))


def _is_empty(document: Document, line: int) -> bool:
    return not document.line_text(line).strip()


def _indent_below(document: Document, line: int) -> int:
    """Indentation of the next line with code: an empty line belongs to what that line is in."""
    for number in range(line + 1, min(document.num_lines, line + _MAX_LINES_UP)):
        text = document.line_text(number)
        if text.strip():
            return len(text) - len(text.lstrip(" \t\f"))
    return 0


def _skip_decorators(document: Document, line: int) -> int:
    """From a decorator to the definition below it."""
    number = min(line, document.num_lines - 1)
    while number + 1 < document.num_lines and _DECORATOR.match(document.line_text(number)):
        number += 1
    return number


def _writing_actions(name: str, where: Mapping[str, Any], state: ActionState) -> list[Action]:
    what = f"`{name}`" if name else "this file"
    later = " (the model is still loading)" if state.is_loading else ""
    found = [Action(f"PlanPatch: plan a change to {what}{later}", PLAN_KIND, "planpatch.plan", where)]
    if (plan := state.plans.get(name)) is not None:
        title = f"PlanPatch: patch from plan: {short(plan) or what}{later}"
        found.append(Action(title, PLAN_KIND, "planpatch.patch", {**where, "planId": "document"}))
    found += [
        Action(
            f"PlanPatch: {_lower_first(preset.title)}{later}", PATCH_KIND, "planpatch.patch", {**where, "preset": key}
        )
        for key, preset in state.presets.items()
        if name
    ]
    return found


def _pending_actions(pending: Sequence[Offer]) -> list[Action]:
    found: list[Action] = []
    for offer in pending:
        what = short(offer.intent) or offer.function
        argument = {"patchId": offer.patch_id}
        found.append(Action(f"PlanPatch: Apply: {what}", PATCH_KIND, "planpatch.apply", argument))
        found.append(Action(f"PlanPatch: Reject: {what}", PATCH_KIND, "planpatch.reject", argument))
    return found


def _retries(refused: Sequence[Offer]) -> list[Action]:
    return [
        Action(f"PlanPatch: retry with this error: {short(offer.reason)}", FIX_KIND, "planpatch.patch", offer.argument)
        for offer in refused
    ]


def _fixes(request: Request, foreign: Sequence[int], where: Mapping[str, Any]) -> list[Action]:
    found: list[Action] = []
    for index in foreign:
        diagnostic = request.diagnostics[index]
        message = short(str(diagnostic.get("message", "")))
        if message:
            argument = {"uri": where["uri"], "range": diagnostic.get("range"), "diagnostic": diagnostic}
            found.append(Action(f"PlanPatch: fix: {message}", FIX_KIND, "planpatch.patch", argument, (index,)))
    return found


def _history_actions(uri: str, state: ActionState) -> list[Action]:
    found: list[Action] = []
    if state.applied is not None:
        patch_id, what = state.applied
        title = f"PlanPatch: roll back: {what or patch_id}"
        found.append(Action(title, PATCH_KIND, "planpatch.rollback", {"uri": uri, "patchId": patch_id}))
    if state.rolled_back is not None:
        patch_id, what = state.rolled_back
        title = f"PlanPatch: redo: {what or patch_id}"
        found.append(Action(title, PATCH_KIND, "planpatch.redo", {"uri": uri, "patchId": patch_id}))
    return found


def _is_wanted(kind: str, only: Sequence[str] | None) -> bool:
    """A kind stands for itself and those below it; the empty one for all."""
    return not only or any(not prefix or kind == prefix or kind.startswith(prefix + ".") for prefix in only)


def _touches(offer: Offer, start_line: int, end_line: int) -> bool:
    return offer.start_line <= end_line and start_line <= offer.end_line


def short(text: str) -> str:
    """A text in one line of at most 60 characters, as titles and notes show it."""
    words = " ".join(text.split())
    return words if len(words) <= _MAX_MESSAGE else words[: _MAX_MESSAGE - 1].rstrip() + "…"


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


def _range_json(start: Position, end: Position) -> dict[str, Any]:
    return {
        "start": {"line": start.line, "character": start.character},
        "end": {"line": end.line, "character": end.character},
    }
