"""What the ledger holds, as Python sees it: proposals, plans, events, and what events add up to.

Not covered: whether values make sense; `ledger.py` checks what it stores.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import datetime, timezone
from enum import Enum
from pathlib import Path
from typing import Any, Literal, cast

from engine.errors import PathError, UsageError
from engine.patching.edits import Edit, apply_edits
from engine.patching.ledger_db import Database
from engine.patching.source import Source

Surface = Literal["cli", "http", "lsp", "bench"]
Operation = Literal["apply", "rollback", "redo"]

FORGOTTEN = "forgotten"  # reason of the last event of a proposal whose texts were removed, and scope_kind of its row
UNDONE = "undone"  # reason of a roll-back by the editor's own undo: a reject, until the editor's redo

_JSON_FIELDS = ("feedback", "settings", "imports", "gates", "repairs", "timings", "error")


class State(str, Enum):
    """What became of a proposal."""

    PROPOSED = "proposed"
    REFUSED = "refused"
    APPLIED = "applied"
    DIVERGED = "diverged"  # the editor's text was not the patch's after applying
    ACCEPTED = "accepted"
    REJECTED = "rejected"
    ROLLED_BACK = "rolled_back"
    FORGOTTEN = "forgotten"  # its texts were removed at the user's wish


NEVER_OFFERED = frozenset({State.REFUSED, State.FORGOTTEN})  # nothing can be done with these


class Label(str, Enum):
    """What a proposal teaches. The last explicit accept, reject or roll-back; else the last `label` event."""

    UNREVIEWED = "unreviewed"
    ACCEPTED = "accepted"
    REJECTED = "rejected"
    ROLLED_BACK = "rolled_back"


@dataclass(frozen=True, slots=True)
class Proposal:
    """One patch that was made, or the attempt at one that was refused.

    Args:
        key: What `request_key` gave for the request.
        path: The file; None for code that was pasted.
        scope: Qualified name of the function or class; empty for the module.
        scope_kind: `function`, `method`, `class` or `module`.
        start_line: First line of the scope in the base, 1-based.
        end_line: Last line of the scope, inclusive.
        base: Exact bytes before.
        patched: Exact bytes after; None when refused.
        edits: What turns one into the other, in the base's lines, free of overlaps.
        surface: Where the request came from.
        outcome: `proposed` or `refused`.
        error: The refusal as `PlanPatchError.to_json()`.
        intent: What was asked for.
        plan_id: The plan that it was made from.
        plan_text: The plan's steps as they were used, after the user's edits.
        feedback: The user's hint and reason, if any.
        preset: Name of the preset, if any.
        model: Model id.
        model_digest: sha256 that names the weights.
        adapter_digest: sha256 of the adapter, `__none__` for the base model.
        edit_format: `rewrite` or `json_edits`.
        prompt_version: Version of the prompt's wording.
        settings: The settings that change tokens.
        imports: Imports that the patch declares.
        gates: Every gate's verdict.
        repairs: What had to be mended in the model's answer.
        diff: Unified diff for people.
        timings: Seconds and token counts.
    """

    key: str
    path: Path | None
    scope: str
    scope_kind: str
    start_line: int
    end_line: int
    base: bytes
    patched: bytes | None
    edits: tuple[Edit, ...]
    surface: Surface
    outcome: Literal["proposed", "refused"] = "proposed"
    error: Mapping[str, Any] | None = None
    intent: str = ""
    plan_id: str | None = None
    plan_text: str = ""
    feedback: Mapping[str, str] = field(default_factory=dict[str, str])
    preset: str = ""
    model: str = ""
    model_digest: str = ""
    adapter_digest: str = "__none__"
    edit_format: str = ""
    prompt_version: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    imports: Sequence[str] = ()
    gates: Sequence[Mapping[str, Any]] = ()
    repairs: Sequence[Any] = ()
    diff: str = ""
    timings: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True)
class PlanRecord:
    """One plan.

    Args:
        path: The file; None for code that was pasted.
        scope: Qualified name of the function or class; empty for the module.
        scope_kind: `function`, `method`, `class` or `module`.
        start_line: First line of the scope, 1-based.
        end_line: Last line of the scope, inclusive.
        base: Exact bytes that the plan was made for.
        steps: What the model wrote.
        intent: What was asked for.
        truncated: Whether the token limit ended the plan.
        model: Model id.
        timings: Seconds and token counts.
        id: Set by the ledger.
        created_at: UTC in ISO 8601; set by the ledger.
    """

    path: Path | None
    scope: str
    scope_kind: str
    start_line: int
    end_line: int
    base: bytes
    steps: Sequence[str]
    intent: str = ""
    truncated: bool = False
    model: str = ""
    timings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    id: str = ""
    created_at: str = ""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a proposal.

    Args:
        seq: Grows with time over the whole ledger.
        at: UTC in ISO 8601.
        kind: `proposed`, `refused`, `applying`, `applied`, `apply_failed`, `diverged`, `accepted`, `rejected`,
            `rolled_back`, `redone` or `label`.
        data: What belongs to it: hunks, digests, where it was written, a reason.
        text_sha256: Digest of the user's final text, for a label.
    """

    seq: int
    at: str
    kind: str
    data: Mapping[str, Any]
    text_sha256: str | None = None


