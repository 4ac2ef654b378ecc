"""The bridge between this server's words and the protocol's types. Handlers convert here and nowhere else."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lsprotocol import types
from pygls.exceptions import JsonRpcException

from lsp_server.code_actions import FIX_KIND, SOURCE, Action, Request
from lsp_server.documents import Change, Position
from lsp_server.editor import BufferEdit, ClientProfile, EditorFault, Note, Severity
from lsp_server.uris import uri_of

if TYPE_CHECKING:
    from pygls.protocol import LanguageServerProtocol

_ANNOTATION = "planpatch.hunk"
_USER_S = 120.0  # for an edit that some clients ask the user about, and that others lose
_ANSWER_S = 10.0  # for what a client answers by itself, with no user in between
_NUDGE_S = 2.0  # eglot may leave a request unread until the next message comes


class LspEditor:
    """The connected client as an `Editor`.

    Args:
        protocol: The connection.
        profile: What the client does.
    """

    def __init__(self, protocol: LanguageServerProtocol, profile: ClientProfile) -> None:
        self._protocol = protocol
        self._profile = profile

    @property
    def profile(self) -> ClientProfile:
        """What it can do."""
        return self._profile

    async def apply_edit(self, edit: BufferEdit) -> bool:
        """`workspace/applyEdit`, versioned where the client takes that.

        Args:
            edit: The change.

        Returns:
            What the client says.

        Raises:
            EditorFault: It answered with an error.
        """
        params = types.ApplyWorkspaceEditParams(edit=workspace_edit(edit, self._profile), label=edit.label)
        timeout_s = None if edit.needs_confirmation else _USER_S
        result = await self._request(types.WORKSPACE_APPLY_EDIT, params, timeout_s)
        return bool(getattr(result, "applied", False))

    async def ask(self, message: str, choices: Sequence[str]) -> str | None:
        """`window/showMessageRequest`; a client that does not know it is shown the message.

        Args:
            message: The question.
            choices: Titles of the answers.

        Returns:
            The title that was chosen, None for none.
        """
        actions = [types.MessageActionItem(title=title) for title in choices]
        params = types.ShowMessageRequestParams(type=types.MessageType.Info, message=message, actions=actions)
        try:
            chosen = await self._request(types.WINDOW_SHOW_MESSAGE_REQUEST, params)
        except EditorFault:
            self.show_message(message, Severity.INFO)
            return None
        title = getattr(chosen, "title", None)
        return title if title in choices else None

    async def show_document(self, path: Path) -> bool:
        """`window/showDocument`.

        Args:
            path: The file.

        Returns:
            Whether the client showed it.
        """
        params = types.ShowDocumentParams(uri=uri_of(path), take_focus=True)
        try:
            return bool(getattr(await self._request(types.WINDOW_SHOW_DOCUMENT, params, _ANSWER_S), "success", False))
        except EditorFault:
            return False

    def show_message(self, message: str, severity: Severity) -> None:
        """`window/showMessage`, or `window/logMessage` for what nobody has to read."""
        kind = types.MessageType(int(severity))
        if severity is Severity.LOG:
            self._protocol.notify(types.WINDOW_LOG_MESSAGE, types.LogMessageParams(type=kind, message=message))
        else:
            self._protocol.notify(types.WINDOW_SHOW_MESSAGE, types.ShowMessageParams(type=kind, message=message))

    def publish_notes(self, uri: str, version: int | None, notes: Sequence[Note]) -> None:
        """`textDocument/publishDiagnostics`."""
        diagnostics = [
            types.Diagnostic(
                range=types.Range(_position(note.start), _position(note.end)),
                message=note.message,
                severity=types.DiagnosticSeverity.Information,
                source=SOURCE,
                code=note.code,
                data=dict(note.data),
            )
            for note in notes
        ]
        params = types.PublishDiagnosticsParams(uri=uri, version=version, diagnostics=diagnostics)
        self._protocol.notify(types.TEXT_DOCUMENT_PUBLISH_DIAGNOSTICS, params)

    async def begin_progress(self, token: str, title: str, message: str, *, can_cancel: bool = True) -> bool:
        """Create and begin server-made work-done progress.

        Args:
            token: Its token.
            title: What it is.
            message: How far it is.
            can_cancel: Whether the user can cancel it.

        Returns:
            Whether the client shows it.
        """
        if not self._profile.has_progress:
            return False
        params = types.WorkDoneProgressCreateParams(token=token)
        try:
            await self._request(types.WINDOW_WORK_DONE_PROGRESS_CREATE, params, _ANSWER_S)
        except EditorFault:
            return False
        begin = types.WorkDoneProgressBegin(title=title, cancellable=can_cancel, message=message or None)
        self._protocol.notify(types.PROGRESS, types.ProgressParams(token=token, value=begin))
        return True

    def report_progress(self, token: str, message: str) -> None:
        """Report on progress that was begun."""
        if self._profile.has_progress:
            report = types.WorkDoneProgressReport(message=message)
            self._protocol.notify(types.PROGRESS, types.ProgressParams(token=token, value=report))

    def end_progress(self, token: str, message: str) -> None:
        """End progress that was begun."""
        end = types.WorkDoneProgressEnd(message=message or None)
        self._protocol.notify(types.PROGRESS, types.ProgressParams(token=token, value=end))

    def notify(self, method: str, params: Mapping[str, Any]) -> None:
        """One of our notifications, for clients that asked for it."""
        if method in self._profile.notifications:
            self._protocol.notify(method, dict(params))

    async def configuration(self, section: str) -> Any:
        """`workspace/configuration` of one section.

        Args:
            section: Its name.

        Returns:
            What the client has; None for nothing.
        """
        if not self._profile.has_configuration:
            return None
        params = types.ConfigurationParams(items=[types.ConfigurationItem(section=section)])
        try:
            values = await self._request(types.WORKSPACE_CONFIGURATION, params, _ANSWER_S)
        except EditorFault:
            return None
        return values[0] if values else None

    async def register(self, method: str, options: Any) -> None:
        """`client/registerCapability` of one method; a client that refuses sends nothing then."""
        registration = types.Registration(id=f"planpatch-{method}", method=method, register_options=options)
        try:
            params = types.RegistrationParams(registrations=[registration])
            await self._request(types.CLIENT_REGISTER_CAPABILITY, params, _ANSWER_S)
        except EditorFault:
            pass

    async def _request(self, method: str, params: Any, timeout_s: float | None = None) -> Any:
        nudge = asyncio.get_running_loop().call_later(
            _NUDGE_S, self.show_message, f"PlanPatch waits for the answer to {method}", Severity.LOG
        )
        try:
            return await asyncio.wait_for(self._protocol.send_request_async(method, params), timeout_s)
        except JsonRpcException as error:
            raise EditorFault(error.message or str(error)) from error
        except asyncio.TimeoutError:
            raise EditorFault(f"{method} was not answered in {timeout_s:g} s") from None
        finally:
            nudge.cancel()


def workspace_edit(edit: BufferEdit, profile: ClientProfile) -> types.WorkspaceEdit:
    """A change as the client takes it.

    Args:
        edit: The change.
        profile: What the client does.

    Returns:
        Versioned document changes, annotated where the client shows annotations; else changes by URI.
    """
    plain = [types.TextEdit(types.Range(_position(hunk.start), _position(hunk.end)), hunk.text) for hunk in edit.hunks]
    if not profile.has_versioned_edits:
        return types.WorkspaceEdit(changes={edit.uri: plain})
    document = types.OptionalVersionedTextDocumentIdentifier(uri=edit.uri, version=edit.version)
    if not (edit.needs_confirmation and profile.has_annotations):
        return types.WorkspaceEdit(document_changes=[types.TextDocumentEdit(document, plain)])
    annotations: dict[str, types.ChangeAnnotation] = {}
    annotated: list[types.AnnotatedTextEdit] = []
    for number, (hunk, text_edit) in enumerate(zip(edit.hunks, plain, strict=True), start=1):
        name = f"{_ANNOTATION}.{number}"
        lines = f"lines {hunk.start.line + 1} to {max(hunk.start.line, hunk.end.line - 1) + 1}"
        annotations[name] = types.ChangeAnnotation(
            label=f"{edit.label} ({number} of {len(edit.hunks)})", needs_confirmation=True, description=lines
        )
        annotated.append(
            types.AnnotatedTextEdit(annotation_id=name, range=text_edit.range, new_text=text_edit.new_text)
        )
    changes = [types.TextDocumentEdit(document, annotated)]
    return types.WorkspaceEdit(document_changes=changes, change_annotations=annotations)


def code_action(action: Action, diagnostics: Sequence[types.Diagnostic], profile: ClientProfile) -> types.CodeAction:
    """An action as the protocol has it: always a command, never an edit.

    Args:
        action: The action.
        diagnostics: Those of the request's context.
        profile: What the client does.

    Returns:
        The code action.
    """
    mended = [diagnostics[index] for index in action.diagnostics]
    if action.kind == FIX_KIND and not mended:
        mended = [found for found in diagnostics if found.source == SOURCE]
    disabled = types.CodeActionDisabled(reason=action.disabled) if action.disabled else None
    return types.CodeAction(
        title=action.title,
        kind=action.kind,
        diagnostics=mended or None,
        disabled=disabled if profile.has_disabled_actions else None,
        command=types.Command(title=action.title, command=action.command, arguments=[dict(action.argument)]),
    )


def action_request(params: types.CodeActionParams, diagnostics: Sequence[Mapping[str, Any]]) -> Request:
    """What the client asks for, in our words.

    Args:
        params: The request.
        diagnostics: Its diagnostics, as JSON.

    Returns:
        The request; a missing trigger kind counts as invoked.
    """
    return Request(
        start=position(params.range.start),
        end=position(params.range.end),
        only=[str(getattr(kind, "value", kind)) for kind in params.context.only] if params.context.only else None,
        is_automatic=params.context.trigger_kind == types.CodeActionTriggerKind.Automatic,
        diagnostics=diagnostics,
    )


def document_changes(params: types.DidChangeTextDocumentParams) -> list[Change]:
    """What the client changed, in our words.

    Args:
        params: The notification.

    Returns:
        The changes in order.
    """
    return [
        Change(change.text, position(change.range.start), position(change.range.end))
        if isinstance(change, types.TextDocumentContentChangePartial)
        else Change(change.text)
        for change in params.content_changes
    ]


def position(place: types.Position) -> Position:
    """A position in our words."""
    return Position(place.line, place.character)


def _position(place: Position) -> types.Position:
    return types.Position(line=place.line, character=place.character)
