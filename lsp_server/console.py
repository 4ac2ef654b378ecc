"""How the command line talks: results on stdout, progress and messages on stderr, JSON for programs."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.syntax import Syntax
from rich.table import Table

from engine.errors import PlanPatchError, WriteError
from engine.inference.store import Progress as PullProgress
from engine.inference.store import ProgressCallback

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

# What a shell reports of a program that wrote to a pipe nobody reads: 128 and the number of SIGPIPE.
READER_GONE = 141

_MIN_CELL = 8


def guard_streams() -> None:
    """Make stdin, stdout and stderr UTF-8, and what goes wrong with the output an end without a traceback.

    A reader that went away ends the command with `READER_GONE`. SIGPIPE itself stays ignored: its default would end the
    process in the middle of its work, also when a connection to a hub is closed. A stream that the caller closed before
    the start is the null device from here on, so that no file that is opened later takes its number.
    """
    for name, errors in (("stdout", "strict"), ("stderr", "backslashreplace")):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        elif type(stream) is io.TextIOWrapper:  # else a test's own
            is_line_buffered = stream.line_buffering
            stream = _GuardedStream(stream.detach(), encoding="utf-8", errors=errors, line_buffering=is_line_buffered)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)  # flushed at the very end, too
    stdin: Any = sys.stdin
    if isinstance(stdin, io.TextIOWrapper):
        stdin.reconfigure(encoding="utf-8")


class _GuardedStream(io.TextIOWrapper):
    """An output stream whose faults end the command; what is written after one is lost."""

    def write(self, text: str, /) -> int:
        with self._faults_told():
            return super().write(text)

    def flush(self) -> None:
        with self._faults_told():
            super().flush()

    @contextmanager
    def _faults_told(self) -> Generator[None]:
        try:
            yield
        except OSError as fault:
            self._divert()
            if _is_closed_pipe(fault):
                raise SystemExit(READER_GONE) from None
            raise WriteError(
                f"The output cannot be written: {fault.strerror or fault}",
                hint="Free disk space, or send the output elsewhere.",
                is_output=True,
            ) from fault

    def _divert(self) -> None:
        """Send what is still in the buffer, and what follows, nowhere."""
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.fileno())
        os.close(null)


def _is_closed_pipe(fault: OSError) -> bool:
    """On Windows a closed pipe is an invalid argument."""
    return fault.errno == errno.EPIPE or (sys.platform == "win32" and fault.errno == errno.EINVAL)


def print_json(value: Any) -> None:
    """One JSON document on stdout; of a file's name, what is not UTF-8 is written as JSON's escape of it."""
    text = json.dumps(value, ensure_ascii=False, indent=2)
    sys.stdout.write(text.encode("utf-8", "backslashreplace").decode("utf-8") + "\n")
    sys.stdout.flush()


def say(text: str) -> None:
    """A message for people, on stderr; `text` may hold rich's markup."""
    err.print(text)


def warn(text: str) -> None:
    """Something that the user should know, on stderr; `text` is shown as it is."""
    err.print(f"[yellow]warning:[/] {escape(text)}")


def print_error(error: PlanPatchError, *, as_json: bool) -> None:
    """What went wrong and what to do, for people or for programs."""
    if as_json:
        print_json({"ok": False, "error": error.to_json()})
        return
    err.print(f"[bold red]{error.code}:[/] {escape(error.message)}")
    if error.hint:
        err.print(f"  {escape(error.hint)}")


def print_diff(diff: str) -> None:
    """A unified diff on stdout, in colour on a terminal and plain in a pipe."""
    if out.is_terminal:
        out.print(Syntax(diff.rstrip("\n"), "diff", background_color="default", word_wrap=True))
    else:
        sys.stdout.write(diff)


def print_table(title: str, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """A table on stdout; cells are shown as they are, markup in them is not read."""
    table = Table(title=title or None, title_justify="left", box=None, header_style="bold", pad_edge=False)
    for name in columns:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    out.print(table, soft_wrap=False)


def print_lines(columns: Sequence[str], rows: Iterable[Sequence[str]], *, num_whole: int) -> None:
    """A table on stdout with one line a row, cells as they are.

    The first `num_whole` columns are never cut; the others share what is left of a terminal's width, and in a pipe they
    are whole as well.
    """
    cells = [columns, *rows]
    widths = [max(map(cell_len, column)) for column in zip(*cells, strict=True)]
    if out.is_terminal:
        room = out.width - sum(widths[:num_whole]) - 2 * (len(columns) - 1)
        for index in range(num_whole, len(columns)):
            widths[index] = min(widths[index], max(_MIN_CELL, room // (len(columns) - index)))
            room -= widths[index]
    for number, row in enumerate(cells):
        fitted = [_clipped(cell, width) for cell, width in zip(row, widths, strict=True)]
        line = "  ".join(cell + " " * (width - cell_len(cell)) for cell, width in zip(fitted, widths, strict=True))
        out.print(line.rstrip(), markup=False, style=None if number else "bold", crop=False, overflow="ignore")


def _clipped(text: str, width: int) -> str:
    return text if cell_len(text) <= width else set_cell_size(text, width - 1).rstrip() + "…"


@contextmanager
def pull_progress() -> Generator[ProgressCallback]:
    """A progress bar for pulls and conversions; lines, now and then, where stderr is no terminal."""
    if not err.is_terminal:
        yield _LineProgress()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[amount]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task("", total=None, amount="")

        def show(progress: PullProgress) -> None:
            bar.update(
                task,
                description=escape(progress.message),
                completed=progress.done,
                total=progress.total or None,
                amount=_amount(progress),
            )

        yield show


class _LineProgress:
    """A line at each new message and each further tenth."""

    def __init__(self) -> None:
        self._last = ("", -1)

    def __call__(self, progress: PullProgress) -> None:
        tenth = 10 * progress.done // progress.total if progress.total else 0
        if (progress.stage, tenth) != self._last:
            self._last = (progress.stage, tenth)
            amount = _amount(progress)
            err.print(escape(f"{progress.message}{f' ({amount})' if amount else ''}"))


def _amount(progress: PullProgress) -> str:
    if not progress.total:
        return ""
    if progress.unit == "bytes":
        return f"{progress.done / 1e6:.0f} of {progress.total / 1e6:.0f} MB"
    return f"{progress.done} of {progress.total} {progress.unit}"


class TokenCounter:
    """A live line such as `PATCH 37 tokens` while the model writes; silent where stderr is no terminal."""

    def __init__(self) -> None:
        self._status = err.status("") if err.is_terminal else None
        self._stage = ""
        self._count = 0

    def __enter__(self) -> TokenCounter:
        if self._status:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status:
            self._status.stop()

    def note(self, text: str) -> None:
        """Show a line of its own."""
        if self._status:
            self._status.update(escape(text))

    def __call__(self, stage: str, text: str) -> None:
        """Count a token; a `Listener` of the patcher."""
        if not text:
            return
        self._count = self._count + 1 if stage == self._stage else 1
        self._stage = stage
        self.note(f"{stage.upper()}: {self._count} tokens (Ctrl-C cancels)")
