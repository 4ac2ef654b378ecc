"""pygls' protocol with documents of our own, commands of one argument, and an answer to every request.

pygls keeps texts whose lines end at form feeds and U+2028, where the protocol's do not; it leaves a request whose
parameters it cannot read without an answer; and it gives commands one parameter for each argument. So these parts are
ours. Its built-in handlers are generators, ours return; it takes both.
"""

# pyright: reportIncompatibleMethodOverride=false
from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any, cast

from lsprotocol import types
from pygls.exceptions import JsonRpcException
from pygls.protocol import LanguageServerProtocol
from pygls.protocol.language_server import lsp_method

from engine.errors import PlanPatchError, UsageError
from lsp_server.edit_jobs import unexpected
from lsp_server.lsp_editor import document_changes
from lsp_server.workbench import said

if TYPE_CHECKING:
    from lsp_server.language_server import PlanPatchServer

_NOT_INITIALIZED, _INVALID_REQUEST, _INVALID_PARAMS, _INTERNAL_ERROR = -32002, -32600, -32602, -32603
_REQUEST_FAILED = -32803

log = logging.getLogger("planpatch.lsp")


class Protocol(LanguageServerProtocol):
    """pygls' protocol with documents of our own, commands of one argument, and an answer to every request."""

    client_capabilities_json: dict[str, Any] | None = None  # as they came
    _server: PlanPatchServer  # pyright: ignore[reportIncompatibleVariableOverride]

    def receive(self, body: bytes) -> None:
        """Handle one message.

        Args:
            body: Its JSON.
        """
        try:
            found: Any = json.loads(body)
        except (ValueError, RecursionError) as fault:
            log.warning("a message is no JSON: %s", fault)
            return
        raw = cast("dict[str, Any]", found) if isinstance(found, dict) else {}
        if raw.get("jsonrpc") != self.VERSION:
            log.warning("a message is no JSON-RPC 2.0")
            return
        message_id = raw.get("id")
        is_request = message_id is not None and "method" in raw
        if is_request and self._is_new() and raw["method"] != types.INITIALIZE:
            self._answer_error(message_id, _NOT_INITIALIZED, "initialize comes first")
            return
        if is_request and not self._is_new() and raw["method"] == types.INITIALIZE:
            self._answer_error(message_id, _INVALID_REQUEST, "initialize comes once")
            return
        if raw.get("method") == types.INITIALIZE and isinstance(raw.get("params"), dict):
            self.client_capabilities_json = raw["params"].get("capabilities")
        if is_request and self._shutdown:
            self._answer_error(message_id, _INVALID_REQUEST, "the server is shutting down")
            return
        try:
            message: Any = self.structure_message(raw)
        except JsonRpcException as error:
            if is_request:
                self._answer_error(
                    message_id, _INVALID_PARAMS, f"{raw['method']}: the parameters are not the protocol's"
                )
            log.warning("a message cannot be read: %s", error)
            return
        self.handle_message(message)

    def _answer_error(self, message_id: Any, code: int, message: str) -> None:
        self._send_response(message_id, error=types.ResponseError(code=code, message=message))

    def _is_new(self) -> bool:
        return self._server.bench_or_none is None

    @lsp_method(types.TEXT_DOCUMENT_DID_OPEN)
    def lsp_text_document__did_open(self, params: types.DidOpenTextDocumentParams) -> None:
        """Keep a document."""
        item = params.text_document
        self._server.bench.did_open(item.uri, item.text, item.version, str(item.language_id))

    @lsp_method(types.TEXT_DOCUMENT_DID_CHANGE)
    def lsp_text_document__did_change(self, params: types.DidChangeTextDocumentParams) -> None:
        """Take in a change."""
        file = self._server.bench.files.get(params.text_document.uri)
        if file is None:
            log.warning("a change of a document that is not open: %s", params.text_document.uri)
            return
        file.document.change(document_changes(params), params.text_document.version)
        self._server.bench.did_change(file)

    @lsp_method(types.TEXT_DOCUMENT_DID_CLOSE)
    def lsp_text_document__did_close(self, params: types.DidCloseTextDocumentParams) -> None:
        """Forget a document."""
        self._server.bench.did_close(params.text_document.uri)

    @lsp_method(types.WORKSPACE_EXECUTE_COMMAND)
    async def lsp_workspace__execute_command(self, params: types.ExecuteCommandParams) -> Any:
        """Run one of `COMMANDS`; errors of ours become the response's error, with their facts as its data."""
        try:
            return await self._server.execute(params.command, params.arguments or [])
        except PlanPatchError as error:
            code = _INVALID_PARAMS if isinstance(error, UsageError) else _REQUEST_FAILED
            raise JsonRpcException(said(error), code, error.to_json()) from error
        except Exception as fault:
            log.exception("%s failed", params.command)
            error = unexpected(fault)
            raise JsonRpcException(said(error), _INTERNAL_ERROR, error.to_json()) from fault

    @lsp_method(types.WINDOW_WORK_DONE_PROGRESS_CANCEL)
    def lsp_work_done_progress_cancel(self, params: types.WorkDoneProgressCancelParams) -> None:
        """Cancel the job, or the download, whose progress it is."""
        self._server.cancel_progress(str(params.token))

    @lsp_method(types.EXIT)
    def lsp_exit(self, *_: object) -> None:
        """End the process: 0 after `shutdown`, else 1."""
        self._server.end(0 if self._shutdown else 1)
