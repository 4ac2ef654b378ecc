"""An editor for tests of the workbench: it holds texts with undo and redo, and a network that may be slow.

What the user does reaches the server by `deliver`, in order; what the server asks is answered by `on_apply` and
`on_ask`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.inference.protocol import Engine
from lsp_server.documents import Change, Document
from lsp_server.editor import BufferEdit, ClientProfile, Note, Severity
from lsp_server.model_host import HostStatus
from lsp_server.workbench import Workbench

PROFILE = ClientProfile("fake", "utf-16", has_versioned_edits=True, has_progress=True, tells_save_reason=True)


class ReadyModel:
    """A model's host whose engine is there."""

    def __init__(self, engine: Engine) -> None:
        self.engine_or_none: Engine | None = engine
        self.status = HostStatus("ready", "scripted")

    def wait(self, is_cancelled: Any) -> Engine:
        assert self.engine_or_none is not None
        return self.engine_or_none


@dataclass(slots=True)
class Buffer:
    """One text in the editor."""

    uri: str
    text: str
    version: int = 1
    undo: list[str] = field(default_factory=list)
    redo: list[str] = field(default_factory=list)
    undelivered: list[tuple[int, str]] = field(default_factory=list)

    def change(self, text: str, *, keep_redo: bool = False) -> None:
        """A new text, which the server has yet to hear of."""
        if not keep_redo:
            self.redo.clear()
        self.undo.append(self.text)
        self._set(text)

    def undo_once(self) -> bool:
        if not self.undo:
            return False
        self.redo.append(self.text)
        self._set(self.undo.pop())
        return True

    def redo_once(self) -> bool:
        if not self.redo:
            return False
        self.undo.append(self.text)
        self._set(self.redo.pop())
        return True

    def _set(self, text: str) -> None:
        self.text = text
        self.version += 1
        self.undelivered.append((self.version, text))


class FakeEditor:
    """See the module's docstring."""

    def __init__(self, profile: ClientProfile = PROFILE) -> None:
        self.profile = profile
        self.buffers: dict[str, Buffer] = {}
        self.edits: list[BufferEdit] = []
        self.messages: list[str] = []
        self.notes: dict[str, Sequence[Note]] = {}
        self.shown: list[Path] = []
        self.bench: Workbench | None = None
        self.on_apply: Callable[[BufferEdit], Awaitable[bool] | bool] = self.apply_honestly
        self.on_ask: Callable[[str, Sequence[str]], str | None] = lambda message, choices: None

    # --- what a user and a network do -------------------------------------------------------------------------------

    def open(self, uri: str, text: str) -> Buffer:
        buffer = self.buffers[uri] = Buffer(uri, text)
        self.reopen(uri)
        return buffer

    def reopen(self, uri: str) -> None:
        buffer = self.buffers[uri]
        buffer.undelivered.clear()
        assert self.bench is not None
        self.bench.did_open(uri, buffer.text, buffer.version, "python")

    def deliver(self, uri: str) -> None:
        """Let the server hear of every change, as the smallest edit each."""
        assert self.bench is not None
        file = self.bench.files.get(uri)
        buffer = self.buffers[uri]
        changes, buffer.undelivered = buffer.undelivered, []
        if file is None:
            return
        for version, text in changes:
            file.document.change([_smallest_change(file.document, text)], version)
            self.bench.did_change(file)

    def apply_honestly(self, edit: BufferEdit) -> bool:
        """Refuse another version; else change the text and say so."""
        buffer = self.buffers[edit.uri]
        if edit.version != buffer.version:
            return False
        buffer.change(edited(buffer.text, edit, self.profile))
        self.deliver(edit.uri)
        return True

    # --- the port ---------------------------------------------------------------------------------------------------

    async def apply_edit(self, edit: BufferEdit) -> bool:
        self.edits.append(edit)
        answer = self.on_apply(edit)
        return answer if isinstance(answer, bool) else await answer

    async def ask(self, message: str, choices: Sequence[str]) -> str | None:
        return self.on_ask(message, choices)

    async def show_document(self, path: Path) -> bool:
        self.shown.append(path)
        return True

    def show_message(self, message: str, severity: Severity) -> None:
        self.messages.append(message)

    def publish_notes(self, uri: str, version: int | None, notes: Sequence[Note]) -> None:
        self.notes[uri] = notes

    async def begin_progress(self, token: str, title: str, message: str, *, can_cancel: bool = True) -> bool:
        return True

    def report_progress(self, token: str, message: str) -> None:
        pass

    def end_progress(self, token: str, message: str) -> None:
        pass

    def notify(self, method: str, params: Mapping[str, Any]) -> None:
        pass


def edited(text: str, edit: BufferEdit, profile: ClientProfile = PROFILE) -> str:
    """A text after an edit."""
    document = Document(edit.uri, text, 0, encoding=profile.encoding)
    places = [(document.offset(hunk.start), document.offset(hunk.end), hunk.text) for hunk in edit.hunks]
    for start, end, new in sorted(places, reverse=True):
        text = text[:start] + new + text[end:]
    return text


def _smallest_change(document: Document, text: str) -> Change:
    old = document.text
    head = 0
    while head < min(len(old), len(text)) and old[head] == text[head]:
        head += 1
    if head and old[head - 1] == "\r":  # positions cannot stand inside CRLF
        head -= 1
    tail = 0
    while tail < min(len(old), len(text)) - head and old[-1 - tail] == text[-1 - tail]:
        tail += 1
    if tail and old[len(old) - tail] == "\n" and old[len(old) - tail - 1 : len(old) - tail] == "\r":
        tail -= 1
    if tail and text[len(text) - tail] == "\n" and text[len(text) - tail - 1 : len(text) - tail] == "\r":
        tail -= 1
    start, end = document.position(head), document.position(len(old) - tail)
    return Change(text[head : len(text) - tail], start, end)
