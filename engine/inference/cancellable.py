"""An engine as one piece of work sees it: everything that the work generates stops when the work is cancelled."""

from __future__ import annotations

import threading
from collections.abc import Iterator

from engine.errors import CancelledError
from engine.inference.protocol import ChatTokenizer, Engine, EngineStatus, Event, GenerationRequest


class CancellableEngine:
    """See the module's docstring. The engine itself belongs to others and stays open.

    Args:
        engine: The engine that does the work.
        is_cancelled: Set when nothing more is to be generated; None makes one.
    """

    def __init__(self, engine: Engine, is_cancelled: threading.Event | None = None) -> None:
        self._engine = engine
        self._requests: dict[str, GenerationRequest] = {}
        self._is_cancelled = is_cancelled or threading.Event()

    @property
    def tokenizer(self) -> ChatTokenizer:
        """The model's tokenizer."""
        return self._engine.tokenizer

    def submit(self, request: GenerationRequest) -> str:
        """Queue a request.

        Args:
            request: What to generate.

        Returns:
            Its id.

        Raises:
            CancelledError: The work was cancelled.
            EngineError: The queue is full or the engine is closed.
            ContextLengthError: The request does not fit.
        """
        if self._is_cancelled.is_set():
            raise CancelledError("The edit was cancelled")
        request_id = self._engine.submit(request)
        self._requests[request_id] = request
        if self._is_cancelled.is_set():  # between the first look and now
            self._engine.cancel(request_id)
        return request_id

    def stream(self, request_id: str) -> Iterator[Event]:
        """The engine's events."""
        return self._engine.stream(request_id)

    def cancel(self, request_id: str) -> None:
        """Stop one request."""
        self._engine.cancel(request_id)

    def cancel_all(self) -> None:
        """Stop what is being generated, and refuse what comes after it; from any thread."""
        self._is_cancelled.set()
        for request_id in list(self._requests):
            self._engine.cancel(request_id)

    def status(self) -> EngineStatus:
        """What the engine is doing now."""
        return self._engine.status()

    def use_adapter(self, path: str | None) -> None:
        """Make an adapter the current one.

        Args:
            path: Its folder.

        Raises:
            AdapterError: Missing, damaged, or made for another base.
        """
        self._engine.use_adapter(path)

    def close(self) -> None:
        """Cancel what this work asked for."""
        self.cancel_all()
