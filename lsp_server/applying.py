"""Puts patches into documents and takes them out again, through the editor.

No edit is sent unless the document is, at that moment, the very text that the patch was proved for. And no client is
believed that it applied one: the text is waited for and compared, and what cannot be found in it is `diverged`.
Where no document is open the file on disk is written, by the ledger.

Not covered here: a file that is open in an editor which another server serves; HTTP and the command line ask those
(`running.py`), a command of this editor does not.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, cast

from engine.errors import GateError, PlanPatchError, StaleTextError, UsageError
from engine.patching.edits import Edit, replaced, replacements
from engine.patching.ledger import Ledger
from engine.patching.ledger_records import Entry, Operation, State, in_file_already, source_of
from engine.patching.proof import check_hunks
from engine.patching.scopes import find_scope
from engine.patching.source import Source
from lsp_server.code_actions import short
from lsp_server.editor import BufferEdit, Editor, EditorFault, Hunk, Severity
from lsp_server.labels import SETTLE_S, Labels
from lsp_server.open_files import OpenFile, OpenFiles, Search
from lsp_server.paths import make_private_folder
from lsp_server.reading import Reader
from lsp_server.records import Records
from lsp_server.survival import normalised
from lsp_server.targets import hunks_argument

Turn = Literal["rollback", "redo"]
Outcome = Literal["applied", "not applied", "diverged"]

CHECK_S = 3.0  # how long after an edit the client's text is waited for
TAKE_BACK, KEEP = "Take it back", "Keep it"
_MOST_HUNKS_APART = 6  # of more hunks than this not every choice is looked for
_KINDS: Mapping[Turn, Literal["rolled_back", "redone"]] = {"rollback": "rolled_back", "redo": "redone"}


class Applier:
    """See the module's docstring.

    Args:
        editor: The client.
        files: The open documents.
        records: The ledger.
        labels: Told of what is applied.
        plans: Folder for diffs and conflicts that are shown.
        on_change: Told when what a document offers has changed.
        spawn: Runs something on the event loop whose errors are shown.
        read: Reads Python and proves patches.
        check_s: How long after an edit the client's text is waited for.
    """

    def __init__(
        self,
        editor: Editor,
        files: OpenFiles,
        records: Records,
        labels: Labels,
        plans: Path,
        on_change: Callable[[OpenFile], None],
        spawn: Callable[[object], None],
        *,
        read: Reader,
        check_s: float = CHECK_S,
    ) -> None:
        self._editor = editor
        self._files = files
        self._records = records
        self._labels = labels
        self._plans = plans
        self._on_change = on_change
        self._spawn = spawn
        self._read = read
        self._check_s = check_s

    # --- for others -------------------------------------------------------------------------------------------------

    async def edit_if_open(self, operation: Operation, patch_id: str) -> dict[str, Any] | None:
        """Apply a patch, roll it back or redo it, if the client has its file open.

        Args:
            operation: What to do.
            patch_id: The proposal.

        Returns:
            `{ok, patchId, patchState, hunks, …}`, None if the file is not open.

        Raises:
            UsageError: No such proposal, or its state does not allow it.
            StaleTextError: The document is not the text that is needed.
        """
        entry = await self._records.get(patch_id)
        file = self._files.of_path(entry.proposal.path)
        if file is None:
            return None
        if operation == "apply":
            done = await self.apply(entry.id)
        else:
            done = {"hunks": list(entry.standing.hunks), **await self.turn(operation, entry.id, None)}
        if done["ok"]:
            done["sha256"] = file.source().sha256
        return done

    # --- apply ------------------------------------------------------------------------------------------------------

    async def apply(self, patch_id: str, hunks: object = None, *, confirm: bool = False) -> dict[str, Any]:
        """Put a patch into its document, or into its file where no document is open.

        Args:
            patch_id: The proposal.
            hunks: Indices of its edits; None for all.
            confirm: Have the client show it first, hunk by hunk.

        Returns:
            `{ok, patchId, patchState}`.

        Raises:
            UsageError: No such proposal or hunks, or its state does not allow it, or it is in the document already.
            StaleTextError: The document is not the text that the patch was made for.
            GateError: These hunks alone do not pass the gates.
        """
        entry = await self._records.get(patch_id)
        if entry.state in (State.REFUSED, State.REJECTED):
            raise UsageError(f"{entry.id} was {entry.state.value} and cannot be applied", hint="Ask for a new patch.")
        chosen = hunks_argument(hunks, len(entry.proposal.edits), entry.id)
        file = self._files.of_path(entry.proposal.path)
        if file is None:
            await self._records.do(lambda ledger: ledger.apply(entry.id, chosen))
            return {"ok": True, "patchId": entry.id, "patchState": "applied", "hunks": list(chosen)}
        async with file.lock:
            await self._check_can_apply(file, entry, chosen)
            base = _base(entry)
            source = self._check_is_base(file, entry)
            targets = {normalised(entry.applied_text(chosen).text): chosen}
            if confirm:
                targets |= _subset_targets(entry, chosen)
            edits = [entry.proposal.edits[index] for index in chosen]
            label = f"PlanPatch: {short(entry.proposal.intent) or entry.proposal.scope}"
            outcome, found = await self._edit(file, _buffer_edit(file, source, edits, label, confirm=confirm), targets)
            applied = await self._record(file, entry, outcome, found or chosen, confirm=confirm)
            if outcome == "applied" and len(found) < len(chosen):
                await self._prove_what_was_chosen(entry, base, found)
            return applied

    async def _check_can_apply(self, file: OpenFile, entry: Entry, chosen: tuple[int, ...]) -> None:
        """What takes a while; the text is compared afterwards, with nothing in between."""
        if entry.standing.is_applied:
            is_base = file.source().to_bytes() == entry.proposal.base
            if not is_base and await self._holds(file, entry, entry.standing.hunks):
                raise in_file_already(entry)
            self._check_is_base(file, entry)  # it was taken out by other means, such as version control
            await self._records.do(
                lambda ledger: ledger.record(entry.id, "rolled_back", reason="the text was so already")
            )
            file.watches.pop(entry.id, None)
        if len(chosen) < len(entry.proposal.edits):
            edits = [entry.proposal.edits[index] for index in chosen]
            await self._read(_check_subset, entry, _base(entry), edits)

    def _check_is_base(self, file: OpenFile, entry: Entry) -> Source:
        source = file.source()
        if source.to_bytes() != entry.proposal.base:
            raise StaleTextError(
                f"{source.path} changed since {entry.id} was proposed",
                hint="Ask for the patch again; it will be made for the new text.",
                patch_id=entry.id,
            )
        return source

    async def _record(
        self, file: OpenFile, entry: Entry, outcome: Outcome, hunks: tuple[int, ...], *, confirm: bool
    ) -> dict[str, Any]:
        """Tell the ledger what happened, and the user what they should know."""
        said = {"patchId": entry.id, "hunks": list(hunks)}
        if outcome == "applied":
            await self._records.do(lambda ledger: ledger.record(entry.id, "applied", hunks=hunks))
            await self._now_applied(file, entry.id)
            return {"ok": True, **said, "patchState": "applied"}
        file.late[entry.id] = (normalised(entry.applied_text(hunks).text), hunks)  # it may still come
        if outcome == "not applied":
            await self._records.do(lambda ledger: ledger.record(entry.id, "apply_failed", hunks=hunks, by="the editor"))
            reason = "the editor did not apply the patch"
            if not confirm:
                self._editor.show_message(f"PlanPatch: {reason}", Severity.WARNING)
            return {"ok": False, **said, "patchState": "proposed", "reason": reason}
        is_in = await self._holds(file, entry, hunks)
        await self._records.do(lambda ledger: ledger.record(entry.id, "diverged", hunks=hunks, is_in=is_in))
        file.pending.pop(entry.id, None)
        if is_in:
            self._labels.watch(file, await self._records.get(entry.id))
            self._labels.did_change(file)
        self._on_change(file)
        self._spawn(self._offer_inverse(file, entry, is_in=is_in))
        reason = "after applying, the editor's text is not what the patch makes of it"
        return {"ok": False, **said, "patchState": "diverged", "reason": reason}

    async def _holds(self, file: OpenFile, entry: Entry, hunks: tuple[int, ...]) -> bool:
        """Whether a document has the hunks in it, among whatever else became of it."""
        try:
            source = file.source()
        except PlanPatchError:
            return False
        return await self._records.do(lambda ledger: ledger.holds(entry.id, source, hunks))

    async def _prove_what_was_chosen(self, entry: Entry, base: Source, hunks: tuple[int, ...]) -> None:
        """The user left hunks out in the client's preview: what is left is another patch, and must pass every gate."""
        try:
            edits = [entry.proposal.edits[index] for index in hunks]
            await self._read(_check_subset, entry, base, edits)
        except GateError as error:
            question = f"PlanPatch: {error.message}."
            if await self._editor.ask(question, [TAKE_BACK, KEEP]) == TAKE_BACK:
                self._spawn(self.turn("rollback", entry.id, None))

    async def _now_applied(self, file: OpenFile, patch_id: str) -> None:
        entry = await self._records.get(patch_id)
        file.pending.pop(patch_id, None)
        file.late.pop(patch_id, None)
        self._labels.watch(file, entry)
        self._labels.did_change(file)  # the user may have undone it meanwhile
        await self._labels.recall_history(file)
        self._on_change(file)

    async def _offer_inverse(self, file: OpenFile, entry: Entry, *, is_in: bool) -> None:
        """Offer to take back what can be found in the text; else say what is known."""
        if is_in:
            question = "PlanPatch: after applying, the text is not what the patch makes of it."
            if await self._editor.ask(question, [TAKE_BACK, KEEP]) == TAKE_BACK:
                self._spawn(self.turn("rollback", entry.id, None))
            return
        is_untouched = file.text == normalised(_base(entry).text)
        fault = "its text did not change" if is_untouched else "the patch is not found in its text; look at it"
        message = f"PlanPatch: the editor said that it applied the patch, but {fault}"
        self._editor.show_message(message, Severity.WARNING)

    def did_change(self, file: OpenFile) -> None:
        """Look for what is waited for in a document's new text."""
        text = file.text
        is_sought = file.search is not None and text in file.search.targets
        if file.search is not None:
            file.search.look(text)
        for patch_id, (target, hunks) in list(file.late.items()):
            if text == target and not is_sought:
                del file.late[patch_id]
                self._spawn(self._applied_late(file, patch_id, hunks))
        file.changed.set()

    async def settle(self) -> None:
        """The client goes away: record the edits that it made; those that no document shows are given up."""
        for file in self._files:
            if file.lock.locked() and (file.search is None or file.search.found is not None):
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(file.lock.acquire(), SETTLE_S)

    async def _applied_late(self, file: OpenFile, patch_id: str, hunks: tuple[int, ...]) -> None:
        await self._records.do(lambda ledger: ledger.record(patch_id, "applied", hunks=hunks, late=True))
        await self._now_applied(file, patch_id)

    # --- roll back and redo -----------------------------------------------------------------------------------------

    async def turn(self, turn: Turn, patch_id: str | None, path: Path | None) -> dict[str, Any]:
        """Roll a patch back or redo it: through the editor where the file is open, else on disk.

        Args:
            turn: What to do.
            patch_id: The proposal; None for the last one of the file.
            path: The file, where no proposal is named.

        Returns:
            `{ok, patchId, patchState}`.

        Raises:
            UsageError: There is nothing to do, or the proposal's state does not allow it.
            StaleTextError: A hunk was edited since; both sides and the base are shown.
        """
        entry = await self._entry(turn, patch_id, path)
        file = self._files.of_path(entry.proposal.path)
        if file is not None:
            await self._labels.recall_history(file)  # another process may have changed what the menu shows
        if file is None:
            on_disk = Ledger.rollback if turn == "rollback" else Ledger.redo
            await self._records.do(lambda ledger: on_disk(ledger, entry.id))
            return {"ok": True, "patchId": entry.id, "patchState": _KINDS[turn]}
        async with file.lock:
            try:
                return await self._turn_in_editor(turn, entry, file)
            except StaleTextError as error:
                await self._show_conflict(entry, error)
                raise

    async def _entry(self, turn: Turn, patch_id: str | None, path: Path | None) -> Entry:
        if patch_id:
            return await self._records.get(patch_id)
        if path is None:
            raise UsageError("The argument has neither `patchId` nor the `uri` of a file")
        find = Ledger.last_applied if turn == "rollback" else Ledger.last_rolled_back
        entry = await self._records.do(lambda ledger: find(ledger, path))
        if entry is None:
            what = "applied patch to roll back" if turn == "rollback" else "rolled back patch to redo"
            raise UsageError(f"{path} has no {what}", hint="planpatch ledger list shows what there is.")
        return entry

    async def _turn_in_editor(self, turn: Turn, entry: Entry, file: OpenFile) -> dict[str, Any]:
        kind, done = _KINDS[turn], {"ok": True, "patchId": entry.id, "patchState": _KINDS[turn]}
        if await self._is_turned(turn, entry, file):
            file.watches.pop(entry.id, None)
            file.late.pop(entry.id, None)
            await self._records.do(lambda ledger: ledger.record(entry.id, kind, reason="the text was so already"))
            await self._after_turn(turn, file, entry.id)
            return {**done, "wasSoAlready": True}
        source = file.source()
        find = Ledger.plan_rollback if turn == "rollback" else Ledger.plan_redo
        edits = await self._records.do(lambda ledger: find(ledger, entry.id, source))
        if file.source().to_bytes() != source.to_bytes():
            raise StaleTextError(f"{source.path} changed just now", hint="Try again.")
        turned = "roll back" if turn == "rollback" else "redo"
        label = f"PlanPatch: {turned}: {short(entry.proposal.intent) or entry.id}"
        target = replaced(source.text, replacements(source, edits))
        edit = _buffer_edit(file, source, edits, label, confirm=False)
        outcome, _ = await self._edit(file, edit, {normalised(target): ()})
        if outcome != "applied":
            what = f"did not {turned} the patch" if outcome == "not applied" else f"has another text after the {turned}"
            self._editor.show_message(f"PlanPatch: the editor {what}; look at the file", Severity.WARNING)
            return {
                "ok": False,
                "patchId": entry.id,
                "patchState": entry.state.value,
                "reason": f"the editor {what}",
            }
        file.watches.pop(entry.id, None)  # before anything is awaited: this is no turn by the user
        file.late.pop(entry.id, None)
        await self._records.do(lambda ledger: ledger.record(entry.id, kind))
        await self._after_turn(turn, file, entry.id)
        return done

    async def _is_turned(self, turn: Turn, entry: Entry, file: OpenFile) -> bool:
        """Whether the text is so already: it was done by other means, such as version control or undo."""
        if turn == "rollback":
            return entry.standing.is_applied and file.text == normalised(_base(entry).text)
        is_out = not entry.standing.is_applied and bool(entry.standing.hunks)
        return is_out and await self._holds(file, entry, entry.standing.hunks)

    async def _after_turn(self, turn: Turn, file: OpenFile, patch_id: str) -> None:
        if turn == "redo":
            await self._now_applied(file, patch_id)
        else:
            self._labels.watch(file, await self._records.get(patch_id))  # the editor's undo puts it in again
            self._labels.did_change(file)
        await self._labels.recall_history(file)
        self._on_change(file)

    async def _show_conflict(self, entry: Entry, error: StaleTextError) -> None:
        """The hunks that were edited since, each three ways."""
        lines = [f"# {error.message}", "", error.hint, ""]
        for hunk in cast("Sequence[Mapping[str, Any]]", error.details.get("hunks") or ()):
            if not hunk["found"]:
                lines += [f"## Near line {hunk['start_line']}", "", "````python", hunk["view"].rstrip("\n"), "````", ""]
        file = await self.show(f"{entry.id}.conflict.md", "\n".join(lines))
        self._editor.show_message(f"PlanPatch: {file} shows the lines that were looked for", Severity.INFO)

    async def show(self, name: str, text: str) -> Path:
        """Open a text of ours in the editor, where it opens files.

        Args:
            name: Its file's name.
            text: What it says.

        Returns:
            The file.

        Raises:
            WriteError: It cannot be written.
        """
        file = (await asyncio.to_thread(make_private_folder, self._plans)) / name
        await asyncio.to_thread(file.write_bytes, text.encode("utf-8"))
        if self._editor.profile.has_show_document:
            await self._editor.show_document(file)
        return file

    # --- editing a document -----------------------------------------------------------------------------------------

    async def _edit(
        self, file: OpenFile, edit: BufferEdit, targets: Mapping[str, tuple[int, ...]]
    ) -> tuple[Outcome, tuple[int, ...]]:
        """Send an edit and see what the document becomes: one of the targets, with its hunks, or something else."""
        before = file.text
        file.search = search = Search(targets)
        try:
            try:
                is_said_applied = await self._editor.apply_edit(edit)
            except EditorFault as fault:
                self._editor.show_message(f"PlanPatch: the editor refused the edit: {fault}", Severity.WARNING)
                is_said_applied = False
            deadline = time.monotonic() + (self._check_s if is_said_applied else 0.0)
            while search.found is None and self._is_open(file):
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    break
                file.changed.clear()
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(file.changed.wait(), left_s)
        finally:
            file.search = None
        if search.found is not None:
            return "applied", search.found
        return ("not applied" if not is_said_applied and file.text == before else "diverged"), ()

    def _is_open(self, file: OpenFile) -> bool:
        return self._files.get(file.document.uri) is file


def _buffer_edit(file: OpenFile, source: Source, edits: Sequence[Edit], label: str, *, confirm: bool) -> BufferEdit:
    document, shift = file.document, 1 if source.bom else 0
    hunks = [
        Hunk(document.position(part.start + shift), document.position(part.end + shift), part.text, label)
        for part in replacements(source, edits)
    ]
    return BufferEdit(document.uri, document.version, hunks, label, confirm)


def _check_subset(entry: Entry, base: Source, edits: Sequence[Edit]) -> None:
    """A part of a patch is another patch: every gate must pass it too."""
    proposal = entry.proposal
    scope = find_scope(base, proposal.scope, proposal.start_line) if proposal.scope else find_scope(base)
    check_hunks(base, scope, edits, proposal.imports, entry.id)


def _subset_targets(entry: Entry, chosen: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The texts that the user may choose in a preview, hunk by hunk."""
    sizes = (1, len(chosen) - 1) if len(chosen) > _MOST_HUNKS_APART else range(1, len(chosen))
    parts = [part for size in sizes for part in combinations(chosen, size)]
    return {normalised(entry.applied_text(part).text): part for part in parts}


def _base(entry: Entry) -> Source:
    return source_of(entry.proposal.base, entry.proposal.path)
