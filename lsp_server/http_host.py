"""The HTTP listener beside a language server, or why there is none. Imports FastAPI only when it starts."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from engine.errors import PathError, PlanPatchError
from engine.patching.parser_process import ParserProcess
from lsp_server.editor import Severity
from lsp_server.model_host import ModelHost
from lsp_server.records import Records
from lsp_server.session import Session

if TYPE_CHECKING:
    from lsp_server.http.listener import Listener
    from lsp_server.http.service import InEditor

log = logging.getLogger("planpatch.http")


class HttpHost:
    """See the module's docstring. Its methods are called from one thread.

    Args:
        model: The model's host.
        session_of: The session as the settings are now.
        in_editor: Applies a patch, rolls it back or redoes it in the editor, if that has the file open.
        tell: Called, on whatever thread, with what the user should know.

    `problem` is what the user was told last; a listener on another port than the setting's is one too.
    """

    def __init__(
        self,
        model: ModelHost,
        session_of: Callable[[], Session],
        in_editor: InEditor,
        tell: Callable[[str, Severity], None],
    ) -> None:
        self._model = model
        self._session_of = session_of
        self._parsers = ParserProcess()
        self._in_editor = in_editor
        self._tell = tell
        self._records = Records(lambda: session_of().served_ledger())
        self._listener: Listener | None = None
        self._is_closed = False
        self.problem = ""
        self._thread = threading.Thread(target=self._start, name="planpatch-http-start", daemon=True)

    @property
    def url(self) -> str:
        """Where it listens; empty while it does not."""
        return self._listener.address.url if self._listener is not None else ""

    def start(self) -> None:
        """Begin to listen, on a thread: importing what that needs takes a while."""
        if self._session_of().settings.http:
            self._thread.start()

    def close(self) -> None:
        """Stop listening."""
        self._is_closed = True
        if self._thread.ident is not None:
            self._thread.join()
        if self._listener is not None:
            self._listener.close()
        self._parsers.close()
        self._records.close()

    def _start(self) -> None:
        try:
            self._listen()
        except PlanPatchError as error:
            self._say(f"{error.message}. {error.hint}", Severity.INFO)
        except Exception as fault:  # the editor goes on without it
            log.exception("HTTP cannot start")
            self._say(f"HTTP cannot start: {type(fault).__name__}: {fault}", Severity.WARNING)

    def _say(self, message: str, severity: Severity) -> None:
        self.problem = message if severity is not Severity.LOG else ""
        self._tell(message, severity)

    def _listen(self) -> None:
        from lsp_server.http.listener import Listener, TakenError, bind, new_token
        from lsp_server.http.service import Service

        session = self._session_of()
        settings, runtime_file = session.settings, session.paths.runtime_file
        root = session.paths.resolve(settings.root).resolve() if settings.root else None
        if root is not None and not root.is_dir():
            raise PathError(f"The root {root} is no folder ({settings.source_of('root')})", hint="Correct it.")
        told: tuple[str, Severity] | None = None
        try:
            bound = bind(settings.host, settings.port, has_token=bool(settings.token), runtime_file=runtime_file)
        except TakenError as error:  # the command line still has to reach this editor
            bound = bind("127.0.0.1", 0, has_token=False, runtime_file=runtime_file)
            told = error.message, Severity.LOG if error.details["holder_is_planpatch"] else Severity.INFO
        service = Service(
            self._model,
            self._session_of,
            self._records,
            new_token(),
            parsers=self._parsers,
            in_editor=self._in_editor,
            root=root,
        )
        listener = Listener(service, bound, runtime_file)
        if self._is_closed:
            bound.close()
            return
        listener.start()
        self._listener = listener
        log.info("HTTP listens on %s", listener.address.url)
        if told is not None:
            hint = "Another port is the setting port." if told[1] is Severity.INFO else ""
            self._say(f"{told[0]}. This server listens on {listener.address.url}. {hint}".rstrip(), told[1])
