"""Reads Python in a process of its own.

`ast.parse` and libcst's native parser hold the interpreter's lock for as long as they run: 20 to 280 ms for a file of
2,000 lines. In a process that also answers an editor and decodes, that stops both; in a child it stops nothing, and a
parser that crashes or never ends takes only the child with it.

Functions and arguments go over as pickles, both ways between parent and child alone. One call at a time.

Not covered: cancelling a call; one that takes longer than `TIME_LIMIT_S` is ended.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, BinaryIO, ParamSpec, Protocol, TypeVar, cast

from engine.errors import EngineError

P = ParamSpec("P")
T = TypeVar("T")

TIME_LIMIT_S = 60.0

_MAIN = "from engine.patching.parser_process import serve; serve()"


class Call(Protocol):
    """Calls a function of this package somewhere: here, or in a `ParserProcess`."""

    def __call__(self, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """What `work` returns or raises."""
        ...


def in_this_process(work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """A `Call` that does it at once, on the caller's thread."""
    return work(*args, **kwargs)


class ParserProcess:
    """A `Call` that does it in a child process, which starts at the first call and again after it ended. Thread-safe.

    Args:
        time_limit_s: Seconds that one call may take.
    """

    def __init__(self, time_limit_s: float = TIME_LIMIT_S) -> None:
        self._time_limit_s = time_limit_s
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._is_closed = False

    @property
    def pid(self) -> int | None:
        """The child's process id; None while there is none."""
        child = self._child
        return child.pid if child is not None and child.poll() is None else None

    def __call__(self, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function in the child.

        Args:
            work: A function of a module, so that it can be pickled by its name.
            *args: Its arguments.
            **kwargs: More of them.

        Returns:
            What it returns.

        Raises:
            EngineError: The child ended or ran out of time during the call, or this is closed.
            Exception: What `work` raised.
        """
        with self._lock:
            child = self._running()
            is_late = threading.Event()
            alarm = threading.Timer(self._time_limit_s, lambda: (is_late.set(), child.kill()))
            alarm.daemon = True
            alarm.start()
            try:
                ok, value = _exchange(child, (work, args, kwargs))
            except (OSError, EOFError, pickle.UnpicklingError):
                child.kill()
                raise self._fault(work.__name__, child.wait(), is_late=is_late.is_set()) from None
            finally:
                alarm.cancel()
        if not ok:
            raise cast(BaseException, value)
        return cast(T, value)

    def start(self) -> None:
        """Have the child ready before the first call; what goes wrong is told by that call."""
        with suppress(EngineError):
            self(_import_parsers)

    def close(self) -> None:
        """End the child; a call that is under way fails."""
        self._is_closed = True
        if (child := self._child) is not None:
            child.kill()
            child.wait()
        with self._lock:
            _close_pipes(self._child)
            self._child = None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._is_closed:
            raise EngineError("PlanPatch is closing")
        if self._child is None or self._child.poll() is not None:
            _close_pipes(self._child)
            flags = subprocess.CREATE_NO_WINDOW if sys.platform == "win32" else 0
            command = [sys.executable, "-I", "-X", "utf8", "-c", _MAIN]
            try:
                self._child = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, creationflags=flags
                )
            except OSError as fault:
                raise EngineError(f"The process that reads Python cannot be started: {fault}") from None
        return self._child

    def _fault(self, name: str, code: int, *, is_late: bool) -> EngineError:
        if self._is_closed:
            return EngineError("PlanPatch is closing")
        why = f"took longer than {self._time_limit_s:g} s" if is_late else f"ended with code {code}"
        return EngineError(
            f"The process that reads Python {why} (in {name})",
            hint="Nothing was changed. Try again, or select a smaller part of the file.",
        )


def _exchange(child: subprocess.Popen[bytes], request: object) -> tuple[bool, object]:
    assert child.stdin is not None and child.stdout is not None
    _write(cast(BinaryIO, child.stdin), request)
    return pickle.load(child.stdout)


def _write(pipe: BinaryIO, value: object) -> None:
    pipe.write(pickle.dumps(value, pickle.HIGHEST_PROTOCOL))
    pipe.flush()


def _close_pipes(child: subprocess.Popen[bytes] | None) -> None:
    for pipe in (child.stdin, child.stdout) if child is not None else ():
        with suppress(OSError):
            if pipe is not None:
                pipe.close()


def _import_parsers() -> None:
    import libcst  # noqa: F401  # pyright: ignore[reportUnusedImport]

    import engine.patching.proof  # noqa: F401  # pyright: ignore[reportUnusedImport]


def serve() -> None:
    """The child: answer calls until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    requests = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints must not end up among the answers
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    while True:
        try:
            work, args, kwargs = pickle.load(requests)
        except EOFError:
            return
        try:
            answer: tuple[bool, Any] = True, work(*args, **kwargs)
        except Exception as error:  # the caller's to handle
            answer = False, error
        try:
            _write(answers, answer)
        except (pickle.PicklingError, TypeError, AttributeError) as fault:
            _write(answers, (False, RuntimeError(f"{answer[1]!r} cannot be sent: {fault}")))
        except OSError:
            return
