"""The editor applies a patch and quits at once, as with `:wq` right after "Apply": the ledger still learns of it.

Found with a real Neovim, where the ledger sometimes said `proposed` of a patch that was saved.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

from engine.patching.ledger import Ledger
from lsp_server.editor import BufferEdit
from lsp_server.paths import Paths
from lsp_server.settings import Settings
from lsp_server.uris import uri_of
from lsp_server.workbench import Workbench
from tests.fake_editor import FakeEditor, ReadyModel
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
