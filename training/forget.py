"""Forgetting everywhere under PLANPATCH_HOME: data sets, journal, plan documents, logs, and the ledger last.

The ledger knows what is meant, so its rows go last: a run that is killed is run again with the same choice, which is
kept in a file until it is done, and finds what is left. The journal's lock is held throughout, so that nothing is
written anew meanwhile.

Adapters that were trained on what is forgotten are named, and removed if that is wished: nothing else takes an edit out
of weights.

Not covered: what another program copied, backups, the blocks of a copy-on-write filesystem or an SSD, the memory of a
server that runs (it forgets when it ends), and adapters whose manifest does not say what they learnt: they are named.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, cast

from engine.errors import LedgerError, WriteError
from engine.patching.disk import write_atomically
from engine.patching.ledger import Forgettable, Ledger
from engine.patching.ledger_forget import phrases_in
from engine.patching.ledger_records import iso_utc
from training.journal_file import JournalFile, overwrite
from training.promote import list_versions, remove_version

_WITH_ADAPTERS = "adapters"
_PLAN_MARK = "<!-- planpatch "
_LINE_FILES = (".log", ".txt", ".jsonl", ".csv", ".out", ".err")
_MAX_SWEPT_BYTES = 200_000_000


@dataclass(frozen=True, slots=True)
class Places:
    """Where a home keeps what may be forgotten.

    Args:
        home: PLANPATCH_HOME.
        journal: The journal's folder.
        data: The data sets' folder.
        plans: The plan documents' folder.
        models: The models' folder, which holds nothing of the user's.
        ledger: The ledger's file.
        adapters: The folder of trained adapters.
    """

    home: Path
    journal: Path
    data: Path
    plans: Path
    models: Path
    ledger: Path
    adapters: Path

    @property
    def pending(self) -> Path:
        """A choice that is being forgotten."""
        return self.journal.parent / "forget.json"


@dataclass(slots=True)
class Forgotten:
    """What was forgotten.

    Args:
        num_proposals: Proposals of the ledger.
        num_plans: Plans of the ledger.
        num_journal_lines: Lines of the journal.
        num_data_lines: Lines of data sets.
        num_documents: Plan documents.
        num_log_lines: Lines of logs and other files.
        adapters: Names of adapters that learnt some of it.
        num_adapters: How many of them were removed.
        maybe: Names of adapters, and of training that was cut off, that do not say what they learnt.
        left: Files that still name the paths, and that only the user can judge.
    """

    num_proposals: int = 0
    num_plans: int = 0
    num_journal_lines: int = 0
    num_data_lines: int = 0
    num_documents: int = 0
    num_log_lines: int = 0
    adapters: list[str] = field(default_factory=list[str])
    num_adapters: int = 0
    maybe: list[str] = field(default_factory=list[str])
    left: list[str] = field(default_factory=list[str])

    def to_json(self) -> dict[str, Any]:
        """The counts, for programs."""
        return {
            "proposals": self.num_proposals,
            "plans": self.num_plans,
            "journal_lines": self.num_journal_lines,
            "data_lines": self.num_data_lines,
            "plan_documents": self.num_documents,
            "log_lines": self.num_log_lines,
            "adapters": self.adapters,
            "adapters_removed": self.num_adapters,
            "adapters_maybe": self.maybe,
            "left": self.left,
        }


def preview(places: Places, ledger: Ledger, which: Forgettable) -> Forgotten:
    """What would be forgotten; nothing is changed.

    Args:
        places: The home.
        ledger: Its ledger.
        which: A file, a folder or a time.

    Returns:
        The counts, but for logs.

    Raises:
        LedgerError: The ledger cannot be read.
    """
    matches = ledger.find_forgettable(which)
    ids = _ids_in_journal(JournalFile(places.journal), which, matches.patch_ids)
    learnt, maybe = _adapters(places, ids)
    return Forgotten(
        adapters=[folder.name for folder in learnt],
        maybe=maybe,
        num_proposals=len(matches.patch_ids),
        num_plans=len(matches.plan_ids),
        num_journal_lines=len(ids),
        num_data_lines=sum(_concerns(row, ids) for file in _data_files(places) for _, row in _rows(file)),
        num_documents=sum(1 for _ in _plan_documents(places.plans, which)),
    )


def forget(places: Places, ledger: Ledger, which: Forgettable, *, with_adapters: bool = False) -> Forgotten:
    """Forget it.

    Args:
        places: The home.
        ledger: Its ledger.
        which: A file, a folder or a time.
        with_adapters: Remove the adapters that learnt some of it; a run that goes on keeps to what was wished first.

    Returns:
        What was forgotten.

    Raises:
        LedgerError: Another process holds the ledger or the journal; calling this again goes on.
        WriteError: A file cannot be written; calling this again goes on.
    """
    done = Forgotten()
    journal = JournalFile(places.journal)
    with journal.writing():
        with_adapters = with_adapters or _pending_facts(places).get(_WITH_ADAPTERS) == "yes"
        choice = {**which.to_json(), **({_WITH_ADAPTERS: "yes"} if with_adapters else {})}
        write_atomically(places.pending, json.dumps(choice).encode(), expected_sha256=None, private=True)
        matches = ledger.find_forgettable(which)
        ids = _ids_in_journal(journal, which, matches.patch_ids)
        learnt, done.maybe = _adapters(places, ids)
        done.adapters = [folder.name for folder in learnt]
        for folder in learnt if with_adapters else ():
            remove_version(folder)
            done.num_adapters += 1
        done.num_data_lines = _forget_data(places, ids)
        done.num_journal_lines = len(journal.remove(lambda record: _concerns(record, ids)))
        for file in list(_plan_documents(places.plans, which)):
            overwrite(file, b"")
            done.num_documents += 1
        phrases = {*matches.phrases, *(path for path in which.to_json().values() if which.before is None)}
        done.num_log_lines = _forget_log_lines(places, phrases)
        forgotten = ledger.forget(which)
        done.num_proposals, done.num_plans = len(forgotten.patch_ids), len(forgotten.plan_ids)
        _remove(places.pending)
        paths = {phrase for phrase in phrases if os.path.isabs(phrase)} if which.before is None else set[str]()
        done.left = [str(file) for file in _other_files(places) if _names_one(file, paths)]
        done.left += [str(file) for file in _copies(places) if _names_one(file, {*paths, *ids})]
    return done


def unfinished(places: Places) -> Forgettable | None:
    """What a run that was killed was forgetting.

    Args:
        places: The home.

    Returns:
        The choice, None if there is none.

    Raises:
        LedgerError: The file that says it is damaged.
    """
    try:
        name, value = next(iter(_pending_facts(places).items()))
        if name == "before":
            return Forgettable(before=datetime.fromisoformat(value.replace("Z", "+00:00")))
        return Forgettable(file=Path(value)) if name == "file" else Forgettable(folder=Path(value))
    except StopIteration:
        return None
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise _damaged(places) from error


def _pending_facts(places: Places) -> dict[str, str]:
    """The choice of a run that was killed; empty if there is none."""
    try:
        text = places.pending.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise _damaged(places) from error
    try:
        facts = cast("dict[str, str]", json.loads(text))
        if facts.keys():
            return facts
    except (ValueError, AttributeError) as error:
        raise _damaged(places) from error
    raise _damaged(places)


def _damaged(places: Places) -> LedgerError:
    return LedgerError(
        f"{places.pending} is damaged: what was being forgotten is not known.",
        hint="Remove the file and run planpatch train forget again.",
        path=str(places.pending),
    )


def _adapters(places: Places, ids: frozenset[str]) -> tuple[list[Path], list[str]]:
    """Folders of adapters that learnt one of the edits, and names of those that do not say what they learnt."""
    versions = list_versions(places.adapters)
    learnt = [version.folder for version in versions if not ids.isdisjoint(version.rows)]
    cut_off = [path.name.strip(".") for path in sorted(places.adapters.glob(".*.partial"))]
    return learnt, [
        *[version.folder.name for version in versions if "row_ids" not in version.manifest],
        *cut_off,
    ] if ids else []


def _ids_in_journal(journal: JournalFile, which: Forgettable, patch_ids: tuple[str, ...]) -> frozenset[str]:
    """Ids of the journal's lines that are meant: also of proposals that the ledger has dropped."""
    known = set(patch_ids)
    return frozenset(
        record["id"]
        for file in journal.files
        for _, record in _rows(file)
        if record.get("id")
        and (
            which.matches(record.get("path"), str(record.get("created_at", "")))
            or not known.isdisjoint(str(record["id"]).split("+"))
        )
    ) | frozenset(patch_ids)


