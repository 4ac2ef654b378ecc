"""Real Neovim, set up as docs/editors/neovim.md says, with the real server and the real 0.5B.

What the user does is in tests/editors/lua/, a script for each test or each Neovim of it; what became of the file and
the ledger is looked at here as well.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import installed_launcher, planpatch
from tests.editors.neovim import LUA, NoNeovimError, neovim, run_lua
from tests.steering import NVIM

ROOT = Path(__file__).resolve().parent.parent.parent
GUIDE = (ROOT / "docs" / "editors" / "neovim.md").read_text(encoding="utf-8")
MODEL = "qwen2.5-coder-0.5b-instruct"
CLAMP = '''"""Numbers."""


def clamp(x, low, high):
    if x < low:
        return high
    return min(x, high)
'''
BLOCKS = dict(re.findall(r"<!-- ([\w-]+) -->\n```lua\n(.*?)```", GUIDE, re.DOTALL))
Script = Callable[..., str]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = tmp_path / "a workspace"
    found.mkdir()
    return found


@pytest.fixture
def nvim() -> Path:
    """Skip where there is no Neovim; where CI is set it has to be there."""
    try:
        return neovim(NVIM)
    except NoNeovimError as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(error))


@pytest.fixture
def script(nvim: Path, home: Path, folder: Path, tmp_path: Path, model_folder_05b: Path) -> Script:
    """Runs one script in the workspace; returns what it printed."""
    snippets = tmp_path / "guide"
    snippets.mkdir()
    for name, text in BLOCKS.items():
        (snippets / f"{name}.lua").write_text(text, encoding="utf-8")
    own_lua = folder / ".neovim" / "config" / "nvim" / "lua"
    own_lua.mkdir(parents=True)
    shutil.copy(ROOT / "editors" / "neovim" / "planpatch.lua", own_lua)
    environment = {
        "PATH": f"{installed_launcher().parent}{os.pathsep}{os.environ['PATH']}",
        "PLANPATCH_MODEL": MODEL,
        "PLANPATCH_DEVICE": "cpu",
        "PLANPATCH_PLAN_MAX_TIME_CPU_S": "3600",  # a busy machine is no fault of what is tested here
        "PLANPATCH_PATCH_MAX_TIME_CPU_S": "3600",
    }

    def run(name: str) -> str:
        ran = run_lua(nvim, name, str(snippets), cwd=folder, environment=environment)
        print(ran.output)
        assert ran.code == 0 and "all ok" in ran.output, ran.output
        return ran.output

    return run


def write(file: Path, text: str) -> bytes:
    file.write_bytes(text.encode("utf-8"))
    return file.read_bytes()


def ledger(folder: Path) -> list[dict[str, Any]]:
    return planpatch("ledger", "list", "--json", cwd=folder).json


def long_function() -> str:
    """A function whose rewriting takes a while."""
    branches = (f"    if x == {number}:\n        return table[{number}] + {number}\n" for number in range(60))
    return f"\n\ndef long(x, table):\n{''.join(branches)}    return None\n"


def test_every_block_of_the_guide_is_run_by_a_script() -> None:
    started = "".join("".join(re.findall(r"T\.start\(.*\)", script.read_text())) for script in LUA.glob("*.lua"))
    run = set(re.findall(r"'(\w+)'", started))
    assert set(BLOCKS) <= run
    assert GUIDE.count("```") == 2 * len(BLOCKS)
    for link in re.findall(r"\]\(([^)#]+)", GUIDE):
        assert (ROOT / "docs" / "editors" / link).exists(), link


@pytest.mark.slow
def test_a_plan_is_edited_patched_applied_saved_and_rolled_back_after_a_restart(script: Script, folder: Path) -> None:
    file = folder / "clamp.py"
    write(file, CLAMP)
    script("plan_and_apply")
    patched = file.read_text(encoding="utf-8")
    assert "# pp:" not in patched and patched != CLAMP
    assert patched.startswith(CLAMP[: CLAMP.index("    if")])
    (entry,) = ledger(folder)
    assert (entry["state"], entry["label"], entry["scope"]) == ("applied", "unreviewed", "clamp")

    shown = planpatch("ledger", "show", entry["id"], "--json", cwd=folder).json
    assert shown["plan_text"] == "When x < low, return low instead of high."
    assert all(verdict["ok"] for verdict in shown["gates"]) and shown["gates"]

    script("roll_back")
    directive = "    # pp: return low when x is too small\n"
    assert file.read_text(encoding="utf-8") == CLAMP.replace("    if", directive + "    if", 1)
    (entry,) = ledger(folder)
    assert (entry["state"], entry["label"]) == ("rolled_back", "rolled_back")


@pytest.mark.long
def test_a_dismissed_question_is_applied_later_undone_redone_and_long_jobs_are_cancelled(
    script: Script, folder: Path
) -> None:
    text = write(folder / "clamp.py", CLAMP + long_function())
    script("dismiss_undo_cancel")
    assert (folder / "clamp.py").read_bytes() == text


@pytest.mark.long
def test_a_refused_patch_is_retried_with_its_error(script: Script, folder: Path) -> None:
    write(folder / "clamp.py", CLAMP)
    script("refused_retry_direct")


SHAPES = (
    '\ufeff"""Größen 🐍."""\r\n\x0c\r\nNAMES = "🎉\tä"\r\n\r\n\r\nclass Shapes:\r\n',
    "\t@staticmethod\r\n\tdef area(width, height):  # 📐\r\n\t\tunit = '🦊'\r\n\t\treturn width + height  # 🤔\r\n",
    '\r\n\tdef outer(self):\r\n\t\tdef inner(x):\r\n\t\t\treturn f"🎈{x}"\r\n\r\n\t\treturn inner',
)


@pytest.mark.slow
def test_bytes_outside_the_function_are_kept(script: Script, folder: Path) -> None:
    before, _, after = (part.encode("utf-8") for part in SHAPES)
    file = folder / "shapes.py"
    old = write(file, "".join(SHAPES))
    script("odd_bytes")
    new = file.read_bytes()
    assert new != old and new.startswith(before) and new.endswith(after)
    function = new.removeprefix(before).removesuffix(after)
    assert function.count(b"\n") == function.count(b"\r\n")

    (entry,) = ledger(folder)
    said = planpatch("ledger", "rollback", entry["id"], cwd=folder)
    assert said.code == 0, said.err
    assert file.read_bytes() == old


@pytest.mark.long
def test_an_edit_that_crossed_typing_is_never_recorded_as_applied(script: Script, folder: Path) -> None:
    write(folder / "changed.py", CLAMP)
    write(folder / "fresh.py", CLAMP)
    script("skipped_edit")
    entries = ledger(folder)
    states = [(Path(one["path"]).name, one["state"]) for one in entries]
    assert states == [("fresh.py", "rolled_back"), ("changed.py", "diverged")]


@pytest.mark.long
def test_the_optional_lua_file_asks_for_an_intent_shows_the_diff_cancels_and_rolls_back(
    script: Script, folder: Path
) -> None:
    text = write(folder / "clamp.py", CLAMP + long_function())
    script("commands")
    assert (folder / "clamp.py").read_bytes() == text
