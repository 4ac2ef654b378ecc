"""The ledger's file: one SQLite database in WAL mode, opened by any number of processes and threads.

Rows are only ever added; triggers refuse updates and deletions to everyone but the retention routine and `forget`. What
is deleted is overwritten. Only the owner
may read the file, because it holds source code.

Not covered: someone who drops the triggers, or edits the file as bytes; a folder on a network filesystem (SQLite's WAL
needs shared memory; such a folder is refused where SQLite notices); a connection carried across `fork`.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import sys
import threading
import time
import zlib
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from engine.errors import LedgerError
from engine.patching.disk import sha256_hex

SCHEMA_VERSION = 1
_APPLICATION_ID = 0x50504C47  # "PPLG"
_BUSY_TIMEOUT_S = 30.0
_WAL_RETRY_DELAYS_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
_TABLES = ("texts", "plans", "proposals", "events")

_SCHEMA = """
CREATE TABLE texts (
    sha256 TEXT PRIMARY KEY,
    size_bytes INTEGER NOT NULL,
    zlib BLOB NOT NULL
);
CREATE TABLE plans (
    id TEXT PRIMARY KEY,
    created_at TEXT NOT NULL,
    path TEXT,
    path_key TEXT,
    scope TEXT NOT NULL,
    scope_kind TEXT NOT NULL,
    start_line INTEGER NOT NULL,
    end_line INTEGER NOT NULL,
    base_sha256 TEXT NOT NULL REFERENCES texts (sha256),
    intent TEXT NOT NULL,
    steps TEXT NOT NULL,
    truncated INTEGER NOT NULL,
    model TEXT NOT NULL,
    timings TEXT NOT NULL
);
CREATE TABLE proposals (
    id TEXT PRIMARY KEY,
    created_at TEXT NOT NULL,
    key TEXT NOT NULL,
    path TEXT,
    path_key TEXT,
    scope TEXT NOT NULL,
    scope_kind TEXT NOT NULL,
    start_line INTEGER NOT NULL,
    end_line INTEGER NOT NULL,
    base_sha256 TEXT NOT NULL REFERENCES texts (sha256),
    patched_sha256 TEXT REFERENCES texts (sha256),
    outcome TEXT NOT NULL CHECK (outcome IN ('proposed', 'refused')),
    surface TEXT NOT NULL CHECK (surface IN ('cli', 'http', 'lsp', 'bench')),
    intent TEXT NOT NULL,
    plan_id TEXT,
    plan_text TEXT NOT NULL,
    feedback TEXT NOT NULL,
    preset TEXT NOT NULL,
    model TEXT NOT NULL,
    model_digest TEXT NOT NULL,
    adapter_digest TEXT NOT NULL,
    edit_format TEXT NOT NULL,
    prompt_version TEXT NOT NULL,
    settings TEXT NOT NULL,
    edits TEXT NOT NULL,
    imports TEXT NOT NULL,
    gates TEXT NOT NULL,
    repairs TEXT NOT NULL,
    diff TEXT NOT NULL,
    timings TEXT NOT NULL,
    error TEXT
);
CREATE TABLE events (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    patch_id TEXT NOT NULL REFERENCES proposals (id),
    at TEXT NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('proposed', 'refused', 'applying', 'applied', 'apply_failed', 'diverged',
        'accepted', 'rejected', 'rolled_back', 'redone', 'label')),
    data TEXT NOT NULL,
    text_sha256 TEXT REFERENCES texts (sha256)
);
CREATE INDEX plans_by_path ON plans (path_key, id);
CREATE INDEX plans_by_base ON plans (base_sha256);
CREATE INDEX proposals_by_key ON proposals (key, id);
CREATE INDEX proposals_by_path ON proposals (path_key, id);
CREATE INDEX proposals_by_base ON proposals (base_sha256);
CREATE INDEX proposals_by_patched ON proposals (patched_sha256);
CREATE INDEX events_by_patch ON events (patch_id, seq);
CREATE INDEX events_by_kind ON events (kind, seq);
CREATE INDEX events_by_text ON events (text_sha256);
"""


class Database:
    """One connection, shared by this process's threads one at a time.

    Args:
        path: The database file; it and its folder are made if missing.

    Raises:
        LedgerError: Damaged, not a ledger, made by a newer version, or not readable and writable.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()
        self._is_pruning = False
        _make_private(path)
        with ledger_errors(path):
            self._connection = sqlite3.connect(
                path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
            )
        try:
            self._prepare()
        except BaseException:
            self._connection.close()
            raise

    def close(self) -> None:
        """Close the connection; the object cannot be used afterwards."""
        with self._lock:
            self._connection.close()

    def rows(self, sql: str, values: Iterable[Any] = ()) -> list[sqlite3.Row]:
        """All rows of a query.

        Args:
            sql: A SELECT.
            values: Its parameters.

        Returns:
            The rows.

        Raises:
            LedgerError: The database cannot be read.
        """
        with self._lock, ledger_errors(self.path):
            return self._connection.execute(sql, tuple(values)).fetchall()

    def row(self, sql: str, values: Iterable[Any] = ()) -> sqlite3.Row | None:
        """The first row of a query, if there is one.

        Args:
            sql: A SELECT.
            values: Its parameters.

        Returns:
            The row or None.

        Raises:
            LedgerError: The database cannot be read.
        """
        rows = self.rows(sql, values)
        return rows[0] if rows else None

    def insert(self, table: str, values: Mapping[str, Any]) -> int:
        """Add one row.

        Args:
            table: A table of the schema.
            values: Value of each column.

        Returns:
            Its row number.

        Raises:
            LedgerError: The row cannot be written.
        """
        sql = f"INSERT INTO {table} ({', '.join(values)}) VALUES ({', '.join('?' * len(values))})"
        with self._lock, ledger_errors(self.path):
            return self._connection.execute(sql, tuple(values.values())).lastrowid or 0

    def put_text(self, data: bytes) -> str:
        """Keep an exact text, once; inside a transaction.

        Args:
            data: The text's bytes.

        Returns:
            Its digest, which `text` takes.

        Raises:
            LedgerError: The text cannot be written.
        """
        sha256 = sha256_hex(data)
        if self.row("SELECT 1 FROM texts WHERE sha256 = ?", (sha256,)) is None:
            self.insert("texts", {"sha256": sha256, "size_bytes": len(data), "zlib": zlib.compress(data)})
        return sha256

    def text(self, sha256: str) -> bytes:
        """A text that was kept.

        Args:
            sha256: Its digest.

        Returns:
            Its exact bytes.

        Raises:
            LedgerError: It is missing or damaged.
        """
        row = self.row("SELECT zlib FROM texts WHERE sha256 = ?", (sha256,))
        try:
            data = zlib.decompress(row["zlib"]) if row else None
        except zlib.error:
            data = None
        if data is None or sha256_hex(data) != sha256:
            raise LedgerError(
                f"{self.path} has lost or damaged the text {sha256}.",
                hint="Check the disk; `planpatch doctor` checks the ledger.",
                path=str(self.path),
            )
        return data

    @contextmanager
    def transaction(self) -> Generator[None, None, None]:
        """All of what is written inside, or nothing; no other writer comes between.

        Yields:
            Nothing.

        Raises:
            LedgerError: The database is locked for too long or cannot be written.
        """
        with self._lock:
            with ledger_errors(self.path):
                self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                with ledger_errors(self.path):
                    self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:  # a full disk has rolled it back already
                    self._connection.execute("ROLLBACK")
                raise

    def delete_proposals(self, ids: Iterable[str]) -> None:
        """Retention only: remove proposals with their events, inside a transaction.

        Args:
            ids: Proposals to be removed.

        Raises:
            LedgerError: The database cannot be written.
        """
        with self._pruning():
            for patch_id in ids:
                self._connection.execute("DELETE FROM events WHERE patch_id = ?", (patch_id,))
                self._connection.execute("DELETE FROM proposals WHERE id = ?", (patch_id,))

    def delete_plans(self, ids: Iterable[str]) -> None:
        """Retention only: remove plans, inside a transaction.

        Args:
            ids: Plans to be removed.

        Raises:
            LedgerError: The database cannot be written.
        """
        with self._pruning():
            self._connection.executemany("DELETE FROM plans WHERE id = ?", [(plan_id,) for plan_id in ids])

    def delete_unused_texts(self) -> None:
        """Retention only: remove texts that nothing refers to, inside a transaction.

        Raises:
            LedgerError: The database cannot be written.
        """
        with self._pruning():
            self._connection.execute(
                """DELETE FROM texts WHERE NOT EXISTS (SELECT 1 FROM proposals WHERE base_sha256 = texts.sha256)
                AND NOT EXISTS (SELECT 1 FROM proposals WHERE patched_sha256 = texts.sha256)
                AND NOT EXISTS (SELECT 1 FROM plans WHERE base_sha256 = texts.sha256)
                AND NOT EXISTS (SELECT 1 FROM events WHERE text_sha256 = texts.sha256)"""
            )

    def give_back_space(self) -> None:
        """Shrink the file by its free pages and empty the write-ahead log.

        Raises:
            LedgerError: The database cannot be written.
        """
        with self._lock, ledger_errors(self.path):
            self._connection.execute("PRAGMA incremental_vacuum").fetchall()
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def write_anew(self) -> None:
        """Write the whole file anew without its free pages, and empty the write-ahead log: nothing deleted is left.

        Raises:
            LedgerError: Another process is reading or writing, or the disk is full.
        """
        with self._lock, ledger_errors(self.path):
            self._connection.execute("PRAGMA temp_store = MEMORY")  # no copy in the system's temporary folder
            self._empty_log()
            self._connection.execute("VACUUM")
            self._empty_log()

    def _empty_log(self) -> None:
        is_busy, *_ = self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if is_busy:
            raise sqlite3.OperationalError("database is locked: its log cannot be emptied")

    def used_bytes(self) -> int:
        """Size of the pages in use.

        Returns:
            Bytes.

        Raises:
            LedgerError: The database cannot be read.
        """
        pages, free, size = (
            self.rows(f"PRAGMA {name}")[0][0] for name in ("page_count", "freelist_count", "page_size")
        )
        return (pages - free) * size

    def problems(self) -> list[str]:
        """What SQLite's integrity check and foreign key check find.

        Returns:
            Nothing for a sound database.

        Raises:
            LedgerError: The database cannot be read at all.
        """
        found = [row[0] for row in self.rows("PRAGMA integrity_check") if row[0] != "ok"]
        return found + [
            f"{row[0]} refers to a missing row of {row[2]}" for row in self.rows("PRAGMA foreign_key_check")
        ]

    @contextmanager
    def _pruning(self) -> Generator[None, None, None]:
        with self._lock, ledger_errors(self.path):
            self._is_pruning = True
            try:
                yield
            finally:
                self._is_pruning = False

    def _prepare(self) -> None:
        connection = self._connection
        connection.row_factory = sqlite3.Row
        connection.create_function("planpatch_retention", 0, lambda: int(self._is_pruning))
        with ledger_errors(self.path):
            self._check_is_ledger()
            connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
            self._use_wal()
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("PRAGMA secure_delete = ON")
            connection.execute("PRAGMA trusted_schema = ON")  # the triggers call a function of this connection
        if self._version() < SCHEMA_VERSION:
            self._create_schema()

    def _version(self) -> int:
        return int(self.rows("PRAGMA user_version")[0][0])

    def _check_is_ledger(self) -> None:
        version = self._version()
        if version > SCHEMA_VERSION:
            raise LedgerError(
                f"{self.path} was written by a newer PlanPatch (ledger version {version}, this one knows "
                f"{SCHEMA_VERSION}).",
                hint="Upgrade PlanPatch, or set PLANPATCH_HOME to another folder.",
                path=str(self.path),
                version=version,
            )
        is_empty = self.row("SELECT 1 FROM sqlite_master") is None
        if not is_empty and self.rows("PRAGMA application_id")[0][0] != _APPLICATION_ID:
            raise LedgerError(
                f"{self.path} is a database of another program.",
                hint="Move it elsewhere, or set PLANPATCH_HOME to another folder.",
                path=str(self.path),
            )

    def _use_wal(self) -> None:
        for delay_s in (*_WAL_RETRY_DELAYS_S, None):
            try:
                mode = self._connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
                break
            except sqlite3.OperationalError:  # two processes at the very first start: the busy timeout does not apply
                if delay_s is None:
                    raise
                time.sleep(delay_s)
        else:
            return
        if mode != "wal":
            raise LedgerError(
                f"{self.path} cannot be shared between processes: SQLite's WAL mode does not work there.",
                hint="Set PLANPATCH_HOME to a folder on a local disk.",
                path=str(self.path),
            )

    def _create_schema(self) -> None:
        with self.transaction(), ledger_errors(self.path):
            if self._version() == SCHEMA_VERSION:  # another process was faster
                return
            for statement in [*_SCHEMA.split(";"), *_append_only_triggers()]:
                self._connection.execute(statement)
            self._connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            self._connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def set_aside(path: Path) -> list[Path]:
    """Rename a damaged ledger, so that the next start makes a new one. Nothing is deleted.

    Args:
        path: The ledger; no process may have it open.

    Returns:
        The new names of the ledger and its companion files.

    Raises:
        LedgerError: A file cannot be renamed.
    """
    stamp = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%SZ")
    renamed: list[Path] = []
    for suffix in ("-wal", "-shm", ""):
        old = path.with_name(path.name + suffix)
        new = path.with_name(f"{path.name}.damaged-{stamp}{suffix}")
        try:
            if old.exists():
                renamed.append(old.rename(new))
        except OSError as error:
            raise LedgerError(
                f"{old} cannot be renamed to {new.name}: {error.strerror or error}.",
                hint="Stop every PlanPatch process and try again.",
                path=str(old),
            ) from error
    return renamed


