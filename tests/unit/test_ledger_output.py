"""What `planpatch ledger` shows of proposals, on a terminal and in a pipe."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.console import Console

from engine.patching.edits import Edit
from engine.patching.ledger import Ledger, Proposal
from lsp_server import cli, console

BASE = "def an_averagely_long_name(n):  # 🐍\r\n\treturn n"
INTENT = "Return the number of bits that are set in n, 数えて also for a negative one, and 0 for None."
Show = Callable[..., list[str]]


@pytest.fixture
def patch_id(tmp_path: Path) -> str:
    """A patch that was applied and rejected, of a file with a long name."""
    path = tmp_path / "a module with a long name.py"
    path.write_bytes(BASE.encode())
    edit = Edit(path.name, "replace", 2, 2, "\treturn n", "\treturn 1")
    proposal = Proposal(
        key="key",
        path=path,
        scope="an_averagely_long_name",
        scope_kind="function",
        start_line=1,
        end_line=2,
        base=BASE.encode(),
        patched=BASE.replace("return n", "return 1").encode(),
        edits=(edit,),
        intent=INTENT,
        model="a model",
        edit_format="rewrite",
        surface="cli",
    )
    with Ledger(Path(os.environ["PLANPATCH_HOME"]) / "ledger.sqlite3") as ledger:
        name = ledger.propose(proposal)
        ledger.apply(name)
        ledger.reject(name)
    return name


@pytest.fixture
def show(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Show:
    """`show(80, "list")` is what a terminal of 80 columns shows, `show(None, …)` what a pipe gets."""
    monkeypatch.setenv("PLANPATCH_HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()

    def show(width: int | None, *arguments: str) -> list[str]:
        monkeypatch.setenv("COLUMNS", "80")
        out = Console(highlight=False, soft_wrap=True, no_color=True, force_terminal=width is not None, width=width)
        monkeypatch.setattr(console, "out", out)
        capsys.readouterr()
        assert cli.main(["ledger", *arguments]) == 0
        return capsys.readouterr().out.replace("\x1b[1m", "").replace("\x1b[0m", "").splitlines()

    return show


@pytest.mark.parametrize("width", [40, 80, 100])
def test_a_narrow_terminal_cuts_neither_the_id_nor_the_time_nor_the_state(
    show: Show, patch_id: str, width: int
) -> None:
    header, line = show(width, "list")
    assert header.split() == ["patch", "made", "(UTC)", "state", "where", "intent"]
    assert line.startswith(f"{patch_id}  ")
    assert "  rejected, applied  a " in line
    assert line.endswith("…")
    assert width == 40 or cell_len(line) <= width


def test_a_pipe_gets_everything(show: Show, patch_id: str) -> None:
    _, line = show(None, "list")
    assert line.startswith(patch_id)
    assert line.endswith(f"rejected, applied  a module with a long name.py:an_averagely_long_name  {INTENT}")


def test_a_state_is_shown_once(show: Show, patch_id: str) -> None:
    assert [line.split(maxsplit=1)[1].rstrip() for line in show(100, "show", patch_id) if line.startswith("state")] == [
        "rejected, applied"
    ]
    show(100, "rollback", patch_id)
    assert [line.split(maxsplit=1)[1].rstrip() for line in show(100, "show", patch_id) if line.startswith("state")] == [
        "rolled_back"
    ]
