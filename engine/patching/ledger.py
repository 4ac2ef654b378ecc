"""The ledger: every plan, every proposal, and what became of it.

Nothing in it is changed, unless the user asks to forget something. A proposal's state is what its events add up to; a
roll-back or a change of mind is one more event. The exact text before and after each patch is kept, so that a patch can
be taken back, by hunk, after restarts and after edits elsewhere in the file.

Writing a file and recording it cannot be one step. So `applying` is recorded first, with the digests of the text before
and after; whoever opens the ledger next, and finds that nothing was recorded after it, looks at the file and records
what really happened. Only one process at a time writes files for a ledger (a lock file beside it); a process that is
killed loses the lock.

Stored: what is in `Proposal`, `PlanRecord` and `Event`, and nothing else. Prompts, other files, and what the user typed
outside of intent and feedback are not.

Not covered: a ledger shared by two machines; two ledgers used for the same file (each then sees the other's writes as
edits by the user); files that were renamed since; edits in an editor that are not saved (use `plan_rollback` and
`plan_redo` with the editor's text); whether a subset of hunks passes the gates (ask them before `apply`).
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Literal, TextIO

from filelock import FileLock, Timeout

from engine.errors import LedgerError, PathError, PlanPatchError, StaleTextError, UsageError
from engine.patching.disk import read_bytes, remove_leftovers, sha256_hex, write_atomically
from engine.patching.edits import AnchorError, Edit, apply_edits
from engine.patching.ledger_db import Database
from engine.patching.ledger_forget import Forgettable, Matches, entomb, find_matches
from engine.patching.ledger_records import (
    FORGOTTEN,
    NEVER_OFFERED,
    Applied,
    Entry,
    Event,
    Label,
    Operation,
    PlanRecord,
    Proposal,
    Pruned,
    Standing,
    State,
    Summary,
    Surface,
    add_up,
    canonical_json,
    chosen_hunks,
    event_of,
    in_file_already,
    is_unwanted,
    iso_utc,
    path_key,
    proposal_of,
    proposal_row,
    source_of,
    storable,
    stored_path,
    summary_of,
    wrong_state,
)
from engine.patching.relocate import Change, Range, Replanted, hunks_of, relocate, replant
from engine.patching.source import Source

__all__ = [
    "Applied",
    "Entry",
    "Event",
    "Forgettable",
    "Label",
    "Ledger",
    "PlanRecord",
    "Proposal",
    "Pruned",
    "Standing",
    "State",
    "Summary",
    "Surface",
    "request_key",
]

_RECOVERY_TIMEOUT_S = 1.0
_ID_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"
_NUM_TIME_DIGITS = 11
_NUM_RANDOM_DIGITS = 8
_EVENT_AFTER: dict[Operation, str] = {"apply": "applied", "rollback": "rolled_back", "redo": "redone"}
_CLOSING_KINDS = ("applied", "rolled_back", "redone", "apply_failed", "diverged")


def request_key(
    *,
    scope_text: str,
    context: str,
    intent: str,
    plan_text: str,
    feedback: Mapping[str, str] | None,
    preset: str,
    model_digest: str,
    adapter_digest: str,
    edit_format: str,
    prompt_version: str,
    settings: Mapping[str, Any],
) -> str:
    """What makes two requests the same.

    Args:
        scope_text: Text of the function, class or module.
        context: The surroundings that the model is shown.
        intent: What was asked for.
        plan_text: The plan's steps.
        feedback: The user's hint and reason, if any.
        preset: Name of the preset, if any.
        model_digest: sha256 that names the weights.
        adapter_digest: sha256 of the adapter, `__none__` for the base model.
        edit_format: `rewrite` or `json_edits`.
        prompt_version: Version of the prompt's wording.
        settings: The settings that change tokens.

    Returns:
        sha256 of all of them as canonical JSON, in hexadecimal.

    Raises:
        UsageError: A value is not JSON.
    """
    request = {
        "scope_text": scope_text,
        "context": context,
        "intent": intent,
        "plan_text": plan_text,
        "feedback": dict(feedback or {}),
        "preset": preset,
        "model_digest": model_digest,
        "adapter_digest": adapter_digest,
        "edit_format": edit_format,
        "prompt_version": prompt_version,
        "settings": dict(settings),
    }
    return hashlib.sha256(canonical_json("request", request).encode("ascii")).hexdigest()


class Ledger:
    """The ledger of one user. Any number of processes and threads may use it at once.

    Args:
        path: Its file, made if missing together with its folder, readable by the user alone.
        clock: Tells the time; for tests.
        lock_timeout_s: How long to wait for another process that is writing a file.

    Raises:
        LedgerError: Damaged, not a ledger, made by a newer version, or not readable and writable.
    """

    def __init__(
        self, path: Path, *, clock: Callable[[], datetime] | None = None, lock_timeout_s: float = 30.0
    ) -> None:
        self._database = Database(path)
        self._file_lock = FileLock(path.with_name(path.name + ".lock"), timeout=lock_timeout_s, mode=0o600)
        self._clock = clock or _utc_now
        self._ids = _Ids()
        try:
            self._recover()
        except BaseException:
            self.close()
            raise

    @property
    def path(self) -> Path:
        """The ledger's file."""
        return self._database.path

    def close(self) -> None:
        """Close the file; the object cannot be used afterwards."""
        self._database.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Recording and finding

    def propose(self, proposal: Proposal) -> str:
        """Record a proposal or a refusal.

        Args:
            proposal: What was made.

        Returns:
            Its id.

        Raises:
            UsageError: A value cannot be stored, or the edits do not turn the base into the patched text.
            LedgerError: The ledger cannot be written.
        """
        _check_proposal(proposal)
        now = self._now()
        patch_id = self._ids.next("p", self._clock())
        with self._database.transaction():
            patched = None if proposal.patched is None else self._database.put_text(proposal.patched)
            row = {
                "id": patch_id,
                "created_at": now,
                "base_sha256": self._database.put_text(proposal.base),
                "patched_sha256": patched,
                **proposal_row(proposal),
            }
            self._database.insert("proposals", row)
            self._append(patch_id, proposal.outcome, {})
        return patch_id

    def find(self, key: str, *, path: Path | None = None, base_sha256: str | None = None) -> Entry | None:
        """The proposal that an identical request got before.

        Equal scopes in other files, or at other lines of this one, have equal keys too; name the file and the digest
        of its text to get a proposal whose edits fit.

        Args:
            key: What `request_key` gave.
            path: Only proposals for this file; None for any.
            base_sha256: Only proposals for this text; None for any.

        Returns:
            The latest one, or None. One that was refused, rejected or rolled back is never returned, nor is one with
            the same result.

        Raises:
            LedgerError: The ledger cannot be read.
        """
        self._recover()
        rows = self._database.rows("SELECT * FROM proposals WHERE key = ? ORDER BY id DESC", (key,))
        standings = {row["id"]: self._standing(row["id"]) for row in rows}
        unwanted = {row["patched_sha256"] for row in rows if is_unwanted(standings[row["id"]])}
        for row in rows:
            fits = (path is None or row["path_key"] == path_key(path)) and base_sha256 in (None, row["base_sha256"])
            if fits and row["patched_sha256"] not in unwanted and not is_unwanted(standings[row["id"]]):
                return self._entry(row)
        return None

    def get(self, patch_id: str) -> Entry:
        """One proposal.

        Args:
            patch_id: Its id, or the beginning of it that no other has; `p_` may be left out.

        Returns:
            The proposal with its texts and events.

        Raises:
            UsageError: No such proposal, or several.
            LedgerError: The ledger cannot be read.
        """
        self._recover()
        return self._get(patch_id)

    def list_proposals(
        self,
        *,
        path: Path | None = None,
        state: State | None = None,
        since: datetime | None = None,
        limit: int | None = 50,
        before: str | None = None,
        is_wanted: Callable[[Summary], bool] = lambda summary: True,
    ) -> list[Summary]:
        """Proposals, latest first.

        Args:
            path: Only those for this file.
            state: Only those of this state.
            since: Only those made at this time or later; a time without zone is UTC.
            limit: How many at most; None for all.
            before: Only those that were made before this one.
            is_wanted: Only those that it says yes to.

        Returns:
            One summary each.

        Raises:
            LedgerError: The ledger cannot be read.
        """
        self._recover()
        summaries: list[Summary] = []
        for row in self._latest_first(path_key(path), "" if since is None else iso_utc(since), before):
            if limit is not None and len(summaries) >= limit:
                break
            standing = self._standing(row["id"])
            summary = summary_of(row, standing)
            if (state is None or standing.state == state) and is_wanted(summary):
                summaries.append(summary)
        return summaries

    def last_applied(self, path: Path) -> Entry | None:
        """The proposal that was applied last to a file and is still in it.

        Args:
            path: The file.

        Returns:
            The proposal, or None.

        Raises:
            LedgerError: The ledger cannot be read.
        """
        return self._last(path, ("applied", "redone", "diverged"), is_applied=True)

    def last_rolled_back(self, path: Path) -> Entry | None:
        """The proposal that was rolled back last from a file and was not redone.

        Args:
            path: The file.

        Returns:
            The proposal, or None.

        Raises:
            LedgerError: The ledger cannot be read.
        """
        return self._last(path, ("rolled_back",), is_applied=False)

    def entries(self, *, since: datetime | None = None) -> Iterator[Entry]:
        """Every proposal with its texts, oldest first.

        Args:
            since: Only those made at this time or later; a time without zone is UTC.

        Yields:
            One proposal at a time.

        Raises:
            LedgerError: The ledger cannot be read.
        """
        self._recover()
        sql = "SELECT id FROM proposals WHERE created_at >= ? ORDER BY id"
        for found in self._database.rows(sql, ("" if since is None else iso_utc(since),)):
            row = self._database.row("SELECT * FROM proposals WHERE id = ?", (found["id"],))
            if row is not None:  # else pruned meanwhile
                yield self._entry(row)

    def export(self, stream: TextIO, *, fmt: str = "jsonl", since: datetime | None = None) -> int:
        """Write every proposal, oldest first.

        Args:
            stream: Where to; text in UTF-8.
            fmt: `jsonl`, one JSON object a line.
            since: Only those made at this time or later; a time without zone is UTC.

        Returns:
            How many were written.

        Raises:
            UsageError: An unknown format.
            LedgerError: The ledger cannot be read.
        """
        if fmt != "jsonl":
            raise UsageError(f"The ledger cannot be exported as {fmt!r}.", hint="Use jsonl.", format=fmt)
        count = 0
        for entry in self.entries(since=since):
            stream.write(json.dumps(entry.to_json(), ensure_ascii=False) + "\n")
            count += 1
        return count

    def add_plan(self, plan: PlanRecord) -> str:
        """Record a plan.

        Args:
            plan: The plan; its `id` and `created_at` are not looked at.

        Returns:
            Its id, `pl_` and a name that sorts by time.

        Raises:
            UsageError: A value cannot be stored.
            LedgerError: The ledger cannot be written.
        """
        plan_id = self._ids.next("pl", self._clock())
        row = {
            "id": plan_id,
            "created_at": self._now(),
            "path": stored_path(plan.path),
            "path_key": path_key(plan.path),
            "scope": storable("scope", plan.scope),
            "scope_kind": plan.scope_kind,
            "start_line": plan.start_line,
            "end_line": plan.end_line,
            "intent": storable("intent", plan.intent),
            "steps": canonical_json("steps", list(plan.steps)),
            "truncated": int(plan.truncated),
            "model": plan.model,
            "timings": canonical_json("timings", dict(plan.timings)),
        }
        with self._database.transaction():
            self._database.insert("plans", row | {"base_sha256": self._database.put_text(plan.base)})
        return plan_id

    def get_plan(self, plan_id: str) -> PlanRecord:
        """One plan.

        Args:
            plan_id: Its id, or the beginning of it that no other has; `pl_` may be left out.

        Returns:
            The plan.

        Raises:
            UsageError: No such plan, or several, or it was forgotten.
            LedgerError: The ledger cannot be read.
        """
        row = self._row_of("plans", "plan", "pl_", plan_id)
        if row["scope_kind"] == FORGOTTEN:
            raise UsageError(f"{row['id']} was forgotten.", hint="Plan again.", plan_id=row["id"])
        return PlanRecord(
            path=None if row["path"] is None else Path(row["path"]),
            base=self._database.text(row["base_sha256"]),
            steps=tuple(json.loads(row["steps"])),
            truncated=bool(row["truncated"]),
            timings=json.loads(row["timings"]),
            **{
                name: row[name]
                for name in ("scope", "scope_kind", "start_line", "end_line", "intent", "model", "id", "created_at")
            },
        )

    # Writing files

    def apply(self, patch_id: str, hunks: Iterable[int] | None = None) -> Applied:
        """Write a proposal to its file on disk.

        One that is recorded as applied is written anew if the file is the proposal's base again, byte for byte: that it
        was taken out by other means is recorded first.

        Args:
            patch_id: The proposal.
            hunks: Indices of its edits; None for all.

        Returns:
            What was written.

        Raises:
            UsageError: No such proposal or hunks, or it was refused, rejected, or made for pasted code.
            StaleTextError: The file's text is not the proposal's base.
            PathError: The file is missing.
            WriteError: The file cannot be written; it is as it was.
            LedgerError: The ledger cannot be written.
        """
        with self._writing_files():
            entry = self._get(patch_id)
            path = _path_on_disk(entry)
            if entry.state in (*NEVER_OFFERED, State.REJECTED):
                raise wrong_state(entry, "cannot be applied", "Ask for a new patch.")
            if entry.standing.is_applied:
                self._note_taken_out(entry, path)
            target = entry.applied_text(hunks).to_bytes()
            _check_is_base(entry, path)
            chosen = chosen_hunks(entry, hunks)
            return self._write(entry, "apply", chosen, sha256_hex(entry.proposal.base), target)

    def rollback(self, patch_id: str) -> Applied:
        """Take a proposal's hunks out of its file on disk. Edits elsewhere in the file stay.

        Where all of them are out already, by version control or by hand, that is recorded and nothing is written.

        Args:
            patch_id: The proposal.

        Returns:
            What was done.

        Raises:
            UsageError: No such proposal, or it is not applied.
            StaleTextError: A hunk was edited since; `details["hunks"]` shows each one three ways. Nothing is written.
            PathError: The file is missing.
            SourceError: The file became something that is no UTF-8 text.
            WriteError: The file cannot be written; it is as it was.
            LedgerError: The ledger cannot be written.
        """
        return self._turn(patch_id, "rollback")

    def redo(self, patch_id: str) -> Applied:
        """Put a rolled back proposal's hunks into its file again; where they are in it already, that is recorded.

        Args:
            patch_id: The proposal.

        Returns:
            What was done.

        Raises:
            UsageError: No such proposal, or it was not rolled back.
            StaleTextError: The lines were edited since; `details["hunks"]` shows each one three ways. Nothing is
                written.
            PathError: The file is missing.
            SourceError: The file became something that is no UTF-8 text.
            WriteError: The file cannot be written; it is as it was.
            LedgerError: The ledger cannot be written.
        """
        return self._turn(patch_id, "redo")

    def plan_rollback(self, patch_id: str, current: Source) -> list[Edit]:
        """The edits that take a proposal out of an editor's text; `record("rolled_back")` when they were made.

        Args:
            patch_id: The proposal.
            current: The editor's text.

        Returns:
            Edits of the current text.

        Raises:
            UsageError: No such proposal, or it is not applied.
            StaleTextError: A hunk was edited since; `details["hunks"]` shows each one three ways.
        """
        return self._turned(self.get(patch_id), "rollback", current).edits

    def plan_redo(self, patch_id: str, current: Source) -> list[Edit]:
        """The edits that put a rolled back proposal into an editor's text; `record("redone")` when they were made.

        Args:
            patch_id: The proposal.
            current: The editor's text.

        Returns:
            Edits of the current text.

        Raises:
            UsageError: No such proposal, or it was not rolled back.
            StaleTextError: The lines were edited since; `details["hunks"]` shows each one three ways.
        """
        return self._turned(self.get(patch_id), "redo", current).edits

    def holds(self, patch_id: str, current: Source, hunks: Iterable[int] | None = None) -> bool:
        """Whether a text has a proposal's hunks in it, whatever is recorded.

        Args:
            patch_id: The proposal.
            current: The text.
            hunks: Indices of its edits; None for all.

        Returns:
            Whether every hunk is found as the patch leaves it.

        Raises:
            UsageError: No such proposal or hunks.
        """
        entry = self.get(patch_id)
        return _fits(entry, chosen_hunks(entry, hunks), "rollback", current.to_bytes())

    # Verdicts

    def accept(self, patch_id: str, *, reason: str = "", final_text: bytes | None = None) -> None:
        """Record that the user accepts a proposal.

        Args:
            patch_id: The proposal.
            reason: Why, if the user said.
            final_text: The file's text when the user changed the patch before accepting it.

        Raises:
            UsageError: No such proposal, or it was refused, rolled back, or diverged.
            LedgerError: The ledger cannot be written.
        """
        with self._adding_to(patch_id) as entry:
            if entry.state in (*NEVER_OFFERED, State.ROLLED_BACK, State.DIVERGED):
                raise wrong_state(entry, "cannot be accepted", "Accept a patch that is in the file as it was proposed.")
            text = None if final_text is None else self._database.put_text(final_text)
            self._append(entry.id, "accepted", {"reason": reason} if reason else {}, text)

    def reject(self, patch_id: str, *, reason: str = "") -> None:
        """Record that the user rejects a proposal. The file stays as it is: `rollback` takes a patch out.

        Args:
            patch_id: The proposal.
            reason: Why, if the user said.

        Raises:
            UsageError: No such proposal, or it was refused.
            LedgerError: The ledger cannot be written.
        """
        with self._adding_to(patch_id) as entry:
            if entry.state in NEVER_OFFERED:
                raise wrong_state(entry, "cannot be rejected", "It was never offered.")
            self._append(entry.id, "rejected", {"reason": reason} if reason else {})

    def label(
        self, patch_id: str, label: Literal["accepted", "rejected"], *, reason: str, final_text: bytes | None = None
    ) -> None:
        """Record what the user's later doings say about a proposal. An explicit verdict stays stronger.

        Args:
            patch_id: The proposal.
            label: What they say.
            reason: How it is known, such as `kept 10 minutes` or `undone`.
            final_text: The file's text when the user changed the patch before keeping it.

        Raises:
            UsageError: No such proposal, or it was refused.
            LedgerError: The ledger cannot be written.
        """
        with self._adding_to(patch_id) as entry:
            if entry.state in NEVER_OFFERED:
                raise wrong_state(entry, "cannot be labelled", "It was never offered.")
            text = None if final_text is None else self._database.put_text(final_text)
            self._append(entry.id, "label", {"label": label, "reason": reason}, text)

    def record(
        self,
        patch_id: str,
        kind: Literal["applied", "apply_failed", "diverged", "rolled_back", "redone"],
        *,
        hunks: Iterable[int] | None = None,
        **data: Any,
    ) -> None:
        """Record what happened in an editor. Files on disk are recorded by `apply`, `rollback` and `redo` themselves.

        Args:
            patch_id: The proposal.
            kind: What happened.
            hunks: Indices of the edits applied; None for all, or for those that were applied before.
            **data: More facts, JSON-serialisable.

        Raises:
            UsageError: No such proposal or hunks, or it was refused.
            LedgerError: The ledger cannot be written.
        """
        with self._adding_to(patch_id) as entry:
            if entry.state in NEVER_OFFERED:
                raise wrong_state(entry, f"cannot be {kind}", "It was never offered.")
            if hunks is None and kind in ("rolled_back", "redone"):
                hunks = entry.standing.hunks or None
            facts = {"via": "editor", "hunks": list(chosen_hunks(entry, hunks)), **data}
            self._append(entry.id, kind, facts)

    # Retention

    def prune(self, *, max_age_days: float = 30, max_bytes: int = 500_000_000) -> Pruned:
        """Remove what is old, then the oldest until the rest fits.

        A proposal's age counts from its last event. To make room, those that are in no file go first; an applied one
        goes only when nothing else is left to remove, since it cannot be rolled back afterwards.

        Args:
            max_age_days: Older ones go, applied or not.
            max_bytes: Size of the pages in use.

        Returns:
            What was removed and what is left.

        Raises:
            LedgerError: The ledger cannot be written.
        """
        with self._writing_files():
            with self._database.transaction():
                removed = self._remove_older_than(iso_utc(self._clock() - timedelta(days=max_age_days)))
                removed += self._remove_until(max_bytes)
            self._database.give_back_space()
            num_plans = sum(name.startswith("pl_") for name in removed)
            return Pruned(len(removed) - num_plans, num_plans, self._database.used_bytes())

    # Forgetting

    def find_forgettable(self, which: Forgettable) -> Matches:
        """What `forget` would remove the texts of.

        Args:
            which: A file, a folder or a time.

        Returns:
            Proposals and plans, and the words by which other files can be searched for them.

        Raises:
            LedgerError: The ledger cannot be read.
        """
        return find_matches(self._database, which)

    def forget(self, which: Forgettable) -> Matches:
        """Remove texts, paths, intents, plans and diffs of some proposals and plans for good.

        It is the one exception to append-only. Of each row its id, its times and the kinds of its events stay. What was
        deleted is overwritten, the write-ahead log emptied and the file written anew, also if nothing matches: a
        process that was killed in the middle may have left that undone.

        Args:
            which: A file, a folder or a time.

        Returns:
            What was forgotten.

        Raises:
            LedgerError: Another process holds the ledger or a file of it, or the disk is full. Calling this again ends
                what was begun.
        """
        with self._writing_files():
            with self._database.transaction():
                matches = find_matches(self._database, which)
                entomb(self._database, matches, self._now())
                self._database.delete_unused_texts()
            self._database.write_anew()
        return matches

    def last_events(self) -> dict[str, int]:
        """The number of every proposal's last event, so that a reader can tell what changed since it looked.

        Returns:
            Event number by proposal, in the order of their ids; forgotten proposals are left out.

        Raises:
            LedgerError: The ledger cannot be read.
        """
        self._recover()
        sql = """SELECT patch_id, max(seq) AS last FROM events JOIN proposals ON proposals.id = patch_id
            WHERE scope_kind != ? GROUP BY patch_id ORDER BY patch_id"""
        return {row["patch_id"]: row["last"] for row in self._database.rows(sql, (FORGOTTEN,))}

    def problems(self) -> list[str]:
        """What a check of the whole ledger finds.

        Returns:
            Nothing for a sound ledger.

        Raises:
            LedgerError: The ledger cannot be read at all.
        """
        return self._database.problems()

    # Mechanics

    @contextmanager
    def _writing_files(self) -> Generator[None, None, None]:
        """Alone among all processes, with nothing left open by one that was killed."""
        try:
            self._take_file_lock(self._file_lock.timeout)
        except Timeout as error:
            raise LedgerError(
                f"Another PlanPatch process has held {error.lock_file} for {self._file_lock.timeout:g} s.",
                hint="Wait for it, or stop it, and try again.",
                path=str(self.path),
            ) from error
        try:
            self._settle_pending()
            yield
        finally:
            self._file_lock.release()

    def _recover(self) -> None:
        """Record what a killed process did, if one was killed while writing."""
        if self._pending() is None:
            return
        try:
            self._take_file_lock(min(_RECOVERY_TIMEOUT_S, self._file_lock.timeout))
        except Timeout:  # it lives, and will record the end itself
            return
        try:
            self._settle_pending()
        finally:
            self._file_lock.release()

    @contextmanager
    def _adding_to(self, patch_id: str) -> Generator[Entry, None, None]:
        """A proposal that stays as it is until something is added; else it could be forgotten in between."""
        self._recover()
        with self._database.transaction():
            yield self._get(patch_id)

    def _take_file_lock(self, timeout_s: float) -> None:
        try:
            self._file_lock.acquire(timeout_s)  # pyright: ignore[reportUnknownMemberType]
        except Timeout:  # an OSError too
            raise
        except OSError as error:
            raise LedgerError(
                f"{self._file_lock.lock_file} cannot be locked: {error.strerror or error}.",
                hint="Make the ledger's folder writable, or set PLANPATCH_HOME to another folder.",
                path=str(self.path),
            ) from error

    def _pending(self) -> tuple[str, Event] | None:
        """A write that was begun and not recorded as ended. The lock lets one at a time begin, so it is the last."""
        row = self._database.row("SELECT * FROM events WHERE kind = 'applying' ORDER BY seq DESC LIMIT 1")
        if row is None:
            return None
        marks = ", ".join("?" * len(_CLOSING_KINDS))
        sql = f"SELECT 1 FROM events WHERE patch_id = ? AND seq > ? AND kind IN ({marks})"
        if self._database.row(sql, (row["patch_id"], row["seq"], *_CLOSING_KINDS)):
            return None
        return row["patch_id"], event_of(row)

    def _settle_pending(self) -> None:
        pending = self._pending()
        if pending is not None:
            patch_id, event = pending
            remove_leftovers(Path(os.path.realpath(event.data["path"])).parent)
            self._settle(self._get(patch_id), event, "the process ended before this was recorded")

    def _settle(self, entry: Entry, applying: Event, reason: str) -> None:
        """Record how a write ended, from what is in the file."""
        operation: Operation = applying.data["operation"]
        kind = self._what_happened(entry, applying, operation)
        facts = {"via": "disk", "operation": operation, "hunks": applying.data["hunks"], "reason": reason}
        self._append(entry.id, kind, facts)

    def _what_happened(self, entry: Entry, applying: Event, operation: Operation) -> str:
        try:
            data = Path(applying.data["path"]).read_bytes()
        except OSError:
            return "apply_failed"
        if sha256_hex(data) == applying.data["to_sha256"]:
            return _EVENT_AFTER[operation]
        if sha256_hex(data) == applying.data["from_sha256"]:
            return "apply_failed"
        is_in, is_out = (_fits(entry, applying.data["hunks"], direction, data) for direction in ("rollback", "redo"))
        if is_in == is_out:
            return "diverged"
        happened = is_in if operation in ("apply", "redo") else is_out
        return _EVENT_AFTER[operation] if happened else "apply_failed"

    def _turn(self, patch_id: str, operation: Operation) -> Applied:
        with self._writing_files():
            entry = self._get(patch_id)
            path = _path_on_disk(entry)
            current = source_of(_bytes_on_disk(entry, path), path)
            if operation == "redo" and entry.standing.is_applied and self._is_base_again(entry, current.to_bytes()):
                self._note_turned(entry, "rollback", current)
                entry = self._get(patch_id)
            try:
                turned = self._turned(entry, operation, current)
            except StaleTextError as error:
                stands_alone = error.details["later_patch_id"] is None and not error.details["missing_patch_ids"]
                if not (stands_alone and _is_turned(entry, operation, current)):
                    raise
                return self._note_turned(entry, operation, current)
            return self._write(entry, operation, entry.standing.hunks, current.sha256, turned.source.to_bytes())

    def _is_base_again(self, entry: Entry, data: bytes) -> bool:
        """Whether an applied proposal was taken out by other means than a later proposal."""
        return data == entry.proposal.base and self._applied_later(entry) is None

    def _note_taken_out(self, entry: Entry, path: Path) -> None:
        """Record that an applied proposal is not in its file any more; else refuse to apply it twice."""
        data = _bytes_on_disk(entry, path)
        if self._is_base_again(entry, data):
            self._note_turned(entry, "rollback", source_of(data, path))
            return
        if _fits(entry, entry.standing.hunks, "rollback", data):
            raise in_file_already(entry)
        raise UsageError(
            f"{entry.id} is recorded as applied, but {path} does not hold its lines as it left them.",
            hint=f"If you took them out, planpatch ledger rollback {entry.id} records that, and planpatch ledger redo "
            f"{entry.id} puts them in again.",
            patch_id=entry.id,
            state=entry.state.value,
        )

    def _note_turned(self, entry: Entry, operation: Operation, current: Source) -> Applied:
        """Record that the user did it in another way; else the proposal could be neither rolled back nor applied."""
        hunks = entry.standing.hunks
        facts = {"via": "disk", "operation": operation, "hunks": list(hunks), "reason": "the file was so already"}
        self._append(entry.id, _EVENT_AFTER[operation], facts | {"sha256": current.sha256})
        return Applied(entry.id, _path_on_disk(entry), operation, hunks, current.sha256, was_so_already=True)

    def _turned(self, entry: Entry, operation: Operation, current: Source) -> Replanted:
        standing = entry.standing
        if operation == "rollback" and not standing.is_applied:
            raise wrong_state(entry, "is not applied", "Only an applied patch can be rolled back.")
        if operation == "redo" and (standing.is_applied or not standing.hunks):
            raise wrong_state(entry, "was not rolled back", "Only a rolled back patch can be redone.")
        try:
            return _replanted(entry, standing.hunks, operation, current)
        except StaleTextError as error:
            later = self._applied_later(entry) if operation == "rollback" else None
            missing = self._taken_out_below(entry) if operation == "redo" else []
            if later is not None:
                error.hint = f"{later} was applied to this file later: roll it back first, or change the lines by hand."
            if missing:
                first = "it first" if len(missing) == 1 else "them first, in this order"
                error.hint = (
                    f"This patch was made on top of {', '.join(missing)}: redo {first}, or change the lines by hand."
                )
            error.details |= {"patch_id": entry.id, "later_patch_id": later, "missing_patch_ids": missing}
            raise

    def _applied_later(self, entry: Entry) -> str | None:
        """Another proposal that went into the same file after this one."""
        last = None if entry.proposal.path is None else self.last_applied(entry.proposal.path)
        return None if last is None or last.id == entry.id else last.id

    def _taken_out_below(self, entry: Entry) -> list[str]:
        """Proposals that were in the file when this one was made and are not now, oldest first."""
        sql = "SELECT id FROM proposals WHERE path_key = ? AND id < ? ORDER BY id"
        made_at = entry.events[0].seq
        found: list[str] = []
        for row in self._database.rows(sql, (path_key(entry.proposal.path), entry.id)):
            events = self._events(row["id"])
            then = add_up(event for event in events if event.seq < made_at)
            if then.is_applied and not add_up(events).is_applied:
                found.append(row["id"])
        return found

    def _write(
        self, entry: Entry, operation: Operation, hunks: tuple[int, ...], from_sha256: str, data: bytes
    ) -> Applied:
        path = _path_on_disk(entry)
        done = Applied(entry.id, path, operation, hunks, sha256_hex(data))
        facts = {"operation": operation, "hunks": list(hunks), "path": str(path)}
        digests = {"from_sha256": from_sha256, "to_sha256": done.sha256}
        applying = self._append(entry.id, "applying", facts | digests)
        try:
            num_other_names = write_atomically(path, data, expected_sha256=from_sha256)
        except PlanPatchError as error:
            self._settle(entry, applying, error.message)
            raise
        after = {"via": "disk", "operation": operation, "hunks": list(hunks), "sha256": done.sha256}
        self._append(entry.id, _EVENT_AFTER[operation], after)
        return replace(done, num_other_names=num_other_names)

    def _append(self, patch_id: str, kind: str, data: Mapping[str, Any], text_sha256: str | None = None) -> Event:
        at = self._now()
        row = {
            "patch_id": patch_id,
            "at": at,
            "kind": kind,
            "data": canonical_json(kind, data),
            "text_sha256": text_sha256,
        }
        return Event(self._database.insert("events", row), at, kind, data, text_sha256)

    def _get(self, patch_id: str) -> Entry:
        return self._entry(self._row_of("proposals", "patch", "p_", patch_id))

    def _row_of(self, table: str, what: str, prefix: str, wanted: str) -> Any:
        name = wanted.strip().lower()
        name = name if name.startswith(prefix) else prefix + name
        sql = f"SELECT * FROM {table} WHERE id >= ? AND id < ? ORDER BY id LIMIT 6"
        rows = self._database.rows(sql, (name, name + "~")) if name != prefix else []
        exact = [row for row in rows if row["id"] == name]
        if len(exact or rows) == 1:
            return (exact or rows)[0]
        if rows:
            candidates = [row["id"] for row in rows]
            raise UsageError(
                f"Several ids in {self.path} begin with {wanted!r}.",
                hint=f"Name one of them in full: {', '.join(candidates)}.",
                candidates=candidates,
            )
        latest = [row["id"] for row in self._database.rows(f"SELECT id FROM {table} ORDER BY id DESC LIMIT 3")]
        raise UsageError(
            f"There is no {what} {wanted!r} in {self.path}.",
            hint=f"The latest are {', '.join(latest)}." if latest else "The ledger is empty.",
            latest=latest,
        )

    def _entry(self, row: Any) -> Entry:
        events = self._events(row["id"])
        standing = add_up(events)
        final = standing.final_text_sha256
        return Entry(
            row["id"],
            row["created_at"],
            proposal_of(row, self._database),
            events,
            standing,
            None if final is None else self._database.text(final),
        )

    def _events(self, patch_id: str) -> tuple[Event, ...]:
        rows = self._database.rows("SELECT * FROM events WHERE patch_id = ? ORDER BY seq", (patch_id,))
        return tuple(event_of(row) for row in rows)

    def _standing(self, patch_id: str) -> Standing:
        return add_up(self._events(patch_id))

    def _latest_first(self, key: str | None, since: str, before: str | None = None) -> Iterator[Any]:
        """Rows of proposals, read page by page."""
        sql = """SELECT id, created_at, path, scope, intent, surface, edits, error, model, timings FROM proposals
            WHERE id < ? AND (? IS NULL OR path_key = ?) AND created_at >= ? ORDER BY id DESC LIMIT 100"""
        before = before or "p_~"
        while rows := self._database.rows(sql, (before, key, key, since)):
            yield from rows
            before = rows[-1]["id"]

    def _last(self, path: Path, kinds: tuple[str, ...], *, is_applied: bool) -> Entry | None:
        self._recover()
        marks = ", ".join("?" * len(kinds))
        sql = f"""SELECT patch_id, max(events.seq) AS last FROM events JOIN proposals ON proposals.id = patch_id
            WHERE path_key = ? AND kind IN ({marks}) GROUP BY patch_id ORDER BY last DESC"""
        for row in self._database.rows(sql, (path_key(path), *kinds)):
            if self._standing(row["patch_id"]).is_applied == is_applied:
                return self._get(row["patch_id"])
        return None

    def _remove_older_than(self, cutoff: str) -> list[str]:
        sql = "SELECT patch_id AS id FROM events GROUP BY patch_id HAVING max(at) < ?"
        proposals = [row["id"] for row in self._database.rows(sql, (cutoff,))]
        self._database.delete_proposals(proposals)
        sql = """SELECT id FROM plans WHERE created_at < ?
            AND NOT EXISTS (SELECT 1 FROM proposals WHERE plan_id = plans.id)"""
        plans = [row["id"] for row in self._database.rows(sql, (cutoff,))]
        self._database.delete_plans(plans)
        self._database.delete_unused_texts()
        return proposals + plans

    def _remove_until(self, max_bytes: int) -> list[str]:
        removed: list[str] = []
        if self._database.used_bytes() <= max_bytes:
            return removed
        rows = self._database.rows("SELECT id, substr(id, 3) AS age FROM proposals")
        items = [(self._standing(row["id"]).is_applied, row["age"], row["id"]) for row in rows]
        items += [
            (False, row["age"], row["id"]) for row in self._database.rows("SELECT id, substr(id, 4) AS age FROM plans")
        ]
        items.sort()
        size = max(len(items) // 50, 1)
        for first in range(0, len(items), size):
            if self._database.used_bytes() <= max_bytes:
                break
            batch = [name for _, _, name in items[first : first + size]]
            self._database.delete_proposals(name for name in batch if name.startswith("p_"))
            self._database.delete_plans(name for name in batch if name.startswith("pl_"))
            self._database.delete_unused_texts()
            removed += batch
        return removed

    def _now(self) -> str:
        return iso_utc(self._clock())


class _Ids:
    """Names that sort by the time they were made, also within a microsecond of one process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = 0

    def next(self, prefix: str, now: datetime) -> str:
        with self._lock:
            self._last = max(int(now.timestamp() * 1_000_000), self._last + 1)
            time_us = self._last
        digits = [_ID_ALPHABET[time_us >> 5 * i & 31] for i in reversed(range(_NUM_TIME_DIGITS))]
        return f"{prefix}_{''.join(digits)}{''.join(secrets.choice(_ID_ALPHABET) for _ in range(_NUM_RANDOM_DIGITS))}"


def _replanted(entry: Entry, hunks: Sequence[int], operation: Operation, current: Source) -> Replanted:
    base = source_of(entry.proposal.base, entry.proposal.path)
    applied = entry.applied_text(hunks)
    places = hunks_of(entry.proposal.edits, hunks)
    if operation == "rollback":
        return replant(applied, base, [Change(place.index, place.patched, place.base) for place in places], current)
    return replant(base, applied, [Change(place.index, place.base, place.patched) for place in places], current)


def _is_turned(entry: Entry, operation: Operation, current: Source) -> bool:
    """Whether every hunk is found as the operation would leave it, between the same lines as there.

    Without the lines around it a patch that put lines beside an old one and was edited since would seem to be out.
    """
    is_rollback = operation == "rollback"
    base = source_of(entry.proposal.base, entry.proposal.path)
    lines = (base if is_rollback else entry.applied_text(entry.standing.hunks)).lines
    blocks = [
        place.base if is_rollback else place.patched for place in hunks_of(entry.proposal.edits, entry.standing.hunks)
    ]
    wider = [Range(max(0, block.start - 1), min(len(lines), block.stop + 1)) for block in blocks]
    return all(relocate(lines, current.lines, [block]) != [None] for block in wider)


def _fits(entry: Entry, hunks: Sequence[int], operation: Operation, data: bytes) -> bool:
    try:
        _replanted(entry, hunks, operation, source_of(data, entry.proposal.path))
    except PlanPatchError:
        return False
    return True


def _check_proposal(proposal: Proposal) -> None:
    """What is offered can be applied and taken back."""
    if proposal.outcome == "refused":
        return
    try:
        patched = apply_edits(source_of(proposal.base, proposal.path), proposal.edits)
        fits = bool(proposal.edits) and patched.to_bytes() == proposal.patched
    except AnchorError:
        fits = False
    if not fits:
        raise UsageError(
            f"The edits for {proposal.path or 'pasted code'} do not turn its text into the patched text.",
            hint="Ask for a new patch, and report this: it is a bug in PlanPatch.",
        )


def _bytes_on_disk(entry: Entry, path: Path) -> bytes:
    try:
        return read_bytes(path)
    except PathError as error:
        if os.path.lexists(path):
            raise
        raise PathError(
            f"{path}, the file of {entry.id}, does not exist any more.",
            hint=f"Put it back; planpatch ledger show {entry.id} --json has its `base` and `patched` text.",
            path=str(path),
            patch_id=entry.id,
        ) from error


def _check_is_base(entry: Entry, path: Path) -> None:
    found, expected = sha256_hex(_bytes_on_disk(entry, path)), sha256_hex(entry.proposal.base)
    if found != expected:
        raise StaleTextError(
            f"{path} changed since {entry.id} was proposed.",
            hint="Ask for the patch again; it will be made for the new text.",
            path=str(path),
            patch_id=entry.id,
            expected_sha256=expected,
            found_sha256=found,
        )


def _path_on_disk(entry: Entry) -> Path:
    if entry.state is State.FORGOTTEN:
        raise wrong_state(entry, "cannot be written or taken back", "Its texts were removed at your wish.")
    if entry.proposal.path is None:
        raise UsageError(
            f"{entry.id} was made for pasted code, so there is no file to write.",
            hint="Copy the patched text, or ask for a patch of a file.",
            patch_id=entry.id,
        )
    return entry.proposal.path


def _utc_now() -> datetime:
    return datetime.now(timezone.utc)
