"""`planpatch bench -N`: one edit repeated from the same bytes, a CSV of the runs, and one more line of history.

The user's file is read once and never written. Every repetition starts from a private copy with those very bytes; the
patch goes into that copy, which is then read back and checked. With `log_only` nothing is written at all: proposals go
to the ledger as surface `bench`, for the user's file, where training can find them.

Not covered: a cold start. From the second repetition on the engine has the prompt's KV cache, as it has for a user who
asks again; the first repetition is a row like the others.
"""

from __future__ import annotations

import csv
import os
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from engine.errors import SourceError, UsageError, WriteError
from engine.inference.protocol import Engine, EngineStatus
from engine.patching.disk import read_bytes, write_atomically
from engine.patching.ledger import Ledger
from engine.patching.patcher import Patch, PatcherOptions
from engine.patching.scopes import Scope, find_scope
from engine.patching.source import Source
from lsp_server.bench_edit import MeteredEngine, measure_edit, percentile

RESULTS_NAME = "bench_results.csv"
HISTORY_NAME = "bench_history.csv"
PLOT_NAME = "bench_history.png"


@dataclass(frozen=True, slots=True)
class RepeatTask:
    """What is repeated.

    Args:
        source: The user's file as it was read.
        scope: What to change.
        intent: What is wanted.
        with_plan: Whether to plan first.
    """

    source: Source
    scope: Scope
    intent: str
    with_plan: bool


@dataclass(frozen=True, slots=True)
class Repetition:
    """One row of `bench_results.csv`.

    Args:
        n: From 1.
        ok: Whether a patch was offered and, unless only logged, held when it was applied.
        reason: Why not; empty if ok.
        edits: How many edits; 0 is always a failed run.
        plan_ms: Wall clock of PLAN in milliseconds.
        patch_ms: Wall clock of PATCH.
        tokens: Generated tokens.
        tok_per_s: Tokens over both times.
        sha256: Of the patched file; empty if there is none.
        json_failures: Whole answers that were to be JSON and are not.
    """

    n: int
    ok: bool
    reason: str
    edits: int
    plan_ms: float
    patch_ms: float
    tokens: int
    tok_per_s: float
    sha256: str
    json_failures: int


@dataclass(frozen=True, slots=True)
class HistoryLine:
    """One line of `bench_history.csv`.

    Args:
        time_utc: When the bench ended, ISO 8601.
        commit: Git commit of PlanPatch; empty if unknown.
        version: Version of PlanPatch.
        model: Model id.
        device: `cpu` or `cuda:N`.
        quantization: How weights are held.
        adapter: Digest of the adapter, `__none__` for the base.
        format: What the model wrote.
        target: `FILE:FUNCTION`.
        n: Repetitions.
        p50_ms: Median of PLAN and PATCH together, in milliseconds.
        p95_ms: 95th percentile of the same.
        json_failures: Whole answers that were to be JSON and are not.
        errors: Failed runs, those with `edits=[]` included.
        tok_per_s: Generated tokens over the time of all runs.
    """

    time_utc: str
    commit: str
    version: str
    model: str
    device: str
    quantization: str
    adapter: str
    format: str
    target: str
    n: int
    p50_ms: float
    p95_ms: float
    json_failures: int
    errors: int
    tok_per_s: float


RESULT_COLUMNS = tuple(item.name for item in fields(Repetition))
HISTORY_COLUMNS = tuple(item.name for item in fields(HistoryLine))


def repeat_edit(
    engine: Engine,
    options: PatcherOptions,
    task: RepeatTask,
    num_repetitions: int,
    *,
    ledger: Ledger | None = None,
    on_row: Callable[[Repetition], None] | None = None,
) -> list[Repetition]:
    """Make the same edit again and again, from the same bytes.

    Args:
        engine: The model.
        options: Budgets and format.
        task: What is repeated.
        num_repetitions: How often.
        ledger: Log proposals here and apply nothing; None applies to a private copy and checks it.
        on_row: Told each row at once.

    Returns:
        One row a repetition.

    Raises:
        EnvironmentFault: The engine failed for good, or a file cannot be written.
    """
    rows: list[Repetition] = []
    with tempfile.TemporaryDirectory(prefix="planpatch-bench-") as folder:
        copy = Path(folder) / (Path(task.source.path).name or "code.py")
        for number in range(1, num_repetitions + 1):
            source = _reset(copy, task.source)
            row = _repetition(engine, options, task, source, number, copy, ledger)
            rows.append(row)
            if on_row is not None:
                on_row(row)
    return rows