@dataclass(frozen=True, slots=True)
class Standing:
    """What a proposal's events add up to.

    Args:
        state: What became of it.
        label: What it teaches.
        is_applied: Whether its text is in the file, as far as is known: also true of one rejected without a roll-back.
        hunks: Indices of the edits that were applied last; empty if none ever was.
        final_text_sha256: Digest of the user's final text, if a label has one.
    """

    state: State = State.PROPOSED
    label: Label = Label.UNREVIEWED
    is_applied: bool = False
    hunks: tuple[int, ...] = ()
    final_text_sha256: str | None = None


@dataclass(frozen=True)
class Entry:
    """A proposal as the ledger has it.

    Args:
        id: `p_` and a name that sorts by time.
        created_at: UTC in ISO 8601.
        proposal: What was proposed.
        events: What happened to it, oldest first.
        standing: What the events add up to.
        final_text: The user's final text, if a label has one.
    """

    id: str
    created_at: str
    proposal: Proposal
    events: tuple[Event, ...]
    standing: Standing
    final_text: bytes | None = None

    @property
    def state(self) -> State:
        """What became of it."""
        return self.standing.state

    @property
    def label(self) -> Label:
        """What it teaches."""
        return self.standing.label

    def applied_text(self, hunks: Iterable[int] | None = None) -> Source:
        """The base with some of the hunks.

        Args:
            hunks: Indices of edits; None for all.

        Returns:
            The text that applying them gives.

        Raises:
            UsageError: The proposal was refused, or has no such hunks.
        """
        chosen = chosen_hunks(self, hunks)
        if self.proposal.patched is not None and len(chosen) == len(self.proposal.edits):
            return source_of(self.proposal.patched, self.proposal.path)
        base = source_of(self.proposal.base, self.proposal.path)
        return apply_edits(base, [self.proposal.edits[index] for index in chosen])

    def to_json(self) -> dict[str, Any]:
        """Everything, for programs.

        Returns:
            JSON-serialisable facts; texts as strings.
        """
        proposal = {item.name: getattr(self.proposal, item.name) for item in fields(Proposal)}
        proposal |= {
            "path": None if self.proposal.path is None else str(self.proposal.path),
            "base": self.proposal.base.decode("utf-8"),
            "patched": None if self.proposal.patched is None else self.proposal.patched.decode("utf-8"),
            "edits": [edit.to_json() for edit in self.proposal.edits],
        }
        return {
            "id": self.id,
            "created_at": self.created_at,
            "state": self.state.value,
            "label": self.label.value,
            "is_applied": self.standing.is_applied,
            "hunks": list(self.standing.hunks),
            "final_text": None if self.final_text is None else self.final_text.decode("utf-8"),
            **proposal,
            "events": [{"seq": e.seq, "at": e.at, "kind": e.kind, "data": e.data} for e in self.events],
        }


