"""Errors as HTTP says them: a status, and one object that names the gate or the limit.

The APIs of Ollama and OpenAI have shapes of their own, so a route says which one its errors take (`ErrorShape`).
"""

from __future__ import annotations

from typing import Any, Literal

from engine.errors import (
    BudgetError,
    CancelledError,
    ContextLengthError,
    EditorError,
    EditorUnreachableError,
    EngineError,
    GateError,
    LedgerError,
    ModelError,
    PathError,
    PlanPatchError,
    StaleTextError,
    UnknownModelError,
    UsageError,
    WriteError,
)

ErrorShape = Literal["planpatch", "ollama", "openai"]

RETRY_AFTER_S = 2
_STATUS: tuple[tuple[type[PlanPatchError], int], ...] = (
    (GateError, 422),
    (StaleTextError, 409),
    (EditorError, 409),
    (BudgetError, 504),
    (ContextLengthError, 413),
    (CancelledError, 499),
    (UnknownModelError, 404),
    (PathError, 403),
    (UsageError, 400),
    (LedgerError, 500),
    (WriteError, 500),
    (ModelError, 503),
    (EngineError, 503),
    (EditorUnreachableError, 503),
)


class HttpError(Exception):
    """A request that cannot be served.

    Args:
        status: HTTP status.
        message: Why, in the words of the API that it belongs to.
        code: Names the error for programs; "" is made from the status.
        hint: What to do.
        close: Whether the connection ends too, because the rest of the body is not read.
        retry_after_s: For 503, when to come again; 0 for never.
        details: Facts for programs.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str = "",
        hint: str = "",
        close: bool = False,
        retry_after_s: int | None = None,
        **details: Any,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code or _CODES.get(status, "error")
        self.hint = hint
        self.close = close
        self.retry_after_s = RETRY_AFTER_S if status == 503 and retry_after_s is None else retry_after_s
        self.details = details

    @classmethod
    def of(cls, error: PlanPatchError) -> HttpError:
        """One of our errors as HTTP says it."""
        status = next((status for kind, status in _STATUS if isinstance(error, kind)), 400)
        is_lasting = isinstance(error, EngineError) and not error.details.get("queue_full")
        retry = 0 if is_lasting else None
        return cls(status, error.message, code=error.code, hint=error.hint, retry_after_s=retry, **error.details)

    def headers(self) -> dict[str, str]:
        """Headers of the response."""
        found = {"Retry-After": str(self.retry_after_s)} if self.retry_after_s else {}
        found |= {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        return {**found, "Connection": "close"} if self.close else found

    def to_json(self, shape: ErrorShape) -> dict[str, Any]:
        """The response's body."""
        if shape == "ollama":
            return {"error": f"{self.message}. {self.hint}" if self.hint else self.message}
        if shape == "openai":
            kind = "invalid_request_error" if self.status < 500 else "server_error"
            code = "model_not_found" if self.code == "unknown_model" else self.code
            message = f"{self.message}. {self.hint}" if self.hint else self.message
            return {"error": {"message": message, "type": kind, "param": self.details.get("param"), "code": code}}
        error = {"code": self.code, "message": self.message, "hint": self.hint, "details": self.details}
        return {"ok": False, "error": error}


_CODES = {
    400: "bad_request",
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    408: "timeout",
    409: "conflict",
    413: "too_large",
    415: "unsupported_media_type",
    503: "unavailable",
}