def _concerns(row: Mapping[str, Any], ids: frozenset[str]) -> bool:
    """Whether a line has one of the ids, or is a pair with one of them."""
    name = str(row.get("id", ""))
    return name in ids or not ids.isdisjoint(name.split("+"))


def _data_files(places: Places) -> list[Path]:
    return sorted(places.data.rglob("*.jsonl")) if places.data.is_dir() else []


def _forget_data(places: Places, ids: frozenset[str]) -> int:
    num_removed = 0
    for file in _data_files(places):
        rows = list(_rows(file))
        kept = [line for line, row in rows if not _concerns(row, ids)]
        if len(kept) < len(rows):
            overwrite(file, b"".join(kept))
            num_removed += len(rows) - len(kept)
    return num_removed


def _rows(file: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Lines of a JSONL file with what they hold; nothing is known of one that cannot be read."""
    with open(file, "rb") as stream:
        for line in stream:
            try:
                value = json.loads(line)
            except ValueError:
                value = None
            yield line, cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _plan_documents(folder: Path, which: Forgettable) -> Iterator[Path]:
    for file in sorted(folder.glob("*.md")) if folder.is_dir() else ():
        first = file.read_bytes()[:8192].decode("utf-8-sig", "replace").partition("\n")[0]
        changed_at = iso_utc(datetime.fromtimestamp(file.stat().st_mtime, tz=timezone.utc))
        try:
            facts = json.loads(first.removeprefix(_PLAN_MARK).rstrip("\r").removesuffix(" -->"))
            path = str(facts["path"])
        except (ValueError, KeyError, TypeError):
            path = None
        if which.matches(path, changed_at):
            yield file


def _other_files(places: Places) -> Iterator[Path]:
    """Files of the home that hold neither rows nor lines of ours; models are not looked into."""
    ours = {places.ledger, *(places.ledger.with_name(places.ledger.name + end) for end in ("-wal", "-shm", ".lock"))}
    skipped = (places.models, places.journal, places.data)
    for folder, names, files in os.walk(places.home):
        names[:] = [name for name in names if Path(folder, name) not in skipped]
        for name in sorted(files):
            file = Path(folder, name)
            if file not in ours and file.is_file() and not file.is_symlink():
                yield file


def _copies(places: Places) -> Iterator[Path]:
    """Files beside journal and data sets that are none: copies that the user made."""
    for folder in (places.journal, places.data):
        for file in sorted(folder.rglob("*")):
            if file.is_file() and not file.is_symlink() and file.suffix != ".jsonl":
                yield file


def _forget_log_lines(places: Places, phrases: set[str]) -> int:
    num_removed = 0
    for file in _other_files(places):
        if file.suffix not in _LINE_FILES or file.stat().st_size > _MAX_SWEPT_BYTES:
            continue
        data = file.read_bytes()
        lines = data.splitlines(keepends=True)
        kept = [line for line in lines if not phrases_in(line.decode("utf-8", "replace"), phrases)]
        if len(kept) < len(lines):
            _shorten(file, b"".join(kept), len(data))
            num_removed += len(lines) - len(kept)
    return num_removed


def _shorten(file: Path, data: bytes, size: int) -> None:
    """In place: a server that writes this log has it open."""
    try:
        with open(file, "r+b") as stream:
            stream.write(data + b"\0" * (size - len(data)))
            stream.flush()
            os.fsync(stream.fileno())
            stream.truncate(len(data))
    except OSError as error:
        raise WriteError(
            f"{file} cannot be written: {error.strerror or error}.", hint="Close what holds it and try again."
        ) from error


def _names_one(file: Path, paths: set[str]) -> bool:
    if not paths or file.stat().st_size > _MAX_SWEPT_BYTES:
        return False
    return phrases_in(file.read_bytes().decode("utf-8", "replace"), paths)


def _remove(file: Path) -> None:
    try:
        overwrite(file, b"")
    except FileNotFoundError:
        pass