@dataclass(frozen=True, slots=True)
class Summary:
    """One line of a list of proposals.

    Args:
        id: The proposal.
        created_at: UTC in ISO 8601.
        path: The file; None for code that was pasted.
        scope: Qualified name of the function or class.
        intent: What was asked for.
        surface: Where the request came from.
        state: What became of it.
        label: What it teaches.
        is_applied: Whether its text is in the file.
        num_hunks: Number of its edits.
        error: Why it was refused, if it was.
        model: Model id.
        total_s: Seconds from asking to having it.
    """

    id: str
    created_at: str
    path: Path | None
    scope: str
    intent: str
    surface: str
    state: State
    label: Label
    is_applied: bool
    num_hunks: int
    error: str = ""
    model: str = ""
    total_s: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """The line, for programs.

        Returns:
            JSON-serialisable facts.
        """
        facts = {item.name: getattr(self, item.name) for item in fields(Summary)}
        return facts | {
            "path": None if self.path is None else str(self.path),
            "state": self.state.value,
            "label": self.label.value,
        }


@dataclass(frozen=True, slots=True)
class Applied:
    """A file that was written, or that was found as it would have been written.

    Args:
        patch_id: The proposal.
        path: The file.
        operation: What was done.
        hunks: Indices of the edits that it was done with.
        sha256: Digest of the file's new bytes.
        num_other_names: Hard links that the file had; they keep the old text.
        was_so_already: Whether there was nothing to write.
    """

    patch_id: str
    path: Path
    operation: Operation
    hunks: tuple[int, ...]
    sha256: str
    num_other_names: int = 0
    was_so_already: bool = False

    @property
    def warnings(self) -> list[str]:
        """What to tell the user of it, in sentences without a full stop; often nothing."""
        if self.was_so_already:
            how = "without" if self.operation == "rollback" else "with"
            return [f"{self.path} was {how} the patch already; nothing was written"]
        if not self.num_other_names:
            return []
        several = self.num_other_names > 1
        names = f"{self.num_other_names} other names (hard links)" if several else "another name (a hard link)"
        return [f"{self.path} had {names}, where the old text stays"]

    def to_json(self) -> dict[str, Any]:
        """What was done, for programs."""
        return {
            "ok": True,
            "patch_id": self.patch_id,
            "operation": self.operation,
            "path": str(self.path),
            "hunks": list(self.hunks),
            "sha256": self.sha256,
            "warnings": self.warnings,
        }


@dataclass(frozen=True, slots=True)
class Pruned:
    """What `prune` removed.

    Args:
        num_proposals: Proposals removed.
        num_plans: Plans removed.
        used_bytes: Size of what is left.
    """

    num_proposals: int
    num_plans: int
    used_bytes: int


def add_up(events: Iterable[Event]) -> Standing:
    """What a proposal's events add up to.

    Args:
        events: Its events, oldest first.

    Returns:
        Its standing.
    """
    standing = Standing()
    implicit, explicit = Label.UNREVIEWED, None
    ever_fit, was_undone = True, False
    for event in events:
        match event.kind:
            case "refused" if event.data.get("reason") == FORGOTTEN:
                return Standing(State.FORGOTTEN)
            case "refused":
                standing = replace(standing, state=State.REFUSED)
            case "applied" | "redone":
                implicit = Label.UNREVIEWED if was_undone else implicit
                was_undone = False
                explicit = None if explicit is Label.ROLLED_BACK else explicit
                ever_fit = True
                hunks = tuple(event.data["hunks"])
                standing = replace(standing, state=State.APPLIED, is_applied=True, hunks=hunks)
            case "diverged":
                ever_fit = False
                hunks, is_in = tuple(event.data["hunks"]), bool(event.data.get("is_in", True))
                standing = replace(standing, state=State.DIVERGED, is_applied=is_in, hunks=hunks)
            case "rolled_back" if event.data.get("reason") == UNDONE:
                implicit, was_undone = Label.REJECTED, True
                standing = replace(standing, state=State.REJECTED, is_applied=False)
            case "rolled_back":
                explicit = Label.ROLLED_BACK
                standing = replace(standing, state=State.ROLLED_BACK, is_applied=False)
            case "accepted" | "rejected":
                explicit = Label(event.kind)
                final = event.text_sha256 or standing.final_text_sha256
                standing = replace(standing, state=State(event.kind), final_text_sha256=final)
            case "label":
                implicit = Label(event.data["label"])
                standing = replace(standing, final_text_sha256=event.text_sha256)
            case _:  # proposed, applying, apply_failed: the state stays
                pass
    label = explicit or implicit
    if label is Label.ACCEPTED and not ever_fit:
        label = Label.UNREVIEWED
    return replace(standing, label=label)


