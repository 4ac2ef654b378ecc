"""Jobs of the language server: one generates at a time, the others wait in order, and each can be cancelled.

A job lives on the event loop; what takes long runs on the one worker thread. A cancelled job that waits ends at once,
one that generates ends with the engine's next step.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from engine.errors import CancelledError, EngineError, PlanPatchError

T = TypeVar("T")
JobKind = Literal["plan", "patch", "apply", "rollback", "redo", "pull", "model"]
JobState = Literal["waiting", "loading", "running", "done", "refused", "failed", "cancelled"]

log = logging.getLogger("planpatch.lsp")

_MAX_ENDED = 32
_REPORT_INTERVAL_S = 0.1


@dataclass(eq=False, slots=True)
class Job:
    """One thing the user asked for.

    Args:
        id: Names it to the client.
        kind: What it is.
        title: What progress calls it.
        uri: The document it is about; empty for none.
        function: The function it is about.
    """

    id: str
    kind: JobKind
    title: str
    uri: str = ""
    function: str = ""
    state: JobState = "waiting"
    stage: str = ""
    num_tokens: int = 0
    result: dict[str, Any] = field(default_factory=dict[str, Any])
    error: PlanPatchError | None = None
    is_cancelled: threading.Event = field(default_factory=threading.Event)
    is_generating: bool = False
    task: asyncio.Task[None] | None = None
    on_cancel: Callable[[], None] = lambda: None

    @property
    def token(self) -> str:
        """Its work-done progress token."""
        return f"planpatch/{self.id}"

    @property
    def has_ended(self) -> bool:
        """Whether nothing more happens to it."""
        return self.state not in ("waiting", "loading", "running")

    def to_json(self) -> dict[str, Any]:
        """The job for programs."""
        return {
            "jobId": self.id,
            "kind": self.kind,
            "title": self.title,
            "uri": self.uri,
            "function": self.function,
            "state": self.state,
            "stage": self.stage,
            "numTokens": self.num_tokens,
            **self.result,
            **({"error": self.error.to_json()} if self.error else {}),
        }


def unexpected(fault: Exception) -> PlanPatchError:
    """A bug, as an error that can be shown.

    Args:
        fault: What was raised.

    Returns:
        The error.
    """
    return EngineError(f"This is a bug in PlanPatch: {type(fault).__name__}: {fault}", hint="Please report it.")


class Jobs:
    """Every job of one server. Used from the event loop's thread alone, except for `Job.is_cancelled`.

    Args:
        on_change: Told of every change of a job.
        begin_after_s: How long a job waits before it begins, so that the command's answer reaches the client first.
    """

    def __init__(self, on_change: Callable[[Job], None], begin_after_s: float = 0.0) -> None:
        self._on_change = on_change
        self._begin_after_s = begin_after_s
        self._numbers = itertools.count(1)
        self._jobs: dict[str, Job] = {}
        self._waiting: list[Job] = []
        self._turn = asyncio.Lock()
        self._worker = ThreadPoolExecutor(1, "planpatch-job")

    def start(
        self, kind: JobKind, title: str, work: Callable[[Job], Awaitable[None]], *, uri: str = "", function: str = ""
    ) -> Job:
        """Begin a job; it is on its way when this returns.

        Args:
            kind: What it is.
            title: What progress calls it.
            work: Does it; errors of ours become the job's end.
            uri: The document it is about.
            function: The function it is about.

        Returns:
            The job.
        """
        job = Job(f"j{next(self._numbers)}", kind, title, uri, function)
        self._jobs[job.id] = job
        ended = [name for name, known in self._jobs.items() if known.has_ended]
        for name in ended[:-_MAX_ENDED]:
            del self._jobs[name]
        job.task = asyncio.get_running_loop().create_task(self._run(job, work))
        return job

    async def _run(self, job: Job, work: Callable[[Job], Awaitable[None]]) -> None:
        try:
            await asyncio.sleep(self._begin_after_s)
            self._on_change(job)  # that it waits: whoever shows jobs can cancel it
            self.check(job)
            await work(job)
            self.change(job, "done")
        except (CancelledError, asyncio.CancelledError):
            self.change(job, "cancelled")
        except PlanPatchError as error:
            job.error = error
            self.change(job, "refused" if error.exit_code == 1 else "failed")
        except Exception as fault:  # a bug: the job ends, and the server goes on
            log.exception("%s failed", job.title)
            job.error = unexpected(fault)
            self.change(job, "failed")

    @asynccontextmanager
    async def turn(self, job: Job):
        """Wait until no other job generates; the job's place among those that wait is `position`."""
        self._waiting.append(job)
        try:
            async with self._turn:
                self._waiting.remove(job)
                self.check(job)
                yield
        finally:
            if job in self._waiting:
                self._waiting.remove(job)

    async def on_worker(self, job: Job, work: Callable[[], T]) -> T:
        """Run something long on the worker thread; it is not left behind when the job is cancelled.

        Args:
            job: Whose work it is.
            work: Looks at `job.is_cancelled`, or is stopped by `job.on_cancel`.

        Returns:
            What it returns.

        Raises:
            CancelledError: The job was cancelled.
        """
        self.check(job)
        return await asyncio.get_running_loop().run_in_executor(self._worker, work)

    def check(self, job: Job) -> None:
        """Raise if a job was cancelled.

        Raises:
            CancelledError: It was.
        """
        if job.is_cancelled.is_set():
            raise CancelledError(f"{job.title} was cancelled")

    def change(self, job: Job, state: JobState, stage: str = "") -> None:
        """Note where a job is and tell of it."""
        job.state, job.stage = state, stage or job.stage
        self._on_change(job)

    def position(self, job: Job) -> int:
        """How many jobs come before it; 0 when it is its turn."""
        return self._waiting.index(job) + 1 if job in self._waiting else 0

    def cancel(self, job: Job) -> None:
        """Cancel a job; nothing happens to one that has ended."""
        if job.has_ended:
            return
        job.is_cancelled.set()
        if job in self._waiting and job.task is not None:
            job.task.cancel()
        job.on_cancel()

    def get(self, job_id: str) -> Job | None:
        """A job by its id."""
        return self._jobs.get(job_id)

    def running(self, uri: str | None = None) -> list[Job]:
        """Jobs that have not ended, of one document or of all, oldest first."""
        return [job for job in self._jobs.values() if not job.has_ended and uri in (None, job.uri)]

    async def close(self) -> None:
        """Cancel everything and wait for it."""
        for job in self.running():
            self.cancel(job)
        tasks = [job.task for job in self._jobs.values() if job.task is not None and not job.task.done()]
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)
        self._worker.shutdown(wait=False, cancel_futures=True)


class TokenReports:
    """Counts a job's tokens on its worker thread and reports them on the event loop, ten times a second at most.

    Args:
        loop: The event loop.
        report: Called there with stage, number of tokens of this stage, and the text since the last report.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, report: Callable[[str, int, str], None]) -> None:
        self._loop = loop
        self._report = report
        self._stage = ""
        self._count = 0
        self._text = ""
        self._due_at = 0.0

    def __call__(self, stage: str, text: str) -> None:
        """A `Listener` of the patcher."""
        if stage != self._stage:
            self.flush()
            self._stage, self._count = stage, 0
        if not text:  # a stage without tokens
            self._send("")
            return
        self._count += 1
        self._text += text
        if time.monotonic() >= self._due_at:
            self.flush()

    def flush(self) -> None:
        """Report what was not reported yet."""
        if self._text:
            text, self._text = self._text, ""
            self._due_at = time.monotonic() + _REPORT_INTERVAL_S
            self._send(text)

    def _send(self, text: str) -> None:
        with suppress(RuntimeError):  # the loop was closed
            self._loop.call_soon_threadsafe(self._report, self._stage, self._count, text)
