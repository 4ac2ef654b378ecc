"""What the language server asks of an editor, and what each editor can do.

`Editor` is the port: `language_server.py` speaks the protocol behind it, tests stand in for it. Nothing here knows
JSON-RPC types, and whatever reads this module can be tested without a client.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any, Protocol, cast

from lsp_server.documents import Encoding, Position

NOTIFICATIONS = ("planpatch/status", "planpatch/job")


class Severity(IntEnum):
    """Of a message; the protocol's numbers."""

    ERROR = 1
    WARNING = 2
    INFO = 3
    LOG = 4


@dataclass(frozen=True, slots=True)
class ClientProfile:
    """What a client does, by its capabilities and by what is known of it beyond them.

    Args:
        name: `clientInfo.name`, empty if it gave none.
        encoding: What positions count, as agreed on.
        has_annotations: Edits can need confirmation, hunk by hunk.
        has_versioned_edits: Takes `documentChanges`; else edits go by URI alone, right after the version was checked.
        has_progress: Shows work-done progress that the server began.
        has_show_document: Opens a file when asked to.
        tells_save_reason: Says before a save whether the user asked for it.
        has_disabled_actions: Shows actions that cannot be chosen, with the reason.
        has_configuration: Answers `workspace/configuration`.
        notifications: Notifications of ours that it asked for.
        presents: Shows patches that wait, the ends of jobs and the model's state by itself, from our notifications; no
            question and no message of ours repeats them.
    """

    name: str = ""
    encoding: Encoding = "utf-16"
    has_annotations: bool = False
    has_versioned_edits: bool = False
    has_progress: bool = False
    has_show_document: bool = False
    tells_save_reason: bool = False
    has_disabled_actions: bool = False
    has_configuration: bool = False
    notifications: frozenset[str] = frozenset()
    presents: bool = False

    @classmethod
    def of(
        cls, name: str, capabilities: Mapping[str, Any], encoding: Encoding, options: Mapping[str, Any]
    ) -> ClientProfile:
        """The profile of a client.

        Args:
            name: `clientInfo.name`.
            capabilities: The capabilities of `initialize`, as JSON.
            encoding: What positions count.
            options: `initializationOptions`, as JSON; `notifications` says which of ours are wanted: true for all, or
                their names, with or without `planpatch/`, as a list or as an object of booleans; `presents: true`, by a
                client that asks for all, that it shows by itself what they say.

        Returns:
            The profile.
        """

        def has(path: str) -> bool:
            value: Any = capabilities
            for key in path.split("."):
                value = cast("Mapping[str, Any]", value).get(key) if isinstance(value, Mapping) else None
            return bool(value) or value == {}

        notifications = _wanted(options.get("notifications"))
        return cls(
            name=name,
            encoding=encoding,
            has_annotations=has("workspace.workspaceEdit.changeAnnotationSupport")
            and has("workspace.workspaceEdit.documentChanges"),
            # Neovim 0.11 applies versioned edits and checks their version, but does not say so.
            has_versioned_edits=has("workspace.workspaceEdit.documentChanges") or name == "Neovim",
            has_progress=has("window.workDoneProgress"),
            has_show_document=has("window.showDocument.support"),
            tells_save_reason=has("textDocument.synchronization.willSave"),
            has_disabled_actions=has("textDocument.codeAction.disabledSupport") and name.lower() != "helix",
            has_configuration=has("workspace.configuration"),
            notifications=notifications,
            presents=options.get("presents") is True and notifications == frozenset(NOTIFICATIONS),
        )


def _wanted(found: object) -> frozenset[str]:
    if found is True:
        return frozenset(NOTIFICATIONS)
    if isinstance(found, Mapping):
        found = [name for name, is_wanted in cast("Mapping[str, object]", found).items() if is_wanted is True]
    names = cast("Sequence[object]", found) if isinstance(found, (list, tuple)) else ()
    return frozenset(f"planpatch/{str(name).removeprefix('planpatch/')}" for name in names) & frozenset(NOTIFICATIONS)


@dataclass(frozen=True, slots=True)
class Hunk:
    """New text for a range of a document."""

    start: Position
    end: Position
    text: str
    title: str = ""


@dataclass(frozen=True, slots=True)
class BufferEdit:
    """A change of one open document.

    Args:
        uri: The document.
        version: The version that the ranges count in.
        hunks: In the order of the text, free of overlaps.
        label: What the editor calls it in its undo history and its preview.
        needs_confirmation: Whether the user looks at it first, where the client can show that.
    """

    uri: str
    version: int
    hunks: Sequence[Hunk]
    label: str
    needs_confirmation: bool = False


@dataclass(frozen=True, slots=True)
class Note:
    """Something of ours to show at a range, as an Information diagnostic.

    Args:
        start: Where it begins.
        end: Where it ends.
        message: The text.
        code: What it is about: `patch` or the name of a gate.
        data: For our own quick fixes.
    """

    start: Position
    end: Position
    message: str
    code: str
    data: Mapping[str, Any] = field(default_factory=dict[str, Any])


class EditorFault(Exception):
    """The client answered a request with an error, or not at all."""


class Editor(Protocol):
    """One connected client. Used from the event loop's thread alone."""

    @property
    def profile(self) -> ClientProfile:
        """What it can do."""
        ...

    async def apply_edit(self, edit: BufferEdit) -> bool:
        """Ask for a change and return what the client says of it, which is not to be believed.

        Raises:
            EditorFault: It answered with an error.
        """
        ...

    async def ask(self, message: str, choices: Sequence[str]) -> str | None:
        """Ask the user; None if they choose nothing or the client cannot ask."""
        ...

    async def show_document(self, path: Path) -> bool:
        """Open a file in the editor; False if the client cannot or does not."""
        ...

    def show_message(self, message: str, severity: Severity) -> None:
        """Show a message, or log it."""
        ...

    def publish_notes(self, uri: str, version: int | None, notes: Sequence[Note]) -> None:
        """Show these notes of ours in a document, and no others."""
        ...

    async def begin_progress(self, token: str, title: str, message: str, *, can_cancel: bool = True) -> bool:
        """Show progress, which the user can cancel; False if the client cannot."""
        ...

    def report_progress(self, token: str, message: str) -> None:
        """Say how far it is."""
        ...

    def end_progress(self, token: str, message: str) -> None:
        """Take the progress away."""
        ...

    def notify(self, method: str, params: Mapping[str, Any]) -> None:
        """Send a notification of ours, if the client asked for it."""
        ...
