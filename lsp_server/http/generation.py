"""Generations for HTTP: a bounded number at once, each as an asynchronous stream that frees its slot when it ends.

The engine's thread never waits for a client: events go into a queue of the request, whether somebody reads them or not.
Leaving a stream early, as a client that vanishes does, cancels the request, which the engine sees within one step.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from engine.errors import EngineError, PlanPatchError
from engine.inference.protocol import Completion, Engine, Event, GenerationRequest
from lsp_server.http.errors import HttpError

T = TypeVar("T")

MAX_RUNNING = 8
MAX_WAITING = 32
MAX_EDITS_RUNNING = 2
MAX_EDITS_WAITING = 16
_MOST_RECENT = 20


@dataclass(slots=True)
class Call:
    """A request as the status page shows it; its text is not kept.

    Args:
        id: A number.
        path: What was called.
        started_at: Seconds since the epoch.
        state: `waiting`, `running`, `done`, `failed` or `gone`.
        seconds: How long it took; 0 until it ended.
        num_tokens: Tokens that were generated.
    """

    id: int
    path: str
    started_at: float = field(default_factory=time.time)
    state: str = "waiting"
    seconds: float = 0.0
    num_tokens: int = 0

    def to_json(self) -> dict[str, Any]:
        """The call for programs; the seconds of one that did not end are those until now."""
        has_ended = self.state not in ("waiting", "running")
        seconds = self.seconds if has_ended else max(0.0, time.time() - self.started_at)
        return {
            "id": self.id,
            "path": self.path,
            "started_at": self.started_at,
            "state": self.state,
            "seconds": round(seconds, 3),
            "num_tokens": self.num_tokens,
        }


class Slots:
    """Places for a bounded number of requests, given in order. Used from one event loop.

    Args:
        max_running: Requests that have one at once.
        max_waiting: Requests that wait for one; one more is refused with 503.
    """

    def __init__(self, max_running: int, max_waiting: int) -> None:
        self.max_running = max_running
        self.max_waiting = max_waiting
        self.num_running = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def num_waiting(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    def check_room(self) -> None:
        """Refuse a request that would have to wait behind too many.

        Raises:
            HttpError: 503 with Retry-After.
        """
        if self.num_running >= self.max_running and len(self._waiting) >= self.max_waiting:
            raise HttpError(
                503,
                f"server busy, please try again: {self.num_running} requests run and {len(self._waiting)} wait",
                code="queue_full",
                limit=self.max_running + self.max_waiting,
            )

    async def take(self) -> None:
        """Wait for a slot.

        Raises:
            HttpError: 503: too many wait.
        """
        if self.num_running < self.max_running and not self._waiting:
            self.num_running += 1
            return
        self.check_room()
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.free()  # it was given at the very moment
            raise
        finally:
            with suppress(ValueError):
                self._waiting.remove(turn)

    def free(self) -> None:
        """Give the slot to the one that waits longest, or have it free."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self.num_running -= 1


class Generations:
    """See the module's docstring. Used from one event loop.

    PLAN and PATCH have slots of their own: they are interactive, and must not wait behind chats.

    Args:
        max_running: Requests in the engine at once.
        max_waiting: Requests that wait for that; one more is refused with 503.
    """

    def __init__(self, max_running: int = MAX_RUNNING, max_waiting: int = MAX_WAITING) -> None:
        self.slots = Slots(max_running, max_waiting)
        self.edit_slots = Slots(MAX_EDITS_RUNNING, MAX_EDITS_WAITING)
        self.recent: deque[Call] = deque(maxlen=_MOST_RECENT)
        self._numbers = itertools.count(1)
        self._threads = ThreadPoolExecutor(max_running, "planpatch-http")
        self._edit_threads = ThreadPoolExecutor(MAX_EDITS_RUNNING, "planpatch-http-edit")

    def close(self) -> None:
        """Give the threads up; their generations were cancelled."""
        for threads in (self._threads, self._edit_threads):
            threads.shutdown(wait=False, cancel_futures=True)

    @asynccontextmanager
    async def call(self, path: str) -> AsyncGenerator[Call]:
        """Note a request for the status page while it is served.

        Args:
            path: What was called.

        Yields:
            Its note.

        Raises:
            ClientDisconnect: Raised inside, as is everything else.
        """
        call = Call(next(self._numbers), path)
        self.recent.append(call)
        started_at = time.monotonic()
        try:
            yield call
            call.state = "done"
        except (asyncio.CancelledError, GeneratorExit, ClientDisconnect):
            call.state = "gone"
            raise
        except Exception:
            call.state = "failed"
            raise
        finally:
            call.seconds = time.monotonic() - started_at

    async def stream(self, engine: Engine, request: GenerationRequest, call: Call) -> AsyncGenerator[Event]:
        """Generate.

        Args:
            engine: The model.
            request: What to generate.
            call: Its note.

        Yields:
            `Token` events, then one `Completion`.

        Raises:
            HttpError: 503: too many requests wait.
            PlanPatchError: The engine refused or failed.
        """
        await self.slots.take()
        call.state = "running"
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event | BaseException]()
        try:
            request_id = engine.submit(request)  # not on a thread: a cancel must not lose the id
        except BaseException:
            self.slots.free()
            raise

        def post(event: Event | BaseException) -> None:
            with suppress(RuntimeError):  # the loop was closed
                loop.call_soon_threadsafe(events.put_nowait, event)

        def pump() -> None:
            try:
                for event in engine.stream(request_id):
                    post(event)
            except Exception as error:  # the reader raises it
                post(error)

        pumping = loop.run_in_executor(self._threads, pump)
        pumping.add_done_callback(lambda _: self.slots.free())
        try:
            while True:
                event = await events.get()
                if isinstance(event, BaseException):
                    raise event
                if isinstance(event, Completion):
                    call.num_tokens = len(event.token_ids)
                    yield event
                    return
                yield event
        finally:
            engine.cancel(request_id)

    async def complete(self, engine: Engine, request: GenerationRequest, call: Call) -> Completion:
        """Generate and wait for the end.

        Args:
            engine: The model.
            request: What to generate.
            call: Its note.

        Returns:
            The completion.

        Raises:
            HttpError: 503: too many requests wait.
            PlanPatchError: The engine refused or failed.
        """
        stream = self.stream(engine, request, call)
        try:
            async for event in stream:
                if isinstance(event, Completion):
                    return event
        finally:
            await stream.aclose()
        raise EngineError("The stream ended without a completion")

    async def edit(self, work: Callable[[], T], cancel: Callable[[], None], call: Call) -> T:
        """Run a PLAN or PATCH on a thread and a slot of its own.

        Args:
            work: Does it.
            cancel: Makes it end soon; called when the caller is cancelled.
            call: Its note.

        Returns:
            What it returns.

        Raises:
            HttpError: 503: too many requests wait.
            PlanPatchError: Raised by the work.
        """
        await self.edit_slots.take()
        call.state = "running"
        running = asyncio.get_running_loop().run_in_executor(self._edit_threads, work)
        running.add_done_callback(lambda _: self.edit_slots.free())
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            cancel()
            await asyncio.wait({running})
            running.exception()  # nobody is left to hear it
            raise


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Work for a client, ended when the client goes away.

    Args:
        request: Its request, whose body was read.
        work: What to do.

    Returns:
        What it returns.

    Raises:
        ClientDisconnect: The client went away; the work was cancelled.
        PlanPatchError: Raised by the work.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_until_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            with suppress(asyncio.CancelledError, PlanPatchError, HttpError):
                await task


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