@contextmanager
def ledger_errors(path: Path) -> Generator[None, None, None]:
    """Turn SQLite's errors into ones that name the ledger and say what to do.

    Args:
        path: The ledger.

    Yields:
        Nothing.

    Raises:
        LedgerError: For every error of SQLite.
    """
    try:
        yield
    except sqlite3.Error as error:
        raise _ledger_error(path, error) from error


def _ledger_error(path: Path, error: sqlite3.Error) -> LedgerError:
    text = str(error)
    if "not a database" in text or "malformed" in text or "file is encrypted" in text:
        what, hint = (
            "is damaged or not a ledger",
            (
                "Stop every PlanPatch process and rename the file (and its -wal and -shm) to keep it; the next start "
                "makes a new ledger. Nothing was deleted."
            ),
        )
    elif "locked" in text or "busy" in text:
        what, hint = "is locked by another process", "Try again; if it stays so, stop the other PlanPatch processes."
    elif "full" in text:
        what, hint = "cannot grow: the disk is full", "Free some space and try again; nothing in the ledger was lost."
    elif "readonly" in text or "unable to open" in text:
        what, hint = "cannot be written", "Make the file and its folder writable, or set PLANPATCH_HOME elsewhere."
    else:
        what, hint = "could not be used", "Check the disk; `planpatch doctor` checks the ledger."
    return LedgerError(f"{path} {what} ({text}).", hint=hint, path=str(path))