def _reset(copy: Path, baseline: Source) -> Source:
    """The baseline's bytes in the private copy, read back; under the user's file name, which the prompt shows."""
    write_atomically(copy, baseline.to_bytes(), expected_sha256=None)
    source = Source.from_bytes(read_bytes(copy), baseline.path)
    if source.sha256 != baseline.sha256:
        raise WriteError(f"{copy} does not hold what was written to it", hint="Check the disk.", path=str(copy))
    return source


def _repetition(
    engine: Engine,
    options: PatcherOptions,
    task: RepeatTask,
    source: Source,
    number: int,
    copy: Path,
    ledger: Ledger | None,
) -> Repetition:
    outcome = measure_edit(
        MeteredEngine(engine), options, source, task.scope, task.intent, with_plan=task.with_plan, ledger=ledger
    )
    patch, reason = outcome.patch, outcome.reason
    if patch is not None and reason is None and ledger is None:
        reason = _fault_after_applying(copy, patch)
    return Repetition(
        n=number,
        ok=reason is None,
        reason=reason or "",
        edits=len(patch.edits) if patch else 0,
        plan_ms=outcome.plan_ms,
        patch_ms=outcome.patch_ms,
        tokens=outcome.num_tokens,
        tok_per_s=_rate(outcome.num_tokens, outcome.total_ms),
        sha256=patch.patched.sha256 if patch else "",
        json_failures=outcome.num_bad_json,
    )


def _fault_after_applying(copy: Path, patch: Patch) -> str | None:
    """Write the patch to the copy and say what is wrong with the file now, if anything."""
    write_atomically(copy, patch.patched.to_bytes(), expected_sha256=patch.source.sha256)
    applied = Source.from_bytes(read_bytes(copy), patch.source.path)
    if applied.sha256 == patch.source.sha256:
        return "apply:the file did not change"
    if applied.sha256 != patch.patched.sha256:
        return "apply:the file is not the patched text"
    try:
        if patch.scope.parses:
            find_scope(applied)
    except SourceError as error:
        return f"apply:{error.message}"
    return None


def _rate(num_tokens: int, time_ms: float) -> float:
    return round(num_tokens * 1000 / time_ms, 2) if time_ms else 0.0


# --- CSV -------------------------------------------------------------------------------------------------------------


