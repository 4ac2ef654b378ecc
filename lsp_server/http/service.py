"""What the routes share: the model's host, the ledger, the generations, the settings, and who may do what."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from starlette.requests import Request

from engine.errors import CancelledError, PlanPatchError
from engine.inference.protocol import Engine
from engine.inference.tokenizer import HFChatTokenizer
from engine.patching.ledger_records import Operation
from engine.patching.parser_process import Call as Parsers
from engine.patching.parser_process import in_this_process
from lsp_server.http.errors import HttpError
from lsp_server.http.generation import Generations
from lsp_server.http.guard import has_token
from lsp_server.model_host import ModelHost
from lsp_server.records import Records
from lsp_server.session import Session
from lsp_server.settings import Settings

InEditor = Callable[[Operation, str], Awaitable[dict[str, Any] | None]]

# Ollama's clients ask for at least 0.6.4; the suffix says who answers.
OLLAMA_VERSION = "0.12.6"
RELEASED_RETRY_S = 60  # training takes minutes
_RETRY_AFTER_S: dict[str, int | None] = {"loading": None, "absent": None, "released": RELEASED_RETRY_S}


@dataclass(slots=True)
class Service:
    """See the module's docstring.

    Args:
        host: The model's host.
        session_of: The session as the settings are now.
        records: The ledger.
        token: The runtime token, which whatever changes something needs.
        parsers: Where Python is read and patches are proved.
        in_editor: Applies a patch, rolls it back or redoes it in the connected editor, if that has the file open, and
            returns None if not; None: no editor is connected.
        root: Folder that paths must lie in; None: paths are refused.
        runtime_name: The file that has the token.
        generations: What is generated now.
        tell: Called with a sentence for the user when something is wrong.
    """

    host: ModelHost
    session_of: Callable[[], Session]
    records: Records
    token: str
    parsers: Parsers = in_this_process
    in_editor: InEditor | None = None
    root: Path | None = None
    runtime_name: str = "runtime.json"
    generations: Generations = field(default_factory=Generations)

    @property
    def settings(self) -> Settings:
        """The settings as they are now."""
        return self.session_of().settings

    @property
    def version(self) -> str:
        """PlanPatch's version."""
        return version("planpatch")

    async def engine(self) -> Engine:
        """The engine, waited for while it loads.

        Returns:
            The engine, ready.

        Raises:
            HttpError: 503: it is not here, or failed.
        """
        ready = self.engine_now()
        if ready is not None:
            return ready
        is_cancelled = threading.Event()
        try:
            return await asyncio.to_thread(self.host.wait, is_cancelled)
        except CancelledError:
            raise HttpError(503, "the model is loading", code="loading") from None
        except PlanPatchError as error:
            retry = _RETRY_AFTER_S.get(self.host.status.state, 0)
            raise HttpError(503, error.message, code=error.code, hint=error.hint, retry_after_s=retry) from None
        finally:
            is_cancelled.set()

    def engine_now(self) -> Engine | None:
        """The engine if it is there, None while it loads.

        Returns:
            The engine.

        Raises:
            HttpError: 503: there is no model now; without Retry-After where it failed, since waiting helps nobody.
        """
        engine, status = self.host.engine_or_none, self.host.status
        if engine is not None:
            now = engine.status()
            if now.state == "failed":
                raise HttpError(503, "the engine failed", code="failed", hint="Restart PlanPatch.", retry_after_s=0)
            return engine
        if status.state not in ("off", "loading"):
            retry = _RETRY_AFTER_S.get(status.state, 0)
            message = status.message or "there is no model"
            raise HttpError(503, message, code=status.state, hint=status.hint, retry_after_s=retry)
        return None

    def ready_engine(self) -> Engine:
        """The engine, if it is there now.

        Returns:
            The engine.

        Raises:
            HttpError: 503 with Retry-After: it is loading, or not here.
        """
        engine = self.engine_now()
        if engine is None:
            raise HttpError(503, self.host.status.message or "the model is loading", code="loading")
        return engine

    def check_token(self, request: Request) -> None:
        """Refuse a request that changes something and does not carry the runtime token.

        Args:
            request: The request.

        Raises:
            HttpError: 401.
        """
        if not has_token(request.headers, self.token, self.settings.token):
            raise HttpError(
                401,
                "this needs the token of the running server",
                hint=f"Send Authorization: Bearer TOKEN; the token is in {self.runtime_name} under PLANPATCH_HOME.",
            )


def tokenizer_of(engine: Engine) -> HFChatTokenizer:
    """The engine's tokenizer with all that HTTP needs of it.

    Args:
        engine: An engine in this process.

    Returns:
        The tokenizer.

    Raises:
        HttpError: 503: it is of another kind.
    """
    tokenizer = engine.tokenizer
    if not isinstance(tokenizer, HFChatTokenizer):
        raise HttpError(503, "this engine's tokenizer cannot be used over HTTP")
    return tokenizer
