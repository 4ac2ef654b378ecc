"""The journal's files: JSON lines that only grow, a line for each kept edit and one more when it changed since.

A line begins with its kind, id and number, so that they can be read without the rest. Of several lines with one id the
one with the highest number holds. A line that was cut off by a kill is removed before the next is written.

Not covered: two programs that write without the lock.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from filelock import FileLock, Timeout

from engine.errors import LedgerError, WriteError
from engine.patching.disk import remove_leftovers, write_atomically

_HEAD = re.compile(rb'\{"kind": "([a-z]+)", "id": "([a-z0-9_+]+)", "seq": (\d+)')
LOCK_TIMEOUT_S = 30.0


class JournalFile:
    """The files of one folder.

    Args:
        folder: `success_logs`; made if missing, readable by the user alone.
        lock_timeout_s: How long to wait for another process that writes.
    """

    def __init__(self, folder: Path, *, lock_timeout_s: float = LOCK_TIMEOUT_S) -> None:
        self.folder = folder
        self._lock = FileLock(folder / ".lock", timeout=lock_timeout_s, mode=0o600)

    @property
    def files(self) -> list[Path]:
        """Its files, oldest first."""
        return sorted(self.folder.glob("*.jsonl"))

    @contextmanager
    def writing(self) -> Generator[None, None, None]:
        """Alone among all processes; what a killed one left is tidied.

        Yields:
            Nothing.

        Raises:
            LedgerError: Another process has been writing for too long.
            WriteError: The folder cannot be made.
        """
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock.acquire()  # pyright: ignore[reportUnknownMemberType]
        except Timeout as error:
            raise LedgerError(
                f"Another PlanPatch process has held {error.lock_file} for {self._lock.timeout:g} s.",
                hint="Wait for it, or stop it, and try again.",
                path=str(self.folder),
            ) from error
        except OSError as error:
            raise _write_error(self.folder, error) from error
        try:
            remove_leftovers(self.folder)
            for file in self.files:
                _drop_torn_line(file)
            yield
        finally:
            self._lock.release()

    def heads(self) -> dict[str, tuple[int, str]]:
        """What is known of each id, read from the beginnings of lines.

        Returns:
            Highest number and kind by id.
        """
        known: dict[str, tuple[int, str]] = {}
        for file in self.files:
            for line in _lines(file):
                match = _HEAD.match(line)
                if match is not None:
                    kind, name, seq = match[1].decode(), match[2].decode(), int(match[3])
                    if seq >= known.get(name, (-1, ""))[0]:
                        known[name] = (seq, kind)
        return known

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one line and have it on the disk; inside `writing`.

        Args:
            record: Begins with `kind`, `id` and `seq`; `created_at` says which file it belongs to.

        Raises:
            WriteError: The disk is full, or the folder is read-only.
        """
        file = self.folder / f"{str(record['created_at'])[:7]}.jsonl"
        data = json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        try:
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o600)
            with os.fdopen(descriptor, "ab") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise _write_error(file, error) from error

    def records(self) -> Iterator[dict[str, Any]]:
        """The line that holds of each id, in the order of ids.

        Yields:
            One record at a time.
        """
        latest = self.heads()
        found: dict[str, dict[str, Any]] = {}
        for file in self.files:
            for line in _lines(file):
                match = _HEAD.match(line)
                if match is None or latest[match[2].decode()][0] != int(match[3]):
                    continue
                try:
                    found[match[2].decode()] = cast("dict[str, Any]", json.loads(line))
                except ValueError:
                    continue
        for name in sorted(found):
            yield found[name]

    def remove(self, is_meant: Callable[[Mapping[str, Any]], bool]) -> list[str]:
        """Remove lines for good; inside `writing`.

        Args:
            is_meant: Whether a record is to go.

        Returns:
            Ids of the lines removed.

        Raises:
            WriteError: A file cannot be written.
        """
        removed: list[str] = []
        for file in self.files:
            kept: list[bytes] = []
            gone: list[str] = []
            for line in _lines(file):
                try:
                    record = cast("dict[str, Any]", json.loads(line))
                except ValueError:  # damaged: nobody can tell what it is about
                    gone.append("")
                    continue
                if is_meant(record):
                    gone.append(str(record.get("id", "")))
                else:
                    kept.append(line)
            if gone:
                overwrite(file, b"".join(kept))
            removed += [name for name in gone if name]
        return removed


def overwrite(file: Path, data: bytes) -> None:
    """Replace a file's bytes; the old ones are zeroed where they lie. A file without bytes is removed.

    Args:
        file: A file of ours.
        data: What is to be left of it.

    Raises:
        WriteError: It cannot be written.
    """
    try:
        if sys.platform == "win32":  # an open file cannot be replaced there
            _put(file, data)
            return
        with open(file, "r+b") as old:
            _put(file, data)
            old.write(b"\0" * os.fstat(old.fileno()).st_size)
            old.flush()
            os.fsync(old.fileno())
    except OSError as error:
        raise _write_error(file, error) from error


def _put(file: Path, data: bytes) -> None:
    if data:
        write_atomically(file, data, expected_sha256=None, private=True)
    else:
        file.unlink()


def _lines(file: Path) -> Iterator[bytes]:
    with open(file, "rb") as stream:
        yield from (line for line in stream if line.endswith(b"\n"))


def _drop_torn_line(file: Path) -> None:
    size = file.stat().st_size
    with open(file, "rb") as stream:
        if not size:
            return
        stream.seek(-1, os.SEEK_END)
        if stream.read(1) == b"\n":
            return
        stream.seek(0)
        whole = stream.read().rfind(b"\n") + 1
    os.truncate(file, whole)


def _write_error(path: Path, error: OSError) -> WriteError:
    return WriteError(
        f"{path} cannot be written: {error.strerror or error}.",
        hint="Free some space, or make the folder writable, and try again; the ledger has everything.",
        path=str(path),
    )
