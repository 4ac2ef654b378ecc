"""Reads Python in a process of its own.

`ast.parse` and libcst's native parser hold the interpreter's lock for as long as they run: 20 to 280 ms for a file of
2,000 lines. In a process that also answers an editor and decodes, that stops both; in a child it stops nothing, and a
parser that crashes or never ends takes only the child with it.

Functions and arguments go over as pickles, both ways between parent and child alone. One call at a time.

A call that is cancelled, or takes longer than `TIME_LIMIT_S`, ends the child.
"""

from __future__ import annotations

import math
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, BinaryIO, ParamSpec, Protocol, TypeVar, cast

from engine.errors import CancelledError, EngineError

P = ParamSpec("P")
T = TypeVar("T")

TIME_LIMIT_S = 120.0
_END_S = 1.0


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

    Functions are expected to be pure: a call whose child was ended by others is made once more.

    Args:
        time_limit_s: Seconds that one call may take.
    """

    def __init__(self, time_limit_s: float = TIME_LIMIT_S) -> None:
        self._time_limit_s = time_limit_s
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._current: threading.Event | None = None  # of the call that is under way, set when it is cancelled
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
            EngineError: The child ended twice or ran out of time during the call, or this is closed.
            Exception: What `work` raised.
        """
        return self._call(threading.Event(), work, args, kwargs)

    def cancellable(self, is_cancelled: threading.Event) -> CancellableCall:
        """The same for one piece of work that can be cancelled.

        Args:
            is_cancelled: Set by whoever cancels, before `CancellableCall.cancel`.

        Returns:
            The call.
        """
        return CancellableCall(self, is_cancelled)

    def start(self) -> None:
        """Have the child ready before the first call; what goes wrong is told by that call."""
        with suppress(EngineError):
            self(_import_parsers)

    def close(self) -> None:
        """End the child; a call that is under way fails."""
        self._is_closed = True
        if (child := self._child) is not None:
            child.kill()
        with self._lock:
            _close(self._child)
            self._child = None

    def _call(self, is_cancelled: threading.Event, work: Callable[..., T], args: Any, kwargs: Any) -> T:
        with self._lock:
            self._current = is_cancelled
            try:
                ok, value = self._ask(is_cancelled, (work, args, kwargs), is_last=False)
            finally:
                self._current = None
        if not ok:
            raise cast(BaseException, value)
        return cast(T, value)

    def _ask(self, is_cancelled: threading.Event, request: Any, *, is_last: bool) -> tuple[bool, object]:
        """One exchange, and another one with a new child if this one was ended by others."""
        if is_cancelled.is_set():
            raise CancelledError("Cancelled while Python was read")
        child = self._running()
        is_late = threading.Event()

        def end() -> None:
            is_late.set()
            child.kill()

        alarm = threading.Timer(self._time_limit_s, end)
        alarm.daemon = True
        alarm.start()
        try:
            return _exchange(child, request)
        except (OSError, EOFError, pickle.UnpicklingError):
            code = _ended(child)
            if self._is_closed:
                raise EngineError("PlanPatch is closing") from None
            if is_cancelled.is_set():
                raise CancelledError("Cancelled while Python was read") from None
            if is_late.is_set() or is_last:
                raise self._fault(request[0].__name__, code, is_late=is_late.is_set()) from None
        finally:
            alarm.cancel()
        return self._ask(is_cancelled, request, is_last=True)

    def interrupt(self, is_cancelled: threading.Event) -> None:
        """End the child if it works on a call that was cancelled; the next call has a new one.

        Args:
            is_cancelled: The call's.
        """
        child = self._child
        if child is not None and self._current is is_cancelled:
            child.kill()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._is_closed:
            raise EngineError("PlanPatch is closing")
        if self._child is None or self._child.poll() is not None:
            _close(self._child)
            flags = subprocess.CREATE_NO_WINDOW if sys.platform == "win32" else 0
            main = f"from engine.patching.parser_process import serve; serve({math.ceil(self._time_limit_s) + 2})"
            command = [sys.executable, "-I", "-X", "utf8", "-c", main]
            try:
                self._child = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, creationflags=flags
                )
            except OSError as fault:
                raise EngineError(f"The process that reads Python cannot be started: {fault}") from None
        return self._child

    def _fault(self, name: str, code: int, *, is_late: bool) -> EngineError:
        if is_late:
            return EngineError(
                f"Reading and proving took longer than {self._time_limit_s:g} s (in {name})",
                hint="Nothing was changed. The file is very large for this machine.",
            )
        return EngineError(
            f"The process that reads Python ended with code {code} (in {name})",
            hint="Nothing was changed. If it happens again, planpatch doctor looks at the installation.",
        )


class CancellableCall:
    """A `Call` of one piece of work, which can be cancelled from another thread.

    Args:
        process: Where the calls are made.
        is_cancelled: Whether it was cancelled.
    """

    def __init__(self, process: ParserProcess, is_cancelled: threading.Event) -> None:
        self._process = process
        self._is_cancelled = is_cancelled

    def __call__(self, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """See `ParserProcess.__call__`.

        Raises:
            CancelledError: It was cancelled.
        """
        return self._process._call(self._is_cancelled, work, args, kwargs)  # pyright: ignore[reportPrivateUsage]

    def cancel(self) -> None:
        """End the call that is under way; `is_cancelled` is set already."""
        self._process.interrupt(self._is_cancelled)


def _exchange(child: subprocess.Popen[bytes], request: object) -> tuple[bool, object]:
    assert child.stdin is not None and child.stdout is not None
    _write(cast(BinaryIO, child.stdin), request)
    return pickle.load(child.stdout)


def _write(pipe: BinaryIO, value: object) -> None:
    pipe.write(pickle.dumps(value, pickle.HIGHEST_PROTOCOL))
    pipe.flush()


def _ended(child: subprocess.Popen[bytes]) -> int:
    """The exit code of a child whose pipe has ended."""
    try:
        return child.wait(_END_S)
    except subprocess.TimeoutExpired:
        child.kill()
        return child.wait()


def _close(child: subprocess.Popen[bytes] | None) -> None:
    if child is None:
        return
    child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout):
        with suppress(OSError):
            if pipe is not None:
                pipe.close()


def _import_parsers() -> None:
    import libcst  # noqa: F401  # pyright: ignore[reportUnusedImport]

    import engine.patching.proof  # noqa: F401  # pyright: ignore[reportUnusedImport]


def _set_alarm(seconds: int) -> None:
    """Have the system end this process after some seconds, even while a parser holds everything; 0: do not."""
    if sys.platform != "win32":
        signal.alarm(seconds)


def serve(longest_s: int) -> None:
    """The child: answer calls until the parent is gone.

    Args:
        longest_s: Seconds after which a call ends this process, should the parent not live to do that.
    """
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
        _set_alarm(longest_s)
        try:
            answer: tuple[bool, Any] = True, work(*args, **kwargs)
        except Exception as error:  # the caller's to handle
            answer = False, error
        _set_alarm(0)
        try:
            _write(answers, answer)
        except (pickle.PicklingError, TypeError, AttributeError) as fault:
            _write(answers, (False, RuntimeError(f"{answer[1]!r} cannot be sent: {fault}")))
        except OSError:
            return
