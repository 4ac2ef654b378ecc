"""The editor applies a patch and quits at once, as with `:wq` right after "Apply": the ledger still learns of it.

Found with a real Neovim, where the ledger sometimes said `proposed` of a patch that was saved.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from engine.patching.ledger import Ledger
from lsp_server.editor import BufferEdit
from lsp_server.paths import Paths
from lsp_server.settings import Settings
from lsp_server.uris import path_of, uri_of
from lsp_server.workbench import Workbench
from tests.fake_editor import Buffer, FakeEditor, ReadyModel
from tests.scripted_engine import ScriptedEngine

TEXT = "def add(a, b):\n    return a - b\n"
FIXED = "def add(a, b):\n    return a + b\n"


class SlowLedger(Ledger):
    """On a slow disk."""

    def record(self, *arguments: Any, **options: Any) -> Any:
        time.sleep(0.1)
        return super().record(*arguments, **options)


def test_a_patch_that_the_editor_applied_before_it_quit_is_recorded(tmp_path: Path) -> None:
    assert asyncio.run(state_after_quitting(tmp_path, has_applied=True)) == (FIXED, "applied", True)


def test_an_edit_that_the_editor_never_made_is_not_waited_for(tmp_path: Path) -> None:
    started = time.monotonic()
    assert asyncio.run(state_after_quitting(tmp_path, has_applied=False)) == (TEXT, "proposed", False)
    assert time.monotonic() - started < 20  # the edit is never answered


async def state_after_quitting(folder: Path, *, has_applied: bool) -> tuple[str, str, bool]:
    paths = Paths(folder, folder / "none.toml")
    editor = FakeEditor()
    settings = Settings(apply="direct")
    engine = ScriptedEngine(lambda prompt: FIXED)
    bench = Workbench(editor, ReadyModel(engine), lambda: SlowLedger(paths.ledger), paths, lambda path: settings)
    editor.bench = bench
    uri = uri_of(folder / "add.py")
    buffer = editor.open(uri, TEXT)
    has_quit = asyncio.Event()

    async def apply_and_quit(edit: BufferEdit) -> bool:
        has_quit.set()
        return editor.apply_honestly(edit) if has_applied else await asyncio.Future()

    editor.on_apply = apply_and_quit
    await bench.patch({"uri": uri, "position": {"line": 1, "character": 0}, "intent": "add them"})
    await asyncio.wait_for(has_quit.wait(), 30)
    await bench.close()
    with Ledger(paths.ledger) as ledger:
        (entry,) = ledger.list_proposals()
    return buffer.text, entry.state.value, entry.is_applied


Take = Callable[[Workbench, FakeEditor, Buffer], Awaitable[object]]


async def by_command(bench: Workbench, editor: FakeEditor, buffer: Buffer) -> None:
    """The user rolls the patch back; it is out of the text when this returns, and not recorded yet."""
    has_turned = asyncio.Event()

    def apply(edit: BufferEdit) -> bool:
        has_turned.set()
        return editor.apply_honestly(edit)

    editor.on_apply = apply
    bench.run_as_job("rollback", "rollback", lambda: bench.applier.turn("rollback", None, path_of(buffer.uri)))
    await asyncio.wait_for(has_turned.wait(), 30)


async def by_undo(bench: Workbench, editor: FakeEditor, buffer: Buffer) -> None:
    """The user undoes the patch in the editor."""
    assert buffer.undo_once()
    editor.deliver(buffer.uri)


@pytest.mark.parametrize("closes_file", [False, True])
@pytest.mark.parametrize(("take", "state"), [(by_command, "rolled_back"), (by_undo, "rejected")])
def test_a_patch_that_was_taken_out_just_before_the_end_is_recorded(
    tmp_path: Path, take: Take, state: str, closes_file: bool
) -> None:
    assert asyncio.run(state_after_taking_out(tmp_path, take, closes_file=closes_file)) == (TEXT, state, False)


async def state_after_taking_out(folder: Path, take: Take, *, closes_file: bool) -> tuple[str, str, bool]:
    paths = Paths(folder, folder / "none.toml")
    editor = FakeEditor()
    settings = Settings(apply="direct")
    engine = ScriptedEngine(lambda prompt: FIXED)
    bench = Workbench(editor, ReadyModel(engine), lambda: SlowLedger(paths.ledger), paths, lambda path: settings)
    editor.bench = bench
    uri = uri_of(folder / "add.py")
    buffer = editor.open(uri, TEXT)
    job = await bench.patch({"uri": uri, "position": {"line": 1, "character": 0}, "intent": "add them"})
    while not (job.has_ended and bench.files[uri].applied):
        await asyncio.sleep(0.01)
    await take(bench, editor, buffer)
    if closes_file:
        bench.did_close(uri)
    await bench.close()
    with Ledger(paths.ledger) as ledger:
        (entry,) = ledger.list_proposals()
    return buffer.text, entry.state.value, entry.is_applied
