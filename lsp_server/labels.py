"""Watches applied patches in open documents and tells the ledger what became of them (survival.py has the rule)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

from engine.errors import PlanPatchError, UsageError
from engine.patching.ledger_records import UNDONE, Entry, State
from lsp_server.code_actions import short
from lsp_server.open_files import OpenFile, OpenFiles
from lsp_server.reading import Reader
from lsp_server.records import Records
from lsp_server.survival import KEPT_AT_SAVE_S, KEPT_S, Watch, accept

SETTLE_S = 2.0  # how long the end waits for what is being recorded
_MOST_RECALLED = 50


class Labels:
    """See the module's docstring.

    Args:
        files: The open documents.
        records: The ledger.
        clock: Seconds that only grow.
        spawn: Runs something on the event loop whose errors are shown.
        tells_save_reason: Whether the client says before a save why it saves.
        read: Reads Python.
    """

    def __init__(
        self,
        files: OpenFiles,
        records: Records,
        clock: Callable[[], float],
        spawn: Callable[[object], None],
        *,
        tells_save_reason: bool,
        read: Reader,
    ) -> None:
        self._files = files
        self._records = records
        self._clock = clock
        self._spawn = spawn
        self._tells_save_reason = tells_save_reason
        self._read = read
        self._num_noting = 0
        self._noted = asyncio.Event()

    async def settle(self) -> None:
        """The client goes away: wait until the ledger knows what undo and redo did to the texts."""
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._all_noted(), SETTLE_S)

    async def _all_noted(self) -> None:
        while self._num_noting:
            self._noted.clear()
            await self._noted.wait()

    async def recall(self, file: OpenFile) -> None:
        """What the ledger knows of a file that was opened: patches to watch and to roll back."""
        path = file.path
        if path is None:
            return
        summaries = await self._records.do(lambda ledger: ledger.list_proposals(path=path, limit=_MOST_RECALLED))
        for summary in reversed(summaries):
            entry = await self._records.get(summary.id)
            if entry.standing.hunks and summary.id not in file.watches:  # it is, or was, in the file
                self.watch(file, entry)
        self.did_change(file)  # it may have been taken out while nobody watched
        await self.recall_history(file)

    async def recall_history(self, file: OpenFile) -> None:
        """What can be rolled back and redone, for the menu."""
        path = file.path
        if path is None:
            return
        applied = await self._records.do(lambda ledger: ledger.last_applied(path))
        rolled_back = await self._records.do(lambda ledger: ledger.last_rolled_back(path))
        file.applied = None if applied is None else (applied.id, _what_for(applied))
        file.rolled_back = None if rolled_back is None else (rolled_back.id, _what_for(rolled_back))

    def watch(self, file: OpenFile, entry: Entry) -> None:
        """Watch a patch that is in a document's text from now on."""
        file.watches.pop(entry.id, None)  # the latest stand last
        file.watches[entry.id] = Watch.of(entry, self._clock())

    def did_change(self, file: OpenFile) -> None:
        """Notice the editor's own undo and redo, of applies and of roll-backs.

        Where several patches have the same result, only the latest is put in again.
        """
        text = file.text
        held = {watch.patched for watch in file.watches.values() if not watch.is_undone and not watch.turned(text)}
        for watch in reversed(list(file.watches.values())):
            finding = watch.turned(text)
            if finding is None or (finding == "redone" and watch.patched in held):
                continue
            if finding == "redone":
                held.add(watch.patched)
            watch.is_undone = finding == "undone"
            watch.applied_at = self._clock()
            if watch.is_undone and file.applied is not None and file.applied[0] == watch.patch_id:
                file.applied, file.rolled_back = None, file.applied  # until the ledger is asked
            self._num_noting += 1
            self._spawn(self._note_and_count(file, watch))

    async def _note_and_count(self, file: OpenFile, watch: Watch) -> None:
        try:
            await self._note_turned(file, watch)
        finally:
            self._num_noting -= 1
            self._noted.set()

    async def _note_turned(self, file: OpenFile, watch: Watch) -> None:
        """Tell the ledger where the patch is now; of several turns in a row the last one counts."""
        async with file.lock:
            if file.watches.get(watch.patch_id) is not watch:
                return  # it was rolled back or redone by command meanwhile, which told the ledger
            entry = await self._records.get(watch.patch_id)
            if entry.state is State.FORGOTTEN:
                del file.watches[watch.patch_id]
                return
            is_undone = watch.is_undone
            if entry.standing.is_applied is is_undone:  # else it says so already: an earlier turn, or another process
                kind, reason = ("rolled_back", UNDONE) if is_undone else ("redone", "redone in the editor")
                await self._records.do(lambda ledger: ledger.record(watch.patch_id, kind, reason=reason))
            await self.recall_history(file)

    def will_save(self, file: OpenFile, *, is_manual: bool) -> None:
        """Remember why the next save happens."""
        file.save_is_manual = is_manual

    def did_save(self, file: OpenFile) -> None:
        """A save by hand may accept patches; a client that never gives a reason saves by hand alone."""
        is_manual = not self._tells_save_reason if file.save_is_manual is None else file.save_is_manual
        file.save_is_manual = None
        if is_manual:
            self._spawn(self._judge(file, KEPT_AT_SAVE_S, "kept at a save by hand"))

    async def tick(self) -> None:
        """Accept what was kept long enough."""
        for file in self._files:
            await self._judge(file, KEPT_S, "kept for 10 minutes")

    async def _judge(self, file: OpenFile, least_s: float, reason: str) -> None:
        """Label the patches of a document that are old enough; a patch that waits for review comes first."""
        now = self._clock()
        due = [
            one
            for one in file.watches.values()
            if not (one.is_undone or one.is_settled) and now - one.applied_at >= least_s
        ]
        if not due or file.offered():
            return
        try:
            source = file.source()
        except PlanPatchError:
            return  # it cannot be read now, and may be later
        for watch in due:
            finding = await self._read(watch.judge, source)
            if finding in ("kept", "changed"):
                final = source.to_bytes() if finding == "changed" else None
                why = f"{reason}, changed by the user" if finding == "changed" else reason
                with suppress(UsageError):  # it was forgotten, or dropped by age
                    await self._records.do(
                        lambda ledger, one=watch, text=final, said=why: ledger.label(
                            one.patch_id, "accepted", reason=said, final_text=text
                        )
                    )
            watch.is_settled = finding != "undone"

    async def accept(self, patch_id: str, reason: str) -> None:
        """Record that the user accepts a patch: as the editor has it now, where they changed it there."""
        text = await self._changed_text(patch_id)
        if text is None:
            await self._records.do(lambda ledger: accept(ledger, patch_id, reason=reason))
        else:
            await self._records.do(lambda ledger: ledger.accept(patch_id, reason=reason, final_text=text))

    async def _changed_text(self, patch_id: str) -> bytes | None:
        """The document's bytes where the patch's function is another there by now; None where it is not open."""
        for file in self._files:
            watch = file.watches.get(patch_id)
            if watch is None or watch.is_undone or watch.has_diverged:
                continue
            with suppress(PlanPatchError):  # a text that cannot be read now: what was applied is accepted
                source = file.source()
                return source.to_bytes() if await self._read(watch.judge, source) == "changed" else None
        return None


def _what_for(entry: Entry) -> str:
    """What a patch was for and where, as the menu says it."""
    intent, scope = short(entry.proposal.intent), entry.proposal.scope
    return f"{intent or entry.id} in `{scope}`" if scope else intent
