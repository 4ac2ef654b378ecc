"""Random interleavings of what users, editors, networks and power cuts do, against the real workbench and ledger.

A small model of the world says what must hold: no edit is sent for a text that the patch was not made for, an honest
editor ends with the very text that was proved, nothing outside of the function changes, and once everything is
delivered the ledger says of each patch what is in the text. The model of the code is scripted; everything else is real.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.errors import PlanPatchError
from engine.patching.ledger import Ledger
from engine.patching.ledger_records import Label, source_of
from engine.patching.scopes import list_scopes
from engine.patching.source import Source
from lsp_server.editor import BufferEdit
from lsp_server.paths import Paths
from lsp_server.settings import Settings
from lsp_server.survival import normalised
from lsp_server.uris import uri_of
from lsp_server.workbench import Workbench
from tests.fake_editor import FakeEditor, ReadyModel, edited
from tests.scripted_engine import ScriptedEngine

BASE = '''"""Emoji 🙂, a tab\tand a form feed."""
import os


def first(x):
    """One."""
    return x + 1

\f
@staticmethod
def second(x):
    def inner(y):
        return y * 2

    return inner(x)  # 한국어


class Box:
    def third(self, items):
        total = 0
        for item in items:
            total += item
        return total
'''
FUNCTIONS = {
    "first": "def first(x):\n    return x + {n}\n",
    "second": "@staticmethod\ndef second(x):\n    def inner(y):\n        return y * {n}\n\n    return inner(x)\n",
    "Box.third": "    def third(self, items):\n        return sum(items) + {n}\n",
}
CHECK_S = 0.03


class World:
    """One user with one file, a server that is restarted, and a ledger."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.folder = folder
        self.path = folder / "box.py"
        text = BASE
        if seed % 3 == 1:
            text = text.replace("\n", "\r\n")
        if seed % 4 == 1:
            text = text.rstrip("\r\n")
        self.uri = uri_of(self.path)
        self.path.write_bytes(text.encode())
        self.engine = ScriptedEngine(lambda prompt: self.answer)
        self.answer = ""
        self.now = 0.0
        self.log: list[str] = []
        self.proved: list[str] = []
        self.faults: list[str] = []
        self.editor = FakeEditor()
        self.editor.on_apply = self.on_apply
        self.editor.on_ask = lambda message, choices: self.random.choice([None, *choices])
        self.manner: Callable[[BufferEdit], Any] = self.editor.apply_honestly
        self.killed: list[Workbench] = []
        self.bench = self.start()
        self.buffer = self.editor.open(self.uri, text)

    def start(self) -> Workbench:
        paths = Paths(self.folder, self.folder / "none.toml")
        settings = Settings(apply="direct" if self.random.random() < 0.5 else "ask")
        bench = Workbench(
            self.editor,
            ReadyModel(self.engine),
            lambda: Ledger(paths.ledger),
            paths,
            lambda path: settings,
            clock=lambda: self.now,
            check_s=CHECK_S,
        )
        self.editor.bench = bench
        return bench

    # --- what is checked --------------------------------------------------------------------------------------------

    def on_apply(self, edit: BufferEdit) -> Any:
        """Every edit that is sent: its version is known, and where it is current it gives a text that was proved."""
        if edit.version == self.buffer.version:
            after = edited(self.buffer.text, edit)
            with Ledger(self.folder / "ledger.sqlite3") as ledger:
                entries = list(ledger.entries())
            known = {source_of(entry.proposal.base, None).text for entry in entries}
            known |= {entry.applied_text().text for entry in entries if entry.proposal.patched}
            if "roll back" not in edit.label and "redo" not in edit.label:
                bases = {entry.proposal.base.decode() for entry in entries if entry.proposal.patched}
                assert self.buffer.text in bases, f"an edit was sent for a text that no patch was made for: {self.log}"
                assert after in known, f"an edit gives a text that was not proved: {self.log}"
                self.check_outside(self.buffer.text, after, edit)
        return self.manner(edit)

    def check_outside(self, before: str, after: str, edit: BufferEdit) -> None:
        """Functions other than those that the hunks touch are byte for byte the same."""
        lines = [(hunk.start.line + 1, max(hunk.start.line + 1, hunk.end.line)) for hunk in edit.hunks]
        for text in (before,):
            source = Source.from_text(text, "box.py")
            for scope in list_scopes(source):
                if scope.kind == "class" or any(
                    not (last < scope.start_line or first > scope.end_line) for first, last in lines
                ):
                    continue
                exact = source.text_between(scope.start_line, scope.end_line)
                assert exact in after, f"{scope.qualname} changed: {self.log}"

    async def check_truth(self) -> None:
        """Once all is delivered and quiet, the ledger says what is in the text."""
        for wait_s in (CHECK_S * 3, 0):  # what is on its way arrives, and is reacted to
            await self.quiet()
            await asyncio.sleep(wait_s)
            self.editor.deliver(self.uri)
        await self.quiet()
        document = self.bench.files[self.uri].document
        assert document.text == self.buffer.text, f"the server has another text: {self.log}"
        assert not document.out_of_step
        now = normalised(self.buffer.text)
        with Ledger(self.folder / "ledger.sqlite3") as ledger:
            assert ledger.problems() == []
            entries = [entry for entry in ledger.entries() if entry.proposal.patched is not None]
            texts = {entry.id: normalised(entry.applied_text(entry.standing.hunks or None).text) for entry in entries}
            applied = [entry.id for entry in entries if entry.standing.is_applied]
            for entry in entries:
                kinds = [event.kind for event in entry.events]
                if entry.label is Label.ACCEPTED:
                    assert {"applied", "redone", "accepted"} & set(kinds), f"{entry.id} was never applied: {self.log}"
                is_base = now == normalised(source_of(entry.proposal.base, None).text)
                is_patched = now == texts[entry.id]
                if is_base and not is_patched:
                    assert not entry.standing.is_applied, f"{entry.id} is not in the text ({kinds}): {self.log}"
                is_anothers = any(texts[other] == now for other in applied if other != entry.id)
                if is_patched and entry.id in self.applied_here and not is_anothers:  # undone, and made once more
                    assert entry.standing.is_applied, f"{entry.id} is in the text ({kinds}): {self.log}"

    @property
    def applied_here(self) -> set[str]:
        """Patches that this very server has seen in the text; what a user types after a restart it cannot know."""
        file = self.bench.files.get(self.uri)
        return set(file.watches) if file is not None else set()

    async def quiet(self) -> None:
        """Until no job and no task of the workbench is left."""
        for _ in range(400):
            await asyncio.sleep(0.005)
            if not self.bench.jobs.running() and not self.bench._tasks:
                return
        raise AssertionError(f"the server does not come to rest: {self.log}")

    # --- what may happen --------------------------------------------------------------------------------------------

    async def step(self) -> None:
        action = self.random.choice(
            [
                *[self.patch] * 4,
                *[self.type_elsewhere] * 2,
                self.type_inside,
                *[self.undo] * 2,
                self.redo,
                self.save,
                self.roll_back,
                self.redo_patch,
                self.wait_long,
                self.restart,
                self.kill,
                self.deliver_late,
                self.apply_old,
            ]
        )
        self.log.append(action.__name__)
        try:
            await action()
        except PlanPatchError as error:
            self.log.append(error.code)
        await asyncio.sleep(0)

    async def patch(self) -> None:
        name = self.random.choice(list(FUNCTIONS))
        self.answer = FUNCTIONS[name].format(n=self.random.randrange(3, 100))
        self.manner = self.random.choice(
            [self.editor.apply_honestly] * 6 + [self.apply_late, self.lie, self.refuse, self.apply_and_type, self.deny]
        )
        self.log.append(f"{name}:{self.manner.__name__}")
        await self.bench.patch({"uri": self.uri, "function": name, "intent": self.random.choice(["a", "b"])})
        if self.random.random() < 0.7:
            await self.quiet()

    async def apply_late(self, edit: BufferEdit) -> bool:
        """The text changes, and the server hears of it after it stopped waiting."""
        if edit.version != self.buffer.version:
            return False
        self.buffer.change(edited(self.buffer.text, edit))
        asyncio.get_running_loop().call_later(CHECK_S * 2, self.editor.deliver, self.uri)
        return True

    def lie(self, edit: BufferEdit) -> bool:
        """Nothing changes, and the client says that it did."""
        return True

    def refuse(self, edit: BufferEdit) -> bool:
        return False

    def deny(self, edit: BufferEdit) -> bool:
        """The text changes, and the client says that it did not."""
        self.editor.apply_honestly(edit)
        return False

    def apply_and_type(self, edit: BufferEdit) -> bool:
        """The user types on in the same moment."""
        if edit.version != self.buffer.version:
            return False
        self.buffer.change(edited(self.buffer.text, edit))
        self.buffer.change(self.buffer.text + "# typed\n")
        self.editor.deliver(self.uri)
        return True

    async def type_elsewhere(self) -> None:
        newline = "\r\n" if "\r\n" in self.buffer.text else "\n"
        self.buffer.change(f"# note {self.random.randrange(9)} 🙂{newline}" + self.buffer.text)
        if self.random.random() < 0.8:
            self.editor.deliver(self.uri)

    async def type_inside(self) -> None:
        self.buffer.change(self.buffer.text.replace("return ", "return 0 + ", 1))
        self.editor.deliver(self.uri)

    async def undo(self) -> None:
        self.buffer.undo_once()
        self.editor.deliver(self.uri)
        if self.random.random() < 0.5:
            await self.quiet()

    async def redo(self) -> None:
        self.buffer.redo_once()
        self.editor.deliver(self.uri)

    async def save(self) -> None:
        self.editor.deliver(self.uri)
        file = self.bench.files[self.uri]
        self.bench.labels.will_save(file, is_manual=self.random.random() < 0.7)
        self.path.write_bytes(self.buffer.text.encode())
        self.bench.labels.did_save(file)

    async def roll_back(self) -> None:
        self.manner = self.editor.apply_honestly
        await self.bench.applier.turn("rollback", None, self.path)

    async def redo_patch(self) -> None:
        self.manner = self.editor.apply_honestly
        await self.bench.applier.turn("redo", None, self.path)

    async def wait_long(self) -> None:
        self.now += self.random.choice([30, 70, 700])
        await self.bench.labels.tick()

    async def deliver_late(self) -> None:
        self.editor.deliver(self.uri)

    async def apply_old(self) -> None:
        """Any proposal that there is, through the command."""
        self.manner = self.editor.apply_honestly
        summaries = await self.bench.records.do(lambda ledger: ledger.list_proposals())
        if summaries:
            await self.bench.applier.apply(self.random.choice(summaries).id)

    async def restart(self) -> None:
        await self.bench.close()
        self.bench = self.start()
        self.editor.reopen(self.uri)
        await self.quiet()

    async def kill(self) -> None:
        """As `kill -9` leaves it: whatever was on its way is gone, nothing is closed in order."""
        for task in [*self.bench._tasks, *(job.task for job in self.bench.jobs.running() if job.task)]:
            task.cancel()
        await asyncio.sleep(0)
        self.killed.append(self.bench)
        self.bench = self.start()
        self.editor.reopen(self.uri)


