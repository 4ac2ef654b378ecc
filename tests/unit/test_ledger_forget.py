"""What was forgotten is in no byte of the ledger's files; everything else is there as before."""

from __future__ import annotations

import os
import sqlite3
import sys
import zlib
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from engine.errors import LedgerError, UsageError
from engine.patching.ledger import Forgettable, Ledger, PlanRecord, State
from tests.unit.test_ledger import BASE, Clock, proposal

MARK = "zebra-intent-9"


def _files(folder: Path) -> bytes:
    return b"".join(file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file())


def _texts(path: Path) -> list[bytes]:
    """Every text that the ledger holds, as it was."""
    connection = sqlite3.connect(path)
    texts = [zlib.decompress(row[0]) for row in connection.execute("SELECT zlib FROM texts")]
    connection.close()
    return texts


def _propose(ledger: Ledger, file: Path, mark: str) -> str:
    from dataclasses import replace

    made = replace(
        proposal(file), intent=f"intent {mark}", plan_text=f"plan {mark}", diff=f"diff {mark}", key=mark,
        feedback={"hint": mark}, preset=mark,
    )  # fmt: skip
    return ledger.propose(made)


def test_what_was_forgotten_is_in_no_byte_and_the_rest_is_as_before(tmp_path: Path) -> None:
    clock, home = Clock(), tmp_path / "home"
    gone, kept = tmp_path / "gone" / "zebra.py", tmp_path / "kept" / "horse.py"
    for file in (gone, kept):
        file.parent.mkdir()
        file.write_bytes(BASE)
    with Ledger(home / "ledger.sqlite3", clock=clock) as ledger:
        first, second = _propose(ledger, gone, "zebra-1"), _propose(ledger, kept, "horse-2")
        plan = ledger.add_plan(PlanRecord(gone, "greet", "function", 4, 8, BASE, ["step zebra-3"], "intent zebra-3"))
        ledger.apply(first)
        ledger.accept(first, reason="zebra-4")
        ledger.label(first, "accepted", reason="zebra-5", final_text=b"zebra-6")
        before = ledger.get(second).to_json()
        matches = ledger.forget(Forgettable(file=gone))
        assert (matches.patch_ids, matches.plan_ids) == ((first,), (plan,))
        assert ledger.get(second).to_json() == before
        assert ledger.problems() == []
        entry = ledger.get(first)
        assert entry.state is State.FORGOTTEN
        assert [event.kind for event in entry.events] == [
            "proposed", "applying", "applied", "accepted", "label", "refused"
        ]  # fmt: skip
        assert ledger.last_applied(gone) is None
        for refuse in (ledger.apply, ledger.accept, ledger.reject, ledger.rollback, ledger.redo):
            with pytest.raises(UsageError):
                refuse(first)
        with pytest.raises(UsageError, match="was forgotten"):
            ledger.get_plan(plan)
        assert b"zebra" not in _files(home)
        assert zlib.compress(b"zebra-6") not in _files(home)
        assert [text for text in _texts(ledger.path) if b"zebra" in text] == []
        assert b"horse" in _files(home)
        assert ledger.forget(Forgettable(file=gone)).patch_ids == ()


def test_folder_and_time_choose_and_links_are_followed(tmp_path: Path) -> None:
    clock = Clock()
    with Ledger(tmp_path / "home" / "ledger.sqlite3", clock=clock) as ledger:
        inside, beside = tmp_path / "a" / "b" / "m.py", tmp_path / "ab" / "m.py"
        old = _propose(ledger, inside, "one")
        clock.now += timedelta(days=1)
        new = _propose(ledger, beside, "two")
        assert ledger.find_forgettable(Forgettable(folder=tmp_path / "a")).patch_ids == (old,)
        if sys.platform != "win32":
            (tmp_path / "link").symlink_to(tmp_path / "ab")
            assert ledger.find_forgettable(Forgettable(folder=tmp_path / "link")).patch_ids == (new,)
        time = datetime(2026, 1, 1, 12, tzinfo=timezone.utc)
        assert ledger.find_forgettable(Forgettable(before=time)).patch_ids == (old,)


def test_rows_stay_append_only_for_everything_else(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.sqlite3") as ledger:
        patch_id = _propose(ledger, tmp_path / "m.py", "one")
        ledger.forget(Forgettable(file=tmp_path / "other.py"))
        assert ledger.get(patch_id).proposal.intent == "intent one"
        connection = sqlite3.connect(tmp_path / "ledger.sqlite3")
        connection.create_function("planpatch_retention", 0, lambda: 0)
        for sql in ("UPDATE proposals SET intent = ''", "DELETE FROM proposals", "DELETE FROM events"):
            with pytest.raises(sqlite3.DatabaseError, match="append-only"):
                connection.execute(sql)
        connection.close()


def test_a_reader_in_the_way_is_told_and_the_next_try_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.patching.ledger_db._BUSY_TIMEOUT_S", 0.2)
    path = tmp_path / "home" / "ledger.sqlite3"
    with Ledger(path) as ledger:
        _propose(ledger, tmp_path / "m.py", "zebra")
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN")
        other.execute("SELECT count(*) FROM proposals").fetchone()
        with pytest.raises(LedgerError, match="locked by another process") as caught:
            ledger.forget(Forgettable(file=tmp_path / "m.py"))
        assert "Try again" in caught.value.hint
        other.close()
        ledger.forget(Forgettable(file=tmp_path / "m.py"))
        assert b"zebra" not in _files(path.parent)
        assert os.path.getsize(f"{path}-wal") == 0
