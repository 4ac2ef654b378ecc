"""Every error that PlanPatch raises on purpose.

    PlanPatchError
    ├── UsageError                 the request is wrong: an argument, a path, a setting
    │   ├── SettingError           a setting has a value that cannot be used
    │   ├── PathError              the file is missing, outside the root, not a file
    │   ├── UnknownScopeError      no such function or class, or several of that name
    │   └── UnknownModelError      a name that means no model
    ├── SourceError                the file's text cannot be edited: binary, too large, not UTF-8, does not parse
    ├── RefusedError               no patch is offered
    │   ├── GateError              a gate refused it; carries the verdicts
    │   ├── StaleTextError         the text is not the text that the plan or patch was made for
    │   ├── BudgetError            tokens or time ran out first
    │   ├── ContextLengthError     function and expected output do not fit the model
    │   ├── EditorError            the editor did not make an edit that it was sent
    │   └── CancelledError         the user cancelled
    └── EnvironmentFault           this machine cannot do it now
        ├── ModelError             model missing, damaged, of the wrong digest, too large for memory or disk
        ├── AdapterError           adapter missing, damaged, or made for another base
        ├── LedgerError            the ledger cannot be read or written
        ├── WriteError             a file or folder cannot be written: full disk, read-only, locked
        ├── EditorUnreachableError an editor may have the file open, and its server cannot be asked
        └── EngineError            the engine is closed, its queue is full, or the device failed

A message says what was wrong and where it came from; `hint` says what to do. `exit_code` is what the command line
returns: 1 refused, 2 usage, 3 environment.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, ClassVar


class PlanPatchError(Exception):
    """Base of all errors raised on purpose.

    Args:
        message: What was wrong and where it came from, in one sentence.
        hint: What the user can do about it; may be empty.
        details: Facts for programs, JSON-serialisable.
    """

    code: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 3

    def __init__(self, message: str, *, hint: str = "", **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.details = details

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), hint=self.hint, **self.details), (self.message,)

    def to_json(self) -> dict[str, Any]:
        """The error as `{code, message, hint, details}` for programs."""
        return {"code": self.code, "message": self.message, "hint": self.hint, "details": self.details}


class UsageError(PlanPatchError):
    """The request is wrong."""

    code = "usage"
    exit_code = 2


class SettingError(UsageError):
    """A setting has a value that cannot be used."""

    code = "setting"


class PathError(UsageError):
    """The file is missing, outside the root, or not a file."""

    code = "path"


class UnknownScopeError(UsageError):
    """No function or class of that name, or several."""

    code = "unknown_scope"


class UnknownModelError(UsageError):
    """A name that means no model."""

    code = "unknown_model"


class SourceError(PlanPatchError):
    """The file's text cannot be edited."""

    code = "source"
    exit_code = 2


class RefusedError(PlanPatchError):
    """No patch is offered."""

    code = "refused"
    exit_code = 1


class GateError(RefusedError):
    """A gate refused the patch; `details["gates"]` holds every verdict."""

    code = "gate"


class StaleTextError(RefusedError):
    """The text is not the text that the plan or patch was made for."""

    code = "stale_text"


class BudgetError(RefusedError):
    """Tokens or time ran out before the answer was complete."""

    code = "budget"


class ContextLengthError(RefusedError):
    """Function and expected output do not fit the model's context."""

    code = "context_length"


class EditorError(RefusedError):
    """The editor did not make an edit that it was sent."""

    code = "editor"


class CancelledError(RefusedError):
    """The user cancelled."""

    code = "cancelled"


class EnvironmentFault(PlanPatchError):
    """This machine cannot do it now."""

    code = "environment"


class ModelError(EnvironmentFault):
    """The model is missing, damaged, or too large for this machine."""

    code = "model"


class AdapterError(EnvironmentFault):
    """The adapter is missing, damaged, or made for another base."""

    code = "adapter"


class LedgerError(EnvironmentFault):
    """The ledger cannot be read or written."""

    code = "ledger"


class WriteError(EnvironmentFault):
    """A file or folder cannot be written."""

    code = "write"


class EditorUnreachableError(EnvironmentFault):
    """An editor may have the file open, and its server cannot be asked."""

    code = "editor_unreachable"


class EngineError(EnvironmentFault):
    """The engine is closed, its queue is full, or the device failed."""

    code = "engine"


def error_of_json(error: Mapping[str, Any]) -> PlanPatchError:
    """The error that another process of ours told of.

    Args:
        error: As `PlanPatchError.to_json` writes it.

    Returns:
        An error of the same class; an `EnvironmentFault` where its code is no class's.
    """
    kind = next((kind for kind in _kinds(PlanPatchError) if kind.code == error.get("code")), EnvironmentFault)
    made = kind(str(error.get("message") or "The server failed"), hint=str(error.get("hint") or ""))
    details = error.get("details")
    made.details = {**details} if isinstance(details, Mapping) else {}
    return made


def _kinds(kind: type[PlanPatchError]) -> Iterator[type[PlanPatchError]]:
    yield kind
    for more in kind.__subclasses__():
        yield from _kinds(more)