async def run_world(folder: Path, seed: int, num_steps: int) -> World:
    world = World(folder, seed)
    faults: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: faults.append(context))
    for _ in range(num_steps):
        await world.step()
    await world.check_truth()
    await world.bench.close()
    for bench in world.killed:  # at the very end: a killed process closes its files, this one keeps them
        bench.records.close()
    assert faults == [], (faults, world.log)
    assert [message for message in world.editor.messages if "bug in PlanPatch" in message] == [], world.log
    return world


SHARDS = 4


@pytest.mark.parametrize("shard", range(SHARDS))
def test_no_interleaving_puts_a_patch_on_another_text_or_makes_the_ledger_lie(
    shard: int, tmp_path: Path, long_run: bool, record_figure: Callable[[str, float | int | str, str], None]
) -> None:
    num_worlds, num_steps, num_applied = (600 if long_run else 12), 12, 0
    for number in range(num_worlds):
        folder = tmp_path / str(number)
        folder.mkdir()
        world = asyncio.run(run_world(folder, number * SHARDS + shard, num_steps))
        num_applied += len(world.editor.edits)
    assert num_applied > num_worlds / 2
    record_figure("random interleavings of a language server's life", num_worlds, f"of {num_steps} steps each")
    record_figure("edits sent in them", num_applied, "")