class ResultsCsv:
    """`bench_results.csv`, begun anew; each row is on its way to the disk at once.

    Args:
        path: The file.

    Raises:
        WriteError: It cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("w", encoding="utf-8", newline="")
            self._writer = csv.DictWriter(self._file, RESULT_COLUMNS)
            self._writer.writeheader()
        except OSError as error:
            raise _write_error(path, error) from error

    def add(self, row: Repetition) -> None:
        """Write a row.

        Args:
            row: The row.

        Raises:
            WriteError: The disk is full.
        """
        try:
            self._writer.writerow(asdict(row))
            self._file.flush()
        except OSError as error:
            raise _write_error(self.path, error) from error

    def __enter__(self) -> ResultsCsv:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def check_history(path: Path) -> None:
    """Refuse a history that has other columns, before the bench takes its time.

    Args:
        path: `bench_history.csv`; need not exist.

    Raises:
        UsageError: Its first line is not ours.
    """
    header = path.read_bytes().split(b"\n", 1)[0].strip() if path.is_file() else b""
    if header and header != ",".join(HISTORY_COLUMNS).encode():
        raise UsageError(
            f"{path} has other columns than this version of PlanPatch writes",
            hint="Move it away, or choose another folder with --csv-dir.",
        )


def append_history(path: Path, line: HistoryLine) -> None:
    """Add a line; the columns' names first in a new file.

    Args:
        path: `bench_history.csv`.
        line: The line.

    Raises:
        WriteError: It cannot be written.
    """
    try:
        data = path.read_bytes() if path.is_file() else b""
        with path.open("a", encoding="utf-8", newline="") as file:
            if data and not data.endswith(b"\n"):  # a line that was cut off
                file.write("\r\n")
            writer = csv.DictWriter(file, HISTORY_COLUMNS)
            if not data.strip():
                writer.writeheader()
            writer.writerow(asdict(line))
    except OSError as error:
        raise _write_error(path, error) from error


def history_line(
    rows: Sequence[Repetition], task: RepeatTask, status: EngineStatus, options: PatcherOptions
) -> HistoryLine:
    """The summary of a bench.

    Args:
        rows: At least one.
        task: What was repeated.
        status: Of the engine that did it.
        options: Its budgets and format.

    Returns:
        The line.
    """
    times_ms = [row.plan_ms + row.patch_ms for row in rows]
    return HistoryLine(
        time_utc=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        commit=planpatch_commit(),
        version=_version(),
        model=status.model,
        device=status.device,
        quantization=status.quantization,
        adapter=status.adapter_digest,
        format=options.edit_format,
        target=f"{Path(task.source.path).name}:{task.scope.qualname}",
        n=len(rows),
        p50_ms=percentile(times_ms, 0.5) or 0.0,
        p95_ms=percentile(times_ms, 0.95) or 0.0,
        json_failures=sum(row.json_failures for row in rows),
        errors=sum(not row.ok for row in rows),
        tok_per_s=_rate(sum(row.tokens for row in rows), sum(times_ms)),
    )


def planpatch_commit() -> str:
    """Commit of the clone that this PlanPatch runs from; empty for an installed one."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return ""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, env=environment, check=False)
    except (OSError, subprocess.TimeoutExpired):  # no git: the version says enough
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _version() -> str:
    try:
        return version("planpatch")
    except PackageNotFoundError:  # run from a folder that was only copied
        return ""


def _write_error(path: Path, error: OSError) -> WriteError:
    return WriteError(
        f"{path} cannot be written: {error.strerror or error}",
        hint="Close the program that holds it, free some space, or choose another folder with --csv-dir.",
        path=str(path),
    )


# --- plot ------------------------------------------------------------------------------------------------------------


def plot_history(history: Path, png: Path) -> bool:
    """Draw latency and speed over the benches of a history, one line for each set-up and target.

    Args:
        history: `bench_history.csv`.
        png: The picture.

    Returns:
        False if matplotlib is not installed.

    Raises:
        WriteError: The picture cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(9, 6), layout="constrained")
    latency, speed = figure.subplots(2, 1, sharex=True)
    for name, points in _series(history).items():
        numbers = [number for number, _ in points]
        (line,) = latency.plot(numbers, _column(points, "p50_ms"), marker="o", label=name)
        latency.plot(numbers, _column(points, "p95_ms"), linestyle=":", marker=".", color=line.get_color())
        speed.plot(numbers, _column(points, "tok_per_s"), marker="o", color=line.get_color())
    latency.set_ylabel("ms: p50, p95 dotted")
    latency.legend(fontsize="small")
    speed.set_ylabel("tokens/s")
    speed.set_xlabel("line of the history")
    try:
        figure.savefig(png, dpi=120)  # pyright: ignore[reportUnknownMemberType]
    except OSError as error:
        raise _write_error(png, error) from error
    return True


def _series(history: Path) -> dict[str, list[tuple[int, Mapping[str, Any]]]]:
    series: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
    with history.open(encoding="utf-8", newline="") as file:
        for number, line in enumerate(csv.DictReader(file), 1):
            if not _is_whole(line):
                continue
            adapter = "" if line["adapter"] == "__none__" else f" adapter {line['adapter'][:8]}"
            name = f"{line['model']} {line['device']} {line['quantization']}{adapter} {line['format']} {line['target']}"
            series.setdefault(name, []).append((number, line))
    return series


def _is_whole(line: Mapping[str, Any]) -> bool:
    """Whether a line of the history was not cut off and has its numbers."""
    try:
        return all(float(line[name]) >= 0 for name in ("p50_ms", "p95_ms", "tok_per_s"))
    except (TypeError, ValueError):
        return False


def _column(points: Sequence[tuple[int, Mapping[str, Any]]], name: str) -> list[float]:
    return [float(line[name]) for _, line in points]
