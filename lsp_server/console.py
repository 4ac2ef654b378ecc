"""How the command line talks: results on stdout, progress and messages on stderr, JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.syntax import Syntax
from rich.table import Table

from engine.errors import PlanPatchError
from engine.inference.store import Progress as PullProgress
from engine.inference.store import ProgressCallback

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, indent=2) + "\n")


def say(text: str) -> None:
    """A message for people, on stderr; `text` may hold rich's markup."""
    err.print(text)


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


def print_table(
    title: str, columns: Iterable[str], rows: Iterable[Iterable[object]], *, one_line: bool = False
) -> None:
    """A table on stdout; cells are shown as they are, markup in them is not read.

    With `one_line` each row takes one line: the last column is cut where the terminal ends.
    """
    table = Table(title=title or None, title_justify="left", box=None, header_style="bold", pad_edge=False)
    names, cells = list(columns), [[str(cell) for cell in row] for row in rows]
    for name in names:
        table.add_column(name, overflow="fold", no_wrap=one_line)
    if one_line:
        widths = [max(map(cell_len, column)) for column in zip(names, *cells, strict=True)]
        room = max(10, out.width - sum(widths[:-1]) - 2 * len(names[:-1]))
        cells = [[*row[:-1], _clipped(row[-1], room)] for row in cells]
    for row in cells:
        table.add_row(*map(escape, row))
    out.print(table, soft_wrap=False)


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
        self._count = self._count + 1 if stage == self._stage else 1
        self._stage = stage
        self.note(f"{stage.upper()}: {self._count} tokens (Ctrl-C cancels)")
