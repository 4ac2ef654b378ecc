"""`planpatch bench cases`: a file of edit tasks in, a file of edited texts out, one line a case.

Of a row only `id, file_name, before, function, scope, intent` are read, and a case holds nothing else, so that a
solution or a test in the row cannot reach the model. Lines are written as cases complete, each flushed to the disk
before the next, so a run that is killed loses only the cases in flight and `--resume` goes on with them. Details are
written before results; after a kill in between they have a case twice, and the later line holds.

Not covered: whether an edit is right (that takes the tasks' tests), and two runs that write the same results at once.
"""

from __future__ import annotations

import json
import os
import stat
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from engine.errors import CancelledError, PathError, SourceError, UnknownScopeError, UsageError, WriteError
from engine.inference.protocol import Engine
from engine.patching.patcher import PatcherOptions
from engine.patching.scopes import Scope, find_scope
from engine.patching.source import Source
from lsp_server.bench_edit import (
    MeteredEngine,
    Outcome,
    measure_edit,
    percentile,
    reason_group,
    reason_of,
    without_time_limits,
)

_KEYS = "id, file_name, before, function, scope and intent"
_POLL_S = 0.5  # a wait without end could not be interrupted on Windows


# --- cases -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Case:
    """One edit task.

    Args:
        id: Its name in the results.
        file_name: What the file is called.
        before: The whole file.
        function: Qualified name, for the scope `function`.
        scope: `function`, `class:NAME` or `file`.
        intent: What is to be changed.
    """

    id: str
    file_name: str
    before: str
    function: str | None
    scope: str
    intent: str


def read_cases(path: Path) -> list[Case]:
    """Read a file of cases.

    Args:
        path: JSON lines.

    Returns:
        The cases, in order.

    Raises:
        PathError: The file cannot be read.
        UsageError: A row is malformed (the message names the file and the line), or there is none.
    """
    cases = [_case(row, f"{path}:{number}") for number, row in _rows(path)]
    if not cases:
        raise UsageError(f"{path} has no cases", hint=f"Each line must be a JSON object with {_KEYS}.")
    repeated = [name for name, count in Counter(case.id for case in cases).items() if count > 1]
    if repeated:
        raise UsageError(f"{path} has several cases with the id {repeated[0]!r}", hint="Give each case its own id.")
    return cases


