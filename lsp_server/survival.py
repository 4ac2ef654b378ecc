"""What the user's later doings say about an applied patch: the labels that learning uses.

Undo to the old text is a reject. Else a patch is accepted when it is still there at a save by hand at least 60 s
after it was applied, or 10 minutes after; "still there" is judged by syntax tree, so a formatter changes nothing. One
that the user changed is accepted with the text as it is then, also by an explicit verdict, which is stronger; the
ledger sees to that.

Not covered: a patch that was moved to another file, and a function that was renamed: these get no label.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import Literal

from engine.errors import PlanPatchError
from engine.patching.ledger import Ledger
from engine.patching.ledger_records import Entry, Label, State, source_of
from engine.patching.scopes import ParseFault, Scope, find_scope, parse_text, standalone_text
from engine.patching.source import Source, read_source

KEPT_AT_SAVE_S = 60.0
KEPT_S = 600.0

Finding = Literal["undone", "redone", "kept", "changed", "gone"]


@dataclass(slots=True)
class Watch:
    """An applied patch of an open document.

    Args:
        patch_id: The proposal.
        path: Its file.
        scope: Qualified name; empty for the whole file.
        base: The scope's text before, normalised.
        patched: The scope's text after, normalised.
        whole_base: The file's text before, normalised.
        whole_patched: The file's text after, normalised.
        applied_at: Of the server's clock, in seconds.
        has_diverged: Whether the text was never quite the patch's; then only the file's very text counts.
        is_undone: Whether the old text is back.
        is_settled: Whether keeping it says nothing more: it has its label, or is no patch of an editor.
    """

    patch_id: str
    path: str
    scope: str
    base: str
    patched: str
    whole_base: str
    whole_patched: str
    applied_at: float
    has_diverged: bool = False
    is_undone: bool = False
    is_settled: bool = False

    @classmethod
    def of(cls, entry: Entry, applied_at: float) -> Watch:
        """Watch a proposal that is in its file.

        Args:
            entry: The proposal.
            applied_at: When it was applied, by the server's clock.

        Returns:
            The watch.
        """
        proposal = entry.proposal
        base = source_of(proposal.base, proposal.path)
        patched = entry.applied_text(entry.standing.hunks or None)
        grown = patched.num_lines - base.num_lines
        before_scope = sum(len(edit.new.splitlines()) for edit in proposal.edits if edit.end_line < proposal.start_line)
        start_line = proposal.start_line + (before_scope if proposal.scope else 0)
        return cls(
            patch_id=entry.id,
            path=str(proposal.path),
            scope=proposal.scope,
            base=_text(base, proposal.start_line, proposal.end_line),
            patched=_text(patched, start_line, max(start_line, proposal.end_line + grown)),
            whole_base=normalised(base.text),
            whole_patched=normalised(patched.text),
            applied_at=applied_at,
            has_diverged=entry.state is State.DIVERGED,
            is_undone=not entry.standing.is_applied,
            is_settled=entry.label is not Label.UNREVIEWED
            or entry.state is State.DIVERGED
            or proposal.surface != "lsp",
        )

    def turned(self, text: str) -> Literal["undone", "redone"] | None:
        """Whether an editor's undo or redo took the patch out or put it in again; quick enough for every change.

        Args:
            text: The document, normalised.

        Returns:
            `undone`, `redone` or None.
        """
        whole, part, other, finding = (
            (self.whole_patched, self.patched, self.base, "redone")
            if self.is_undone
            else (self.whole_base, self.base, self.patched, "undone")
        )
        if text == whole:
            return finding
        if self.has_diverged or not self.scope:
            return None
        return finding if _has_whole(text, part) and not _has_whole(text, other) else None

    def judge(self, current: Source) -> Finding:
        """What became of the patch; parses the file.

        Args:
            current: The document.

        Returns:
            `kept` if its syntax tree is still there, `changed` if the function is another now, `undone` if it is the
            old one, `gone` if it cannot be found or read.
        """
        now = _tree_of(current, self.scope)
        if now is None:
            return "gone"
        if now == _tree_of_text(self.patched):
            return "kept"
        return "undone" if now == _tree_of_text(self.base) else "changed"


def accept(ledger: Ledger, patch_id: str, *, reason: str = "") -> None:
    """Record that the user accepts a patch: as its file has it now, where the user changed it there.

    Only a file that PlanPatch wrote itself is looked into. What an editor holds may differ from the disk, and its
    server watches that.

    Args:
        ledger: The ledger.
        patch_id: The proposal.
        reason: Why, if the user said.

    Raises:
        UsageError: No such proposal, or it was refused, rolled back, or diverged.
        LedgerError: The ledger cannot be written.
    """
    entry = ledger.get(patch_id)
    ledger.accept(entry.id, reason=reason, final_text=_changed_on_disk(entry))


def _changed_on_disk(entry: Entry) -> bytes | None:
    """The file's text where its function is another than the applied one; None where it is not, or cannot be told."""
    turns = [event for event in entry.events if event.kind in ("applied", "redone")]
    path = entry.proposal.path
    if path is None or not entry.standing.is_applied or not turns or turns[-1].data.get("via") != "disk":
        return None
    try:
        now = read_source(path)
    except PlanPatchError:
        return None  # moved, deleted or no text any more: what was applied is what was accepted
    return now.to_bytes() if Watch.of(entry, 0.0).judge(now) == "changed" else None


def normalised(text: str) -> str:
    r"""A text as two editors agree on it: no byte-order mark, lines ended by \n."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _has_whole(text: str, definition: str) -> bool:
    """Whether a function or class is in a text as it is: with no line of it before or behind that it lacks.

    Looked for by indentation alone. A patch that deletes the last lines of a function leaves what is the beginning of
    the function before, so that the one text is in the other.
    """
    indent = len(definition) - len(definition.lstrip(" \t\f"))
    at = text.find(definition)
    while at >= 0:
        before, behind = text[:at].rstrip("\n"), text[at + len(definition) :]
        above = before.rpartition("\n")[2]
        below = next((line for line in behind.split("\n", 20)[1:] if line.strip()), "")
        is_line = (at == 0 or text[at - 1] == "\n") and behind[:1] in ("", "\n")
        is_decorated = above.lstrip(" \t\f").startswith("@")
        if is_line and not is_decorated and len(below) - len(below.lstrip(" \t\f")) <= indent:
            return True
        at = text.find(definition, at + 1)
    return False


def _text(source: Source, start_line: int, end_line: int) -> str:
    return "\n".join(source.lines[start_line - 1 : end_line])


def _tree_of(source: Source, scope: str) -> str | None:
    if not scope:
        return _tree_of_text("\n".join(source.lines))
    try:
        found: Scope = find_scope(source, scope)
    except PlanPatchError:
        return None
    return _tree_of_text(_text(source, found.start_line, found.end_line))


def _tree_of_text(text: str) -> str | None:
    lines = text.split("\n")
    indent = lines[0][: len(lines[0]) - len(lines[0].lstrip(" \t\f"))]
    try:
        return ast.dump(parse_text(standalone_text(lines, indent)))
    except ParseFault:
        return None