def _make_private(path: Path) -> None:
    """The folder and an empty file that only their owner can read; SQLite gives its companion files the same mode."""
    try:
        for folder in reversed([folder for folder in path.parents if not folder.exists()]):
            folder.mkdir(mode=0o700, exist_ok=True)
        _create(path)
        if sys.platform != "win32":
            for file in (path, path.with_name(path.name + "-wal"), path.with_name(path.name + "-shm")):
                if file.exists() and file.stat().st_mode & 0o077:
                    file.chmod(0o600)
    except FileNotFoundError:  # a companion file that another process just removed
        return
    except OSError as error:
        raise LedgerError(
            f"{path} cannot be opened: {error.strerror or error}.",
            hint="Make the file and its folder writable for you, or set PLANPATCH_HOME to another folder.",
            path=str(path),
        ) from error


def _create(path: Path) -> None:
    """Make an empty file, if there is none.

    One that exists is not opened: to close it would end the locks that this process's other connection holds on it
    (POSIX ties them to process and file). Another process would then take itself for the last user of the write-ahead
    log, and delete it with what is written into it from then on.
    """
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR)) from None
        if not os.access(path, os.R_OK | os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES)) from None


def _append_only_triggers() -> list[str]:
    refuse = "BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END"
    triggers: list[str] = []
    for table in _TABLES:
        key = {"texts": "sha256", "events": "seq"}.get(table, "id")
        triggers += [
            f"CREATE TRIGGER {table}_no_update BEFORE UPDATE ON {table} {refuse}",
            f"CREATE TRIGGER {table}_no_delete BEFORE DELETE ON {table} WHEN NOT planpatch_retention() {refuse}",
            # INSERT OR REPLACE deletes without firing the trigger above.
            f"CREATE TRIGGER {table}_no_replace BEFORE INSERT ON {table} "
            f"WHEN EXISTS (SELECT 1 FROM {table} WHERE {key} = NEW.{key}) {refuse}",
        ]
    return triggers
