"""Forgetting: which rows of the ledger a file, a folder or a time means, and what is left of them.

A forgotten row is deleted and put back as a tombstone: id, times, model and the kinds of its events stay; what a person
or a model wrote, and every path, goes.

Not covered: what a proposal for *another* file may quote of this one (an intent that names it), and backups.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, cast

from engine.patching.ledger_db import Database
from engine.patching.ledger_records import FORGOTTEN, canonical_json, iso_utc, path_key

_MIN_PHRASE_CHARS = 8
_KEPT_FACTS = ("hunks", "operation", "via", "label", "is_in")


@dataclass(frozen=True, slots=True)
class Forgettable:
    """What is to be forgotten; exactly one is given.

    Args:
        file: Everything about this file.
        folder: Everything about files in this folder and below.
        before: Everything made before this time; one without zone is UTC.
    """

    file: Path | None = None
    folder: Path | None = None
    before: datetime | None = None

    def matches(self, path: str | None, created_at: str) -> bool:
        """Whether something is meant.

        Args:
            path: Its file as it is recorded; None for code that was pasted.
            created_at: UTC in ISO 8601.

        Returns:
            Whether it is.
        """
        if self.before is not None:
            return created_at < iso_utc(self.before)
        return path is not None and self.holds(Path(path))

    def holds(self, path: Path) -> bool:
        """Whether a path is the file, or in the folder; by its name and by what links on the way lead to.

        Args:
            path: A path; need not exist any more.

        Returns:
            Whether it is.
        """
        wanted = self.file or self.folder
        if wanted is None:
            return False
        for name, own in ((path_key(path), path_key(wanted)), (_name_of(path), _name_of(wanted))):
            if name == own or (self.folder is not None and _is_below(name or "", own or "")):
                return True
        return False

    def to_json(self) -> dict[str, str]:
        """The choice, for programs and to be finished later."""
        chosen = {"file": self.file, "folder": self.folder}
        facts = {name: os.path.abspath(path) for name, path in chosen.items() if path is not None}
        return facts if self.before is None else {"before": iso_utc(self.before)}


@dataclass(frozen=True, slots=True)
class Matches:
    """What is, or was, to be forgotten.

    Args:
        patch_ids: Proposals.
        plan_ids: Plans.
        phrases: Their paths, intents and plans, by which other files can be searched; none of a few letters.
    """

    patch_ids: tuple[str, ...] = ()
    plan_ids: tuple[str, ...] = ()
    phrases: tuple[str, ...] = ()


def find_matches(database: Database, which: Forgettable) -> Matches:
    """The rows that are meant and are not forgotten yet.

    Args:
        database: The ledger's.
        which: A file, a folder or a time.

    Returns:
        Their ids, and phrases of them.

    Raises:
        LedgerError: It cannot be read.
    """
    columns = "id, created_at, path, scope_kind, intent, "
    proposals = list(_meant(database, f"SELECT {columns} plan_text AS words FROM proposals ORDER BY id", which))
    plans = list(_meant(database, f"SELECT {columns} steps AS words FROM plans ORDER BY id", which))
    phrases = {row["path"] or "" for row in [*proposals, *plans]} | {row["intent"] for row in [*proposals, *plans]}
    phrases |= {line for row in proposals for line in row["words"].splitlines()}
    phrases |= {step for row in plans for step in cast("list[str]", json.loads(row["words"]))}
    return Matches(
        tuple(row["id"] for row in proposals),
        tuple(row["id"] for row in plans),
        tuple(sorted(phrase for phrase in phrases if len(phrase) >= _MIN_PHRASE_CHARS)),
    )


def _meant(database: Database, sql: str, which: Forgettable) -> Iterator[Any]:
    for row in database.rows(sql):
        if row["scope_kind"] != FORGOTTEN and which.matches(row["path"], row["created_at"]):
            yield row


def entomb(database: Database, matches: Matches, now: str) -> None:
    """Put tombstones in the place of rows; inside a transaction.

    Args:
        database: The ledger's.
        matches: The rows.
        now: UTC in ISO 8601.

    Raises:
        LedgerError: It cannot be written.
    """
    if not (matches.patch_ids or matches.plan_ids):
        return
    nothing = database.put_text(b"")
    for patch_id in matches.patch_ids:
        row = dict(_only(database, "SELECT * FROM proposals WHERE id = ?", patch_id))
        events = [dict(event) for event in database.rows("SELECT * FROM events WHERE patch_id = ?", (patch_id,))]
        database.delete_proposals([patch_id])
        database.insert("proposals", row | _empty_proposal(nothing))
        for event in events:
            database.insert("events", event | {"data": _kept_facts(event["data"]), "text_sha256": None})
        last = {"patch_id": patch_id, "at": now, "kind": "refused", "data": canonical_json("", {"reason": FORGOTTEN})}
        database.insert("events", last)
    for plan_id in matches.plan_ids:
        row = dict(_only(database, "SELECT * FROM plans WHERE id = ?", plan_id))
        database.delete_plans([plan_id])
        empty = {"path": None, "path_key": None, "scope": "", "scope_kind": FORGOTTEN, "start_line": 0, "end_line": 0}
        database.insert("plans", row | empty | {"base_sha256": nothing, "intent": "", "steps": "[]"})


def _empty_proposal(nothing: str) -> dict[str, Any]:
    texts = dict.fromkeys(("key", "scope", "intent", "plan_text", "preset", "diff"), "")
    lists = dict.fromkeys(("edits", "imports", "gates", "repairs"), "[]")
    error = {"code": FORGOTTEN, "message": "It was forgotten: its texts were removed."}
    return {
        **texts,
        **lists,
        **dict.fromkeys(("path", "path_key", "patched_sha256", "plan_id"), None),
        "scope_kind": FORGOTTEN,
        "start_line": 0,
        "end_line": 0,
        "base_sha256": nothing,
        "feedback": "{}",
        "settings": "{}",
        "outcome": "refused",
        "error": canonical_json("error", error),
    }


def _kept_facts(data: str) -> str:
    """Numbers and kinds of an event; no path, digest or reason."""
    facts = cast("dict[str, Any]", json.loads(data))
    return canonical_json("event", {name: facts[name] for name in _KEPT_FACTS if name in facts})


def _only(database: Database, sql: str, name: str) -> Any:
    row = database.row(sql, (name,))
    assert row is not None
    return row


def _name_of(path: Path) -> str:
    return os.path.normcase(os.path.abspath(path))


def _is_below(name: str, folder: str) -> bool:
    return name.startswith(folder.rstrip("/\\") + os.sep)


def phrases_in(text: str, phrases: Iterable[str]) -> bool:
    """Whether a text holds one of the phrases, as it is or as JSON writes it.

    Args:
        text: Any text.
        phrases: What is looked for.

    Returns:
        Whether one is there.
    """
    return any(
        phrase in text or json.dumps(phrase)[1:-1] in text or json.dumps(phrase, ensure_ascii=False)[1:-1] in text
        for phrase in phrases
    )