def is_unwanted(standing: Standing) -> bool:
    """Whether a proposal must not be returned for an identical request.

    Args:
        standing: What became of it.

    Returns:
        True if it was refused, rejected, rolled back or forgotten.
    """
    return standing.state in (*NEVER_OFFERED, State.REJECTED, State.ROLLED_BACK) or standing.label in (
        Label.REJECTED,
        Label.ROLLED_BACK,
    )


def chosen_hunks(entry: Entry, hunks: Iterable[int] | None) -> tuple[int, ...]:
    """Check a choice of hunks.

    Args:
        entry: The proposal.
        hunks: Indices of its edits; None for all.

    Returns:
        The indices, each once, ascending.

    Raises:
        UsageError: No such hunks, or the proposal was refused.
    """
    count = len(entry.proposal.edits)
    if entry.proposal.outcome == "refused":
        raise wrong_state(entry, "has no hunks", "Ask for a new patch.")
    chosen = tuple(range(count)) if hunks is None else tuple(sorted(set(hunks)))
    if not chosen or chosen[0] < 0 or chosen[-1] >= count:
        raise UsageError(
            f"{entry.id} has no hunks {list(chosen)}.",
            hint=f"Choose from 0 to {count - 1}.",
            patch_id=entry.id,
            num_hunks=count,
        )
    return chosen


def in_file_already(entry: Entry) -> UsageError:
    """The error for applying what is applied.

    Args:
        entry: The proposal.

    Returns:
        The error, to be raised.
    """
    return wrong_state(entry, "is in its file already", "Roll it back first to apply it anew.")


def wrong_state(entry: Entry, what: str, hint: str) -> UsageError:
    """The error for something that a proposal's state does not allow.

    Args:
        entry: The proposal.
        what: What is not possible.
        hint: What to do.

    Returns:
        The error, to be raised.
    """
    return UsageError(
        f"{entry.id} {what}: it is {entry.state.value}.", hint=hint, patch_id=entry.id, state=entry.state.value
    )


def source_of(data: bytes, path: Path | None) -> Source:
    """A stored text as a source.

    Args:
        data: Its exact bytes.
        path: The file; None for code that was pasted.

    Returns:
        The source.

    Raises:
        SourceError: The bytes are no text that can be edited.
    """
    return Source.from_bytes(data, "pasted code" if path is None else path.as_posix())


def proposal_row(proposal: Proposal) -> dict[str, Any]:
    """A proposal as columns, its texts left out.

    Args:
        proposal: The proposal.

    Returns:
        Value of each column.

    Raises:
        UsageError: A value cannot be stored.
    """
    row = {item.name: getattr(proposal, item.name) for item in fields(Proposal) if item.name not in ("base", "patched")}
    texts = {name: storable(name, value) for name, value in row.items() if isinstance(value, str)}
    json_fields = {name: canonical_json(name, row[name]) for name in _JSON_FIELDS}
    return (
        row
        | texts
        | json_fields
        | {
            "path": stored_path(proposal.path),
            "path_key": path_key(proposal.path),
            "edits": canonical_json("edits", [edit.to_json() for edit in proposal.edits]),
        }
    )