def _rows(path: Path) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(_read_bytes(path).removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise UsageError(
                    f"{path}:{number} is not UTF-8 (byte {error.start + 1} of the line)", hint="Save it as UTF-8."
                ) from None
            except ValueError as error:
                raise UsageError(
                    f"{path}:{number} is not JSON: {error}", hint="Each line must be one whole JSON object."
                ) from None


def _case(row: object, where: str) -> Case:
    if not isinstance(row, dict):
        raise UsageError(f"{where} is not a JSON object", hint="Each line must be one whole JSON object.")
    values = cast("dict[str, object]", row)
    texts: dict[str, str] = {}
    for key in ("id", "file_name", "before", "scope", "intent"):
        value = values.get(key)
        if not isinstance(value, str) or not (value or key == "before"):
            raise UsageError(
                f"{where}: `{key}` is {_shown(value)}", hint=f"`{key}` must be a string that is not empty."
            )
        texts[key] = value
    function = values.get("function")
    if function is not None and not isinstance(function, str):
        raise UsageError(f"{where}: `function` is {_shown(function)}", hint="`function` must be a name or null.")
    _check_scope(texts["scope"], function, where)
    return Case(function=function or None, **texts)


def _check_scope(scope: str, function: str | None, where: str) -> None:
    if scope == "function" and not function:
        raise UsageError(f"{where}: the scope is `function`, but `function` is {_shown(function)}", hint="Name one.")
    is_class = scope.startswith("class:") and len(scope) > len("class:")
    if scope not in ("function", "file") and not is_class:
        raise UsageError(f"{where}: `scope` is {scope!r}", hint="`scope` must be `function`, `class:NAME` or `file`.")


def _shown(value: object) -> str:
    return "missing" if value is None else "empty" if value == "" else f"{type(value).__name__} {value!r:.40}"


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise PathError(f"{path} cannot be read: {error.strerror or error}", hint="Check the path.") from None


@dataclass(frozen=True, slots=True)
class Selection:
    """Which cases to run: `ids`, then the first `limit` of those, then one shard of those.

    Args:
        ids: Only these; None for all.
        limit: At most so many.
        shard: (I, N): every Nth case, from the Ith on, 1-based.
    """

    ids: Sequence[str] | None = None
    limit: int | None = None
    shard: tuple[int, int] = (1, 1)

    def of(self, cases: Sequence[Case]) -> list[Case]:
        """The chosen cases, in the order of the file.

        Args:
            cases: All cases.

        Returns:
            Some of them.

        Raises:
            UsageError: There is no case of a wanted id.
        """
        if self.ids is not None:
            unknown = set(self.ids) - {case.id for case in cases}
            if unknown:
                raise UsageError(f"There is no case with the id {min(unknown)!r}", hint="Correct the list of ids.")
            cases = [case for case in cases if case.id in set(self.ids)]
        index, num_shards = self.shard
        return list(cases[: self.limit])[index - 1 :: num_shards]


def read_ids(path: Path) -> list[str]:
    """Ids of cases, one a line; empty lines are left out.

    Args:
        path: A text file.

    Returns:
        The ids.

    Raises:
        PathError: The file cannot be read.
    """
    lines = _read_bytes(path).decode("utf-8-sig", "replace").splitlines()
    return [line.strip() for line in lines if line.strip()]


def scope_of(case: Case, source: Source) -> Scope:
    """The part of the file that a case is about; the first of several of its name.

    Args:
        case: The case.
        source: Its file.

    Returns:
        The scope.

    Raises:
        UnknownScopeError: There is no such function or class.
        SourceError: The file does not parse, nor does the scope's own text.
    """
    if case.scope == "file":
        return find_scope(source)
    name = case.function if case.scope == "function" else case.scope.removeprefix("class:")
    try:
        return find_scope(source, name)
    except UnknownScopeError as error:
        candidates = error.details.get("candidates")
        if not candidates:
            raise
        return find_scope(source, candidates[0])


# --- results ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CaseResult:
    """One line of the results, and what else is known about the case.

    Args:
        line: `id, edited, ok, reason, plan_ms, patch_ms, tokens`.
        outcome: What the line was made from.
        details: For the file of details.
    """

    line: dict[str, Any]
    outcome: Outcome
    details: dict[str, Any]


class LineLog:
    """A file of JSON lines that only grows, each line on the disk before `append` returns.

    Args:
        path: The file.
        resume: Keep its whole lines and drop a last one that was torn; else the file is begun anew, and an old one is
            kept beside it with `.old` added to its name.

    Raises:
        WriteError: It cannot be written.
        UsageError: A line before the last one is damaged.
    """

    def __init__(self, path: Path, *, resume: bool) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not resume and path.is_file() and path.stat().st_size:
                os.replace(path, path.with_name(path.name + ".old"))
            self.lines = self._drop_torn_line() if path.is_file() else []
            self._file = path.open("ab")
        except OSError as error:
            raise self._write_error(error) from error

    def _drop_torn_line(self) -> list[dict[str, Any]]:
        data = self.path.read_bytes()
        rows = data.split(b"\n")[:-1]
        lines: list[dict[str, Any]] = []
        for number, row in enumerate(rows, 1):
            line = _object_of(row)
            if line is None and number < len(rows):
                raise UsageError(
                    f"{self.path}:{number} is damaged",
                    hint="Remove that line, or start over without --resume.",
                )
            if line is not None:
                lines.append(line)
        whole = sum(len(row) + 1 for row in rows[: len(lines)])
        if whole < len(data):
            os.truncate(self.path, whole)
        return lines

    def append(self, line: dict[str, Any]) -> None:
        """Write one line.

        Args:
            line: A JSON object.

        Raises:
            WriteError: The disk is full or the file is gone.
        """
        try:
            self._file.write(json.dumps(line).encode("ascii") + b"\n")
            self._file.flush()
            if stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
                os.fsync(self._file.fileno())
        except OSError as error:
            raise self._write_error(error) from error
        self.lines.append(line)

    def close(self) -> None:
        """Close the file."""
        try:
            self._file.close()
        except OSError as error:  # what could not be flushed before
            raise self._write_error(error) from error

    def __enter__(self) -> LineLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write_error(self, error: OSError) -> WriteError:
        return WriteError(
            f"{self.path} cannot be written: {error.strerror or error}",
            hint="Free some space or choose another file; --resume goes on after the last whole line.",
            path=str(self.path),
        )


def _object_of(row: bytes) -> dict[str, Any] | None:
    """The object of a line that has an id, None for anything else."""
    try:
        value = json.loads(row)
    except ValueError:
        return None
    line = cast("dict[str, Any]", value) if isinstance(value, dict) else {}
    return line if isinstance(line.get("id"), str) else None


# --- the run ---------------------------------------------------------------------------------------------------------


class CaseRunner:
    """Runs cases on one engine, from any number of threads.

    Args:
        engine: The model.
        options: Budgets and format; time limits are left out.
        with_plan: Whether to plan first.
    """

    def __init__(self, engine: Engine, options: PatcherOptions, *, with_plan: bool) -> None:
        self._engine = engine
        self._options = without_time_limits(options)
        self._with_plan = with_plan
        self._lock = threading.Lock()
        self._running: set[MeteredEngine] = set()
        self._is_cancelled = False

    def run(self, case: Case) -> CaseResult:
        """Run one case.

        Args:
            case: The case.

        Returns:
            Its result.

        Raises:
            CancelledError: The run was cancelled.
            EnvironmentFault: The engine failed for good.
        """
        engine = MeteredEngine(self._engine)
        with self._lock:
            if self._is_cancelled:
                raise CancelledError("The bench was cancelled")
            self._running.add(engine)
        try:
            return self._run(case, engine)
        finally:
            with self._lock:
                self._running.discard(engine)

    def cancel(self) -> None:
        """Stop every case in flight."""
        with self._lock:
            self._is_cancelled = True
            running = list(self._running)
        for engine in running:
            engine.cancel_all()

    def _run(self, case: Case, engine: MeteredEngine) -> CaseResult:
        try:
            source = Source.from_text(case.before, case.file_name)
            scope = scope_of(case, source)
        except (SourceError, UnknownScopeError) as error:
            outcome = Outcome(error=error, reason=reason_of(error))
        else:
            outcome = measure_edit(engine, self._options, source, scope, case.intent, with_plan=self._with_plan)
        line = {
            "id": case.id,
            "edited": outcome.patch.patched.to_bytes().decode("utf-8") if outcome.patch and outcome.ok else None,
            "ok": outcome.ok,
            "reason": outcome.reason,
            "plan_ms": outcome.plan_ms,
            "patch_ms": outcome.patch_ms,
            "tokens": outcome.num_tokens,
        }
        return CaseResult(line, outcome, {"id": case.id, "scope": case.scope, **outcome.details()})


@dataclass(slots=True)
class RunTotals:
    """What the result lines do not say, over this run alone."""

    num_tokens: int = 0
    num_bad_json: int = 0
    num_done: int = 0
    elapsed_s: float = 0.0


def run_cases(
    runner: CaseRunner,
    cases: Sequence[Case],
    results: LineLog,
    details: LineLog | None = None,
    *,
    num_workers: int = 1,
    on_result: Callable[[CaseResult], None] | None = None,
) -> RunTotals:
    """Run cases, several at once, and write each when it completes.

    The order of the lines is the order in which cases complete. Results do not depend on `num_workers`, but for ties:
    rows computed together may round differently, which can turn a choice between two equally likely tokens.

    Args:
        runner: Runs one.
        cases: What to run.
        results: Where results go.
        details: Where details go.
        num_workers: Cases in flight.
        on_result: Told each result once it is written.

    Returns:
        Totals of this run.

    Raises:
        EnvironmentFault: The engine failed for good, or a file cannot be written; what was written stays.
    """
    totals = RunTotals()
    started_at = time.monotonic()
    with ThreadPoolExecutor(num_workers, thread_name_prefix="planpatch-bench") as pool:
        futures = [pool.submit(runner.run, case) for case in cases]
        try:
            for result in _as_completed(futures):
                if details is not None:
                    details.append(result.details)
                results.append(result.line)
                totals.num_done += 1
                totals.num_tokens += result.line["tokens"]
                totals.num_bad_json += result.outcome.num_bad_json
                if on_result is not None:
                    on_result(result)
        except BaseException:
            runner.cancel()
            pool.shutdown(cancel_futures=True)
            raise
    totals.elapsed_s = time.monotonic() - started_at
    return totals


def _as_completed(futures: Sequence[Future[CaseResult]]) -> Iterator[CaseResult]:
    """Results when they are there; those that came together in the order of the cases."""
    pending = set(futures)
    while pending:
        done, pending = wait(pending, timeout=_POLL_S, return_when=FIRST_COMPLETED)
        for future in sorted(done, key=futures.index):
            yield future.result()


def summarise(lines: Sequence[dict[str, Any]], totals: RunTotals) -> dict[str, Any]:
    """The run in numbers.

    Args:
        lines: Every result line of the chosen cases, earlier runs' included.
        totals: Of this run.

    Returns:
        For programs; times are in milliseconds.
    """
    times_ms = [line["plan_ms"] + line["patch_ms"] for line in lines]
    refused = Counter(reason_group(line["reason"]) for line in lines if not line["ok"])
    return {
        "cases": len(lines),
        "offered": sum(line["ok"] for line in lines),
        "refused": dict(refused.most_common()),
        "p50_ms": percentile(times_ms, 0.5),
        "p95_ms": percentile(times_ms, 0.95),
        "this_run": {
            "cases": totals.num_done,
            "json_failures": totals.num_bad_json,
            "tokens": totals.num_tokens,
            "elapsed_s": round(totals.elapsed_s, 1),
            "tok_per_s": round(totals.num_tokens / totals.elapsed_s, 1) if totals.elapsed_s else None,
        },
    }