def proposal_of(row: Any, database: Database) -> Proposal:
    """A proposal from its columns.

    Args:
        row: A row of `proposals`.
        database: Where its texts are.

    Returns:
        The proposal.

    Raises:
        LedgerError: A text is lost or damaged.
    """
    special = {"path", "base", "patched", "edits", *_JSON_FIELDS}
    patched = row["patched_sha256"]
    return Proposal(
        path=None if row["path"] is None else Path(row["path"]),
        base=database.text(row["base_sha256"]),
        patched=None if patched is None else database.text(patched),
        edits=tuple(Edit.from_json(edit) for edit in json.loads(row["edits"])),
        **{name: json.loads(row[name]) for name in _JSON_FIELDS},
        **{item.name: row[item.name] for item in fields(Proposal) if item.name not in special},
    )


def summary_of(row: Any, standing: Standing) -> Summary:
    """A line of a list.

    Args:
        row: A row of `proposals`.
        standing: What became of it.

    Returns:
        The summary.
    """
    error = cast("dict[str, Any]", json.loads(row["error"]) or {})
    return Summary(
        id=row["id"],
        created_at=row["created_at"],
        path=None if row["path"] is None else Path(row["path"]),
        scope=row["scope"],
        intent=row["intent"],
        surface=row["surface"],
        state=standing.state,
        label=standing.label,
        is_applied=standing.is_applied,
        num_hunks=len(json.loads(row["edits"])),
        error=error.get("message", ""),
        model=row["model"],
        total_s=float(cast("dict[str, Any]", json.loads(row["timings"])).get("total_s", 0.0)),
    )


def event_of(row: Any) -> Event:
    """An event from its columns.

    Args:
        row: A row of `events`.

    Returns:
        The event.
    """
    return Event(row["seq"], row["at"], row["kind"], json.loads(row["data"]), row["text_sha256"])


def canonical_json(name: str, value: Any) -> str:
    """JSON that is the same for equal values.

    Args:
        name: What the value is, for the error.
        value: The value; mappings and sequences of any kind.

    Returns:
        JSON in ASCII, keys sorted.

    Raises:
        UsageError: The value is not JSON.
    """
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, default=_plain)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{name} cannot be stored as JSON: {error}.", hint="Use numbers, text and lists.") from error


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(cast("Mapping[str, Any]", value))
    if isinstance(value, (Sequence, set, frozenset)):
        return list(cast("Iterable[Any]", value))
    raise TypeError(f"{type(value).__name__} is not JSON")


def storable(name: str, text: str) -> str:
    """Check that a text can be stored.

    Args:
        name: What the text is, for the error.
        text: The text.

    Returns:
        The text.

    Raises:
        UsageError: It has a lone surrogate.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(f"{name} has a lone surrogate at character {error.start}.", hint="Remove it.") from error
    return text


def stored_path(path: Path | None) -> str | None:
    """A path as it is stored.

    Args:
        path: The path; None for code that was pasted.

    Returns:
        The absolute path, links kept.

    Raises:
        PathError: It has a name that is not UTF-8.
    """
    return None if path is None else _storable_path(os.path.abspath(path))


def path_key(path: Path | None) -> str | None:
    """One name for all spellings of a path: links resolved, and case folded where the system ignores it.

    Args:
        path: The path; None for code that was pasted.

    Returns:
        The name.

    Raises:
        PathError: It has a name that is not UTF-8.
    """
    return None if path is None else _storable_path(os.path.normcase(os.path.realpath(path)))


def _storable_path(path: str) -> str:
    try:
        return storable("path", path)
    except UsageError as error:
        raise PathError(
            f"{path} has a name that is not UTF-8, which the ledger cannot keep.", hint="Rename it."
        ) from error


def iso_utc(time: datetime) -> str:
    """A time as it is stored.

    Args:
        time: A time; one without zone is UTC.

    Returns:
        ISO 8601 in UTC with microseconds, which sorts as text.
    """
    utc = time.replace(tzinfo=timezone.utc) if time.tzinfo is None else time.astimezone(timezone.utc)
    return utc.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
